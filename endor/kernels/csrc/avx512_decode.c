/* AVX-512: placing stored elements by the bitmap, and decoding the exp stream. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx512.h"

INLINE TARGET uint32_t expand8_of(const uint8_t *bitmap, const uint8_t *v, uint8_t *out, int streaming) {
    const uint8_t *v0 = v;
    for (int w = 0; w < ENDOR_WORDS; w++) {
        uint64_t m = load64(bitmap + 8 * w);
        store(out + 64 * w, expand_b(m, load(v)), streaming);
        v += count(m);
    }
    return (uint32_t)(v - v0);
}

INLINE TARGET uint32_t expand16_of(const uint8_t *bitmap, const uint16_t *v, uint16_t *out, int streaming) {
    const uint16_t *v0 = v;
    for (int w = 0; w < ENDOR_WORDS; w++) {
        uint64_t m = load64(bitmap + 8 * w);
        uint32_t low = (uint32_t)m, high = (uint32_t)(m >> 32);
        __m512i a = expand_w(low, load(v)), b = expand_w(high, load(v + count(low)));
        v += count(m);
        store(out + 64 * w, a, streaming);
        store(out + 64 * w + 32, b, streaming);
    }
    return (uint32_t)(v - v0);
}

INLINE TARGET uint32_t expand32_of(const uint8_t *bitmap, const uint32_t *v, uint32_t *out, int streaming) {
    const uint32_t *v0 = v;
    for (int w = 0; w < ENDOR_WORDS; w++) {
        uint64_t m = load64(bitmap + 8 * w);
        for (int i = 0; i < 4; i++) {
            uint16_t part = (uint16_t)(m >> 16 * i);
            store(out + 64 * w + 16 * i, expand_d(part, load(v)), streaming);
            v += count(part);
        }
    }
    return (uint32_t)(v - v0);
}

#define EXPAND(BITS)                                                                                              \
    TARGET uint32_t endor_avx512_expand##BITS(const uint8_t *bitmap, const void *v, void *out, int streaming) {         \
        return streaming ? expand##BITS##_of(bitmap, v, out, 1) : expand##BITS##_of(bitmap, v, out, 0);           \
    }
EXPAND(8)
EXPAND(16)
EXPAND(32)

/* ---- exp stream ---- */

/* Byte index k of the permutes that interleave two vectors of bytes: a0 b0 a1 b1 ..., from element `first` on. */
INLINE TARGET __m512i interleave_index(int first) {
    uint8_t index[64];
    for (int i = 0; i < 64; i++) index[i] = (uint8_t)((first + i / 2) | (i & 1) << 6);
    return _mm512_loadu_si512(index);
}

/* The bit planes of plane word w: byte i = the bits of stored element 64 * w + i. */
INLINE TARGET __m512i high_bytes(const uint8_t *planes, uint64_t stride, int bit_planes, uint64_t w) {
    __m512i c = _mm512_maskz_set1_epi8(load64(planes + 8 * w), 1);
    for (int j = 1; j < bit_planes; j++) {
        c = _mm512_mask_add_epi8(c, load64(planes + (uint64_t)j * stride + 8 * w), c, _mm512_set1_epi8((char)(1 << j)));
    }
    return c;
}

/* bf16: the low byte is the lowest exponent bit and the mantissa, the high one the sign and the rest of the exponent.
 * The exponent is base + code. Plane 0 alone decides its lowest bit; above stand half the base, a carry where the base
 * is odd, and the other planes. */
INLINE TARGET void stream_bf16(const endor_stream *s, uint64_t word, uint64_t words, uint16_t *out, int planes, int odd) {
    const __m512i seven = _mm512_set1_epi8(0x7f), top = _mm512_set1_epi8((char)0x80);
    const __m512i half = _mm512_set1_epi8((char)(s->base >> 1)), one_more = _mm512_set1_epi8((char)((s->base >> 1) + 1));
    const __m512i first = interleave_index(0), second = interleave_index(32);
    const uint8_t *bits = s->planes + 8 * word, *bytes = s->bytes + 64 * word;
    for (; words; words--, out += 64, bits += 8, bytes += 64) {
        __m512i rest = _mm512_loadu_si512(bytes), low, high;
        _mm_prefetch((const char *)bytes + PREFETCH, _MM_HINT_NTA);
        __mmask64 lowest = load64(bits);
        if (odd) {
            low = _mm512_mask_sub_epi8(_mm512_or_si512(rest, top), lowest, _mm512_or_si512(rest, top), top);
            high = _mm512_mask_blend_epi8(lowest, half, one_more);
        } else {
            low = _mm512_and_si512(rest, seven);
            low = _mm512_mask_sub_epi8(low, lowest, low, top);
            high = half;
        }
        for (int j = 1; j < planes; j++) {
            __mmask64 m = load64(bits + (uint64_t)j * s->plane_stride);
            if (j == 1 && !odd) high = _mm512_mask_blend_epi8(m, half, one_more);
            else high = _mm512_mask_add_epi8(high, m, high, _mm512_set1_epi8((char)(1 << (j - 1))));
        }
        high = _mm512_ternarylogic_epi32(seven, high, rest, 0xca); /* seven ? high : rest */
        _mm512_store_si512(out, _mm512_permutex2var_epi8(low, first, high));
        _mm512_store_si512(out + 32, _mm512_permutex2var_epi8(low, second, high));
    }
}

/* Sign, exponent and mantissa from w = code << rest_bits | sign << mantissa_bits | mantissa, 16 and 32 bits wide. */
typedef struct {
    __m512i mantissa, sign, exponent, base;
    __m128i sign_shift, rest_shift, mantissa_shift;
} joiner;

#define JOINER(BITS, SET1)                                                                                        \
    {.mantissa = SET1((1u << s->mantissa_bits) - 1),                                                              \
     .sign = SET1(1u << (BITS - 1)),                                                                              \
     .exponent = SET1(((1u << s->exponent_bits) - 1) << s->mantissa_bits),                                        \
     .base = SET1(s->base),                                                                                       \
     .sign_shift = _mm_cvtsi32_si128(BITS - 1 - s->mantissa_bits),                                                \
     .rest_shift = _mm_cvtsi32_si128(s->rest_bits),                                                               \
     .mantissa_shift = _mm_cvtsi32_si128(s->mantissa_bits)}

#define JOIN(BITS)                                                                                                \
    INLINE TARGET __m512i join##BITS(const joiner *j, __m512i w) {                                                \
        __m512i e = _mm512_add_epi##BITS(_mm512_srl_epi##BITS(w, j->rest_shift), j->base);                        \
        e = _mm512_and_si512(_mm512_sll_epi##BITS(e, j->mantissa_shift), j->exponent);                            \
        __m512i sign = _mm512_sll_epi##BITS(w, j->sign_shift);                                                    \
        e = _mm512_ternarylogic_epi32(j->sign, sign, e, 0xea); /* e | (j->sign & sign) */                         \
        return _mm512_ternarylogic_epi32(j->mantissa, w, e, 0xea);                                                \
    }
JOIN(16)
JOIN(32)

static TARGET void stream16(const endor_stream *s, uint64_t word, uint64_t words, uint16_t *out) {
    const joiner j = JOINER(16, _mm512_set1_epi16);
    const __m512i first = interleave_index(0), second = interleave_index(32);
    for (uint64_t w = word; w < word + words; w++, out += 64) {
        __m512i high = high_bytes(s->planes, s->plane_stride, s->bit_planes, w), low = load(s->bytes + 64 * w);
        _mm512_store_si512(out, join16(&j, _mm512_permutex2var_epi8(low, first, high)));
        _mm512_store_si512(out + 32, join16(&j, _mm512_permutex2var_epi8(low, second, high)));
    }
}

static TARGET void stream32(const endor_stream *s, uint64_t word, uint64_t words, uint32_t *out) {
    const joiner j = JOINER(32, _mm512_set1_epi32);
    const __m512i first = interleave_index(0), second = interleave_index(32);
    uint16_t index[64];
    for (int i = 0; i < 64; i++) index[i] = (uint16_t)(i / 2 | (i & 1) << 5);
    const __m512i first16 = _mm512_loadu_si512(index), second16 = _mm512_loadu_si512(index + 32);
    for (uint64_t w = word; w < word + words; w++, out += 64) {
        const uint8_t *low = s->bytes + 64 * w, *middle = low + s->byte_stride, *top = middle + s->byte_stride;
        __m512i high = high_bytes(s->planes, s->plane_stride, s->bit_planes, w);
        __m512i b0 = load(low), b1 = load(middle), b2 = load(top);
        __m512i l0 = _mm512_permutex2var_epi8(b0, first, b1), l1 = _mm512_permutex2var_epi8(b0, second, b1);
        __m512i h0 = _mm512_permutex2var_epi8(b2, first, high), h1 = _mm512_permutex2var_epi8(b2, second, high);
        _mm512_store_si512(out, join32(&j, _mm512_permutex2var_epi16(l0, first16, h0)));
        _mm512_store_si512(out + 16, join32(&j, _mm512_permutex2var_epi16(l0, second16, h0)));
        _mm512_store_si512(out + 32, join32(&j, _mm512_permutex2var_epi16(l1, first16, h1)));
        _mm512_store_si512(out + 48, join32(&j, _mm512_permutex2var_epi16(l1, second16, h1)));
    }
}

static TARGET void stream8(const endor_stream *s, uint64_t word, uint64_t words, uint8_t *out) {
    const __m512i t0 = _mm512_loadu_si512(s->lut), t1 = _mm512_loadu_si512(s->lut + 64);
    const __m512i t2 = _mm512_loadu_si512(s->lut + 128), t3 = _mm512_loadu_si512(s->lut + 192);
    for (uint64_t w = word; w < word + words; w++, out += 64) {
        __m512i c = high_bytes(s->planes, s->plane_stride, s->bit_planes, w);
        __m512i below = _mm512_permutex2var_epi8(t0, c, t1), above = _mm512_permutex2var_epi8(t2, c, t3);
        _mm512_store_si512(out, _mm512_mask_mov_epi8(below, _mm512_movepi8_mask(c), above));
    }
}

INLINE TARGET void stream_planes(const endor_stream *s, uint64_t word, uint64_t words, uint16_t *out, int odd) {
    if (s->bit_planes == 2) stream_bf16(s, word, words, out, 2, odd);
    else if (s->bit_planes == 3) stream_bf16(s, word, words, out, 3, odd);
    else if (s->bit_planes == 4) stream_bf16(s, word, words, out, 4, odd);
    else stream_bf16(s, word, words, out, s->bit_planes, odd);
}

TARGET void endor_avx512_stream(const endor_stream *s, uint64_t word, uint64_t words, void *buf) {
    if (s->itemsize == 1) stream8(s, word, words, buf);
    else if (s->itemsize == 4) stream32(s, word, words, buf);
    else if (s->exponent_bits != 8) stream16(s, word, words, buf);
    else if (s->base & 1) stream_planes(s, word, words, buf, 1);
    else stream_planes(s, word, words, buf, 0);
}

#endif
