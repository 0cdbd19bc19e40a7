/* AVX-512 kernels: F, BW, VL, DQ, VBMI, VBMI2; products of bf16 pairs where the CPU has BF16.
 *
 * Three habits, each measured against the obvious way:
 * - vpexpand and vpcompress in their register form, after a plain 64-byte load: the memory forms run at half the
 *   speed of DRAM, and compress-to-memory is microcoded on Zen 4. The empty asm in `load` keeps compilers from
 *   folding the load into the memory form.
 * - The destination of vpexpand and vpcompress is zeroed first: Zen 4 and 5 wait for its old value even under {z}.
 * - Non-temporal stores for large outputs: no read for ownership.
 */
#include "endor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <pthread.h>

#define TARGET                                                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt")))
#define TARGET_BF16                                                                                               \
    __attribute__((                                                                                               \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,bmi,bmi2,popcnt")))
/* Bytes ahead: hides the latency of DRAM. Into L2, or with the hint that spares what else is in L1. */
#define PREFETCH 2048

#define INLINE static inline __attribute__((always_inline))

INLINE TARGET __m512i load(const void *p) {
    __m512i x = _mm512_loadu_si512(p);
    __asm__("" : "+v"(x));
    return x;
}

#define ZEROED(op, mask, x)                                                                                       \
    __extension__({                                                                                               \
        __m512i r_;                                                                                               \
        __asm__("vpxord %x0, %x0, %x0\n\t" op " %1, %0%{%2%}%{z%}" : "=&v"(r_) : "v"(x), "Yk"(mask));               \
        r_;                                                                                                       \
    })
INLINE TARGET __m512i expand_b(__mmask64 m, __m512i x) { return ZEROED("vpexpandb", m, x); }
INLINE TARGET __m512i expand_w(__mmask32 m, __m512i x) { return ZEROED("vpexpandw", m, x); }
INLINE TARGET __m512i expand_d(__mmask16 m, __m512i x) { return ZEROED("vpexpandd", m, x); }
INLINE TARGET __m512i compress_b(__mmask64 m, __m512i x) { return ZEROED("vpcompressb", m, x); }
INLINE TARGET __m512i compress_w(__mmask32 m, __m512i x) { return ZEROED("vpcompressw", m, x); }
INLINE TARGET __m512i compress_d(__mmask16 m, __m512i x) { return ZEROED("vpcompressd", m, x); }

INLINE TARGET void store(void *p, __m512i x, int streaming) {
    if (streaming) _mm512_stream_si512(p, x);
    else _mm512_storeu_si512(p, x);
}

INLINE TARGET uint32_t count(uint64_t m) { return (uint32_t)_mm_popcnt_u64(m); }

/* ---- expand ---- */

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
    static TARGET uint32_t expand##BITS(const uint8_t *bitmap, const void *v, void *out, int streaming) {         \
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

/* bf16: the low byte is sign | mantissa, the planes are the exponent code. */
INLINE TARGET void stream_bf16(const endor_stream *s, uint64_t word, uint64_t words, uint16_t *out, int planes) {
    const __m512i seven = _mm512_set1_epi8(0x7f), base = _mm512_set1_epi8((char)s->base);
    const __m512i first = interleave_index(0), second = interleave_index(32);
    for (uint64_t w = word; w < word + words; w++, out += 64) {
        __m512i e = _mm512_add_epi8(high_bytes(s->planes, s->plane_stride, planes, w), base);
        __m512i rest = load(s->bytes + 64 * w);
        _mm_prefetch((const char *)s->bytes + 64 * w + PREFETCH, _MM_HINT_NTA);
        __m512i low = _mm512_ternarylogic_epi32(seven, rest, _mm512_slli_epi16(e, 7), 0xca);  /* seven ? rest : e << 7 */
        __m512i high = _mm512_ternarylogic_epi32(seven, _mm512_srli_epi16(e, 1), rest, 0xca); /* seven ? e >> 1 : rest */
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

static TARGET void stream(const endor_stream *s, uint64_t word, uint64_t words, void *buf) {
    if (s->itemsize == 1) stream8(s, word, words, buf);
    else if (s->itemsize == 4) stream32(s, word, words, buf);
    else if (s->exponent_bits != 8) stream16(s, word, words, buf);
    else if (s->bit_planes == 2) stream_bf16(s, word, words, buf, 2);
    else if (s->bit_planes == 3) stream_bf16(s, word, words, buf, 3);
    else if (s->bit_planes == 4) stream_bf16(s, word, words, buf, 4);
    else stream_bf16(s, word, words, buf, s->bit_planes);
}

/* ---- encode ---- */

INLINE TARGET uint64_t nonzero8(const uint8_t *s) {
    __m512i a = _mm512_loadu_si512(s);
    return _mm512_test_epi8_mask(a, a);
}

INLINE TARGET uint64_t nonzero16(const uint16_t *s) {
    __m512i a = _mm512_loadu_si512(s), b = _mm512_loadu_si512(s + 32);
    return _mm512_test_epi16_mask(a, a) | (uint64_t)_mm512_test_epi16_mask(b, b) << 32;
}

INLINE TARGET uint64_t nonzero32(const uint32_t *s) {
    uint64_t m = 0;
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_loadu_si512(s + 16 * i);
        m |= (uint64_t)_mm512_test_epi32_mask(a, a) << 16 * i;
    }
    return m;
}

#define SCAN(BITS)                                                                                                \
    static TARGET uint32_t scan##BITS(const void *src, uint8_t *bitmap) {                                         \
        const uint##BITS##_t *s = src;                                                                            \
        uint32_t total = 0;                                                                                       \
        for (int w = 0; w < ENDOR_WORDS; w++) {                                                                   \
            uint64_t m = nonzero##BITS(s + 64 * w);                                                               \
            store64(bitmap + 8 * w, m);                                                                           \
            total += count(m);                                                                                    \
        }                                                                                                         \
        return total;                                                                                             \
    }
SCAN(8)
SCAN(16)
SCAN(32)

static TARGET uint32_t compress8(const uint8_t *bitmap, const void *src, void *dst) {
    uint8_t *d = dst;
    for (int w = 0; w < ENDOR_WORDS; w++) {
        uint64_t m = load64(bitmap + 8 * w);
        _mm512_storeu_si512(d, compress_b(m, load((const uint8_t *)src + 64 * w)));
        d += count(m);
    }
    return (uint32_t)(d - (uint8_t *)dst);
}

static TARGET uint32_t compress16(const uint8_t *bitmap, const void *src, void *dst) {
    const uint16_t *s = src;
    uint16_t *d = dst;
    for (int w = 0; w < ENDOR_WORDS; w++) {
        uint64_t m = load64(bitmap + 8 * w);
        uint32_t low = (uint32_t)m, high = (uint32_t)(m >> 32);
        _mm512_storeu_si512(d, compress_w(low, load(s + 64 * w)));
        _mm512_storeu_si512(d + count(low), compress_w(high, load(s + 64 * w + 32)));
        d += count(m);
    }
    return (uint32_t)(d - (uint16_t *)dst);
}

static TARGET uint32_t compress32(const uint8_t *bitmap, const void *src, void *dst) {
    uint32_t *d = dst;
    for (int w = 0; w < ENDOR_WORDS; w++) {
        uint64_t m = load64(bitmap + 8 * w);
        for (int i = 0; i < 4; i++) {
            uint16_t part = (uint16_t)(m >> 16 * i);
            _mm512_storeu_si512(d, compress_d(part, load((const uint32_t *)src + 64 * w + 16 * i)));
            d += count(part);
        }
    }
    return (uint32_t)(d - (uint32_t *)dst);
}

INLINE TARGET __m512i exponents16(const uint16_t *s, __m128i shift, __m512i mask) { /* of 64 elements, in any order */
    __m512i a = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(s), shift), mask);
    __m512i b = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(s + 32), shift), mask);
    return _mm512_packus_epi16(a, b);
}

INLINE TARGET __m512i exponents32(const uint32_t *s, __m128i shift, __m512i mask) {
    __m512i e[4];
    for (int i = 0; i < 4; i++) e[i] = _mm512_and_si512(_mm512_srl_epi32(_mm512_loadu_si512(s + 16 * i), shift), mask);
    return _mm512_packus_epi16(_mm512_packus_epi32(e[0], e[1]), _mm512_packus_epi32(e[2], e[3]));
}

INLINE TARGET uint32_t max_byte(__m512i x) {
    __m256i y = _mm256_max_epu8(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i z = _mm_max_epu8(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epu8(z, _mm_srli_epi16(z, 8));
    /* the low byte of each 16 bits; minpos finds a minimum */
    z = _mm_xor_si128(_mm_and_si128(z, _mm_set1_epi16(0xff)), _mm_set1_epi16(0xff));
    return 0xff ^ (uint32_t)_mm_extract_epi16(_mm_minpos_epu16(z), 0);
}

/* Weights crowd into few exponents, and counting one by one would wait for the same counter again and again. So count
 * each of the highest 12 exponents of the tile by comparison, zeros as what is left, and the few between one by one. */
#define COMPARED 12
static TARGET void histogram(const void *src, int itemsize, int exponent_bits, int mantissa_bits, uint32_t *hist) {
    ENDOR_ALIGNED uint8_t e[ENDOR_TILE];
    const __m128i shift = _mm_cvtsi32_si128(mantissa_bits);
    const uint32_t field = (1u << exponent_bits) - 1;
    __m512i x[ENDOR_TILE / 64], most = _mm512_setzero_si512();
    for (size_t i = 0; i < ENDOR_TILE / 64; i++) {
        if (itemsize == 2) x[i] = exponents16((const uint16_t *)src + 64 * i, shift, _mm512_set1_epi16((short)field));
        else if (itemsize == 4) x[i] = exponents32((const uint32_t *)src + 64 * i, shift, _mm512_set1_epi32((int)field));
        else x[i] = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512((const uint8_t *)src + 64 * i), shift),
                                     _mm512_set1_epi8((char)field));
        most = _mm512_max_epu8(most, x[i]);
    }
    uint32_t top = max_byte(most), left = ENDOR_TILE, compared = top < COMPARED ? top : COMPARED;
    for (uint32_t c = 0; c < compared; c++) {
        const __m512i value = _mm512_set1_epi8((char)(top - c));
        uint32_t found = 0;
        for (size_t i = 0; i < ENDOR_TILE / 64; i++) found += count(_mm512_cmpeq_epi8_mask(x[i], value));
        hist[top - c] += found;
        left -= found;
    }
    const __m512i low = _mm512_set1_epi8((char)(top - compared));
    uint32_t *more = hist + 256;
    for (size_t i = 0; i < ENDOR_TILE / 64; i++) {
        uint64_t m = _mm512_cmple_epu8_mask(x[i], low) & _mm512_test_epi8_mask(x[i], x[i]);
        if (!m) continue;
        _mm512_store_si512(e + 64 * i, x[i]);
        left -= count(m);
        for (; m; m &= m - 1) {
            more[e[64 * i + (size_t)__builtin_ctzll(m)]]++;
            more = more == hist + 768 ? hist + 256 : more + 256;
        }
    }
    hist[0] += left;
}

/* Exponent codes of 64 one-byte exponent fields; *outside = those not in the window. */
INLINE TARGET __m512i codes_of(const endor_stream *s, __m512i exponents, uint64_t *outside) {
    __m512i code = _mm512_sub_epi8(exponents, _mm512_set1_epi8((char)s->base));
    __mmask64 inside = s->k == 8 ? ~0ull : _mm512_cmplt_epu8_mask(code, _mm512_set1_epi8((char)(1 << s->k)));
    *outside = ~inside;
    return _mm512_maskz_mov_epi8(inside, code);
}

INLINE TARGET __m512i even_bytes(__m512i a, __m512i b, int odd) {
    uint8_t index[64];
    for (int i = 0; i < 64; i++) index[i] = (uint8_t)(2 * i + odd);
    return _mm512_permutex2var_epi8(a, _mm512_loadu_si512(index), b);
}

static TARGET uint64_t split(const endor_stream *s, const void *src, endor_slots *slots) {
    const int m = s->mantissa_bits;
    const uint32_t field = (1u << s->exponent_bits) - 1, fraction = (1u << m) - 1;
    const __m128i m_shift = _mm_cvtsi32_si128(m), r_shift = _mm_cvtsi32_si128(s->rest_bits);
    const __m128i sign_shift = _mm_cvtsi32_si128(8 * s->itemsize - 1 - m);
    __m512i high;
    uint64_t outside;
    if (s->itemsize == 1) {
        __m512i x = _mm512_loadu_si512(src);
        __m512i e = _mm512_and_si512(_mm512_srl_epi16(x, m_shift), _mm512_set1_epi8((char)field));
        high = _mm512_sll_epi16(codes_of(s, e, &outside), r_shift);
        if (s->rest_bits) {
            __m512i sign = _mm512_and_si512(_mm512_srl_epi16(x, sign_shift), _mm512_set1_epi8((char)(1 << m)));
            x = _mm512_and_si512(x, _mm512_set1_epi8((char)fraction));
            high = _mm512_or_si512(high, _mm512_or_si512(sign, x));
        }
    } else if (s->itemsize == 2) {
        __m512i w[2], e[2];
        for (int i = 0; i < 2; i++) {
            __m512i x = _mm512_loadu_si512((const uint16_t *)src + 32 * i);
            e[i] = _mm512_and_si512(_mm512_srl_epi16(x, m_shift), _mm512_set1_epi16((short)field));
            __m512i sign = _mm512_and_si512(_mm512_srl_epi16(x, sign_shift), _mm512_set1_epi16((short)(1 << m)));
            w[i] = _mm512_or_si512(sign, _mm512_and_si512(x, _mm512_set1_epi16((short)fraction)));
        }
        __m512i code = codes_of(s, even_bytes(e[0], e[1], 0), &outside);
        _mm512_storeu_si512(slots->bytes[0], even_bytes(w[0], w[1], 0));
        /* the bits of rest above the byte stand below the code */
        high = _mm512_or_si512(_mm512_sll_epi16(code, _mm_cvtsi32_si128(s->rest_bits - 8)), even_bytes(w[0], w[1], 1));
    } else {
        __m128i b[3][4], e[4];
        for (int i = 0; i < 4; i++) {
            __m512i x = _mm512_loadu_si512((const uint32_t *)src + 16 * i);
            e[i] = _mm512_cvtepi32_epi8(_mm512_and_si512(_mm512_srl_epi32(x, m_shift), _mm512_set1_epi32((int)field)));
            __m512i sign = _mm512_and_si512(_mm512_srl_epi32(x, sign_shift), _mm512_set1_epi32(1 << m));
            __m512i w = _mm512_or_si512(sign, _mm512_and_si512(x, _mm512_set1_epi32((int)fraction)));
            b[0][i] = _mm512_cvtepi32_epi8(w);
            b[1][i] = _mm512_cvtepi32_epi8(_mm512_srli_epi32(w, 8));
            b[2][i] = _mm512_cvtepi32_epi8(_mm512_srli_epi32(w, 16));
        }
        for (int j = 0; j < 3; j++) {
            for (int i = 0; i < 4; i++) _mm_storeu_si128((__m128i *)(slots->bytes[j] + 16 * i), b[j][i]);
        }
        high = codes_of(s, _mm512_loadu_si512(e), &outside);
    }
    for (int j = 0; j < s->bit_planes; j++) {
        slots->planes[j] = _mm512_test_epi8_mask(high, _mm512_set1_epi8((char)(1 << j)));
    }
    return outside;
}

/* ---- memory ---- */

static TARGET void copy_streaming(void *dst, const void *src, size_t nbytes) {
    uint8_t *d = dst;
    const uint8_t *s = src;
    size_t head = (size_t)(-(uintptr_t)d & 63);
    if (head > nbytes) head = nbytes;
    memcpy(d, s, head);
    d += head, s += head, nbytes -= head;
    for (; nbytes >= 256; nbytes -= 256, d += 256, s += 256) {
        __m512i a = _mm512_loadu_si512(s), b = _mm512_loadu_si512(s + 64);
        __m512i c = _mm512_loadu_si512(s + 128), e = _mm512_loadu_si512(s + 192);
        _mm512_stream_si512((void *)d, a);
        _mm512_stream_si512((void *)(d + 64), b);
        _mm512_stream_si512((void *)(d + 128), c);
        _mm512_stream_si512((void *)(d + 192), e);
    }
    for (; nbytes >= 64; nbytes -= 64, d += 64, s += 64) _mm512_stream_si512((void *)d, _mm512_loadu_si512(s));
    memcpy(d, s, nbytes);
}

static TARGET uint64_t read_words(const void *src, size_t nbytes) {
    const uint8_t *s = src;
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (size_t i = 0; i + 256 <= nbytes; i += 256) {
        for (int j = 0; j < 4; j++) sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(s + i + 64 * j));
    }
    sum[0] = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
    uint64_t words[8], total = 0;
    _mm512_storeu_si512(words, sum[0]);
    for (int i = 0; i < 8; i++) total ^= words[i];
    for (size_t i = nbytes / 256 * 256; i + 8 <= nbytes; i += 8) total ^= load64(s + i);
    return total;
}

static TARGET void fence(void) { _mm_sfence(); }

/* ---- products ---- */

INLINE TARGET __m512 floats_of(const uint8_t *w, uint64_t i, __mmask16 mask, int kind) {
    if (kind == ENDOR_X_F32) return _mm512_maskz_loadu_ps(mask, w + 4 * i);
    __m256i x = _mm256_maskz_loadu_epi16(mask, w + 2 * i);
    if (kind == ENDOR_X_F16) return _mm512_cvtph_ps(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

INLINE TARGET void dot_floats(const uint8_t *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc,
                              int kind, int batch) {
    const float *row = (const float *)x->x + column;
    __m512 sum[ENDOR_MAX_BATCH], more[ENDOR_MAX_BATCH];
    for (int b = 0; b < batch; b++) sum[b] = _mm512_loadu_ps(acc + 16 * b), more[b] = _mm512_setzero_ps();
    uint64_t i = 0;
    for (; i + 32 <= len; i += 32) {
        __m512 w0 = floats_of(w, i, 0xffff, kind), w1 = floats_of(w, i + 16, 0xffff, kind);
        for (int b = 0; b < batch; b++) {
            sum[b] = _mm512_fmadd_ps(w0, _mm512_loadu_ps(row + (uint64_t)b * x->stride + i), sum[b]);
            more[b] = _mm512_fmadd_ps(w1, _mm512_loadu_ps(row + (uint64_t)b * x->stride + i + 16), more[b]);
        }
    }
    for (; i < len; i += 16) {
        __mmask16 mask = len - i >= 16 ? 0xffff : (__mmask16)((1u << (len - i)) - 1);
        __m512 w0 = floats_of(w, i, mask, kind);
        for (int b = 0; b < batch; b++) {
            sum[b] = _mm512_fmadd_ps(w0, _mm512_maskz_loadu_ps(mask, row + (uint64_t)b * x->stride + i), sum[b]);
        }
    }
    for (int b = 0; b < batch; b++) _mm512_storeu_ps(acc + 16 * b, _mm512_add_ps(sum[b], more[b]));
}

INLINE TARGET_BF16 void dot_pairs(const uint16_t *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc,
                                  int batch) {
    const uint16_t *row = (const uint16_t *)x->x + column;
    __m512 sum[ENDOR_MAX_BATCH], more[ENDOR_MAX_BATCH];
    for (int b = 0; b < batch; b++) sum[b] = _mm512_loadu_ps(acc + 16 * b), more[b] = _mm512_setzero_ps();
    uint64_t i = 0;
    for (; i + 64 <= len; i += 64) {
        __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + i), w1 = (__m512bh)_mm512_loadu_si512(w + i + 32);
        for (int b = 0; b < batch; b++) {
            const uint16_t *at = row + (uint64_t)b * x->stride + i;
            sum[b] = _mm512_dpbf16_ps(sum[b], w0, (__m512bh)_mm512_loadu_si512(at));
            more[b] = _mm512_dpbf16_ps(more[b], w1, (__m512bh)_mm512_loadu_si512(at + 32));
        }
    }
    for (; i < len; i += 32) {
        __mmask32 mask = len - i >= 32 ? 0xffffffffu : (1u << (len - i)) - 1;
        __m512bh w0 = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + i);
        for (int b = 0; b < batch; b++) {
            __m512i x0 = _mm512_maskz_loadu_epi16(mask, row + (uint64_t)b * x->stride + i);
            sum[b] = _mm512_dpbf16_ps(sum[b], w0, (__m512bh)x0);
        }
    }
    for (int b = 0; b < batch; b++) _mm512_storeu_ps(acc + 16 * b, _mm512_add_ps(sum[b], more[b]));
}

#define BATCHES(CALL)                                                                                             \
    switch (x->batch) {                                                                                           \
    case 1: CALL(1); break;                                                                                       \
    case 2: CALL(2); break;                                                                                       \
    case 3: CALL(3); break;                                                                                       \
    case 4: CALL(4); break;                                                                                       \
    case 5: CALL(5); break;                                                                                       \
    case 6: CALL(6); break;                                                                                       \
    case 7: CALL(7); break;                                                                                       \
    default: CALL(8); break;                                                                                      \
    }

#define DOT(KIND)                                                                                                 \
    static TARGET void dot_##KIND(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) { \
        BATCHES(DOT_##KIND)                                                                                       \
    }
#define DOT_BF16(B) dot_floats(w, x, column, len, acc, ENDOR_X_BF16, B)
#define DOT_F16(B) dot_floats(w, x, column, len, acc, ENDOR_X_F16, B)
#define DOT_F32(B) dot_floats(w, x, column, len, acc, ENDOR_X_F32, B)
DOT(BF16)
DOT(F16)
DOT(F32)

static TARGET_BF16 void dot_PAIRS(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) {
#define DOT_PAIRS(B) dot_pairs(w, x, column, len, acc, B)
    BATCHES(DOT_PAIRS)
}

static void dot(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) {
    if (x->bf16_pairs) dot_PAIRS(w, x, column, len, acc);
    else if (x->weight == ENDOR_X_BF16) dot_BF16(w, x, column, len, acc);
    else if (x->weight == ENDOR_X_F16) dot_F16(w, x, column, len, acc);
    else dot_F32(w, x, column, len, acc);
}

/* Rows of raw weights straight to sums: the weights exist in registers only. */

/* Which sums a weight vector goes to must not depend on the number of runs, or the order of a row's sum would. */
#define SUMS(batch) ((batch) > 2 ? 1 : 2)

INLINE TARGET_BF16 uint64_t rows_pairs(endor_run *runs, uint64_t rows, uint64_t cols, const uint8_t *end,
                                       const endor_operand *x, uint64_t out_stride, int n_runs, int batch) {
    const uint16_t *v[ENDOR_MAX_RUNS], *xs = x->x;
    const uint8_t *bitmap[ENDOR_MAX_RUNS];
    const int second = SUMS(batch) - 1;
    for (int r = 0; r < n_runs; r++) v[r] = (const uint16_t *)runs[r].values, bitmap[r] = runs[r].bitmap;
    uint64_t row = 0;
    for (; row < rows; row++) {
        __m512 sum[ENDOR_MAX_RUNS][ENDOR_MAX_BATCH][2];
        for (int r = 0; r < n_runs; r++) {
            if ((uint64_t)(end - (const uint8_t *)v[r]) < 2 * cols + ENDOR_SLACK) goto stop;
            for (int b = 0; b < batch; b++) sum[r][b][0] = sum[r][b][1] = _mm512_setzero_ps();
        }
        for (uint64_t k = 0; k < cols; k += 64) {
            __m512i w[ENDOR_MAX_RUNS][2];
            for (int r = 0; r < n_runs; r++) {
                uint64_t m = load64(bitmap[r] + k / 8);
                _mm_prefetch((const char *)v[r] + PREFETCH, _MM_HINT_T1);
                if (!(k & 511)) _mm_prefetch((const char *)bitmap[r] + k / 8 + PREFETCH / 4, _MM_HINT_T1);
                w[r][0] = expand_w((uint32_t)m, load(v[r]));
                w[r][1] = expand_w((uint32_t)(m >> 32), load(v[r] + count((uint32_t)m)));
                v[r] += count(m);
            }
            for (int b = 0; b < batch; b++) {
                const uint16_t *at = xs + (uint64_t)b * x->stride + k;
                __m512bh x0 = (__m512bh)_mm512_loadu_si512(at), x1 = (__m512bh)_mm512_loadu_si512(at + 32);
                for (int r = 0; r < n_runs; r++) {
                    sum[r][b][0] = _mm512_dpbf16_ps(sum[r][b][0], (__m512bh)w[r][0], x0);
                    sum[r][b][second] = _mm512_dpbf16_ps(sum[r][b][second], (__m512bh)w[r][1], x1);
                }
            }
        }
        for (int r = 0; r < n_runs; r++) {
            bitmap[r] += cols / 8;
            for (int b = 0; b < batch; b++) {
                __m512 all = second ? _mm512_add_ps(sum[r][b][0], sum[r][b][1]) : sum[r][b][0];
                runs[r].out[(uint64_t)b * out_stride + row] = _mm512_reduce_add_ps(all);
            }
        }
    }
stop:
    for (int r = 0; r < n_runs; r++) {
        runs[r].values = (const uint8_t *)v[r], runs[r].bitmap = bitmap[r];
        runs[r].out += row;
    }
    return row;
}

INLINE TARGET __m512 half_of(__m512i w, int half, int kind) {
    if (kind == ENDOR_X_F32) return _mm512_castsi512_ps(w);
    __m256i x = half ? _mm512_extracti64x4_epi64(w, 1) : _mm512_castsi512_si256(w);
    if (kind == ENDOR_X_F16) return _mm512_cvtph_ps(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

INLINE TARGET uint64_t rows_floats(endor_run *runs, uint64_t rows, uint64_t cols, const uint8_t *end,
                                   const endor_operand *x, uint64_t out_stride, int kind, int n_runs, int batch) {
    const uint8_t *v[ENDOR_MAX_RUNS], *bitmap[ENDOR_MAX_RUNS];
    const int second = SUMS(batch) - 1, itemsize = kind == ENDOR_X_F32 ? 4 : 2;
    const float *xs = x->x;
    for (int r = 0; r < n_runs; r++) v[r] = runs[r].values, bitmap[r] = runs[r].bitmap;
    uint64_t row = 0;
    for (; row < rows; row++) {
        __m512 sum[ENDOR_MAX_RUNS][ENDOR_MAX_BATCH][2];
        for (int r = 0; r < n_runs; r++) {
            if ((uint64_t)(end - v[r]) < (uint64_t)itemsize * cols + ENDOR_SLACK) goto stop;
            for (int b = 0; b < batch; b++) sum[r][b][0] = sum[r][b][1] = _mm512_setzero_ps();
        }
        for (uint64_t k = 0; k < cols; k += 32) {
            __m512 w[ENDOR_MAX_RUNS][2];
            for (int r = 0; r < n_runs; r++) {
                uint32_t m = load32(bitmap[r] + k / 8);
                _mm_prefetch((const char *)v[r] + PREFETCH, _MM_HINT_NTA);
                if (kind == ENDOR_X_F32) {
                    w[r][0] = _mm512_castsi512_ps(expand_d((uint16_t)m, load(v[r])));
                    w[r][1] = _mm512_castsi512_ps(expand_d((uint16_t)(m >> 16), load(v[r] + 4 * count((uint16_t)m))));
                } else {
                    __m512i both = expand_w(m, load(v[r]));
                    w[r][0] = half_of(both, 0, kind), w[r][1] = half_of(both, 1, kind);
                }
                v[r] += (uint32_t)itemsize * count(m);
            }
            for (int b = 0; b < batch; b++) {
                const float *at = xs + (uint64_t)b * x->stride + k;
                __m512 x0 = _mm512_loadu_ps(at), x1 = _mm512_loadu_ps(at + 16);
                for (int r = 0; r < n_runs; r++) {
                    sum[r][b][0] = _mm512_fmadd_ps(w[r][0], x0, sum[r][b][0]);
                    sum[r][b][second] = _mm512_fmadd_ps(w[r][1], x1, sum[r][b][second]);
                }
            }
        }
        for (int r = 0; r < n_runs; r++) {
            bitmap[r] += cols / 8;
            for (int b = 0; b < batch; b++) {
                __m512 all = second ? _mm512_add_ps(sum[r][b][0], sum[r][b][1]) : sum[r][b][0];
                runs[r].out[(uint64_t)b * out_stride + row] = _mm512_reduce_add_ps(all);
            }
        }
    }
stop:
    for (int r = 0; r < n_runs; r++) {
        runs[r].values = v[r], runs[r].bitmap = bitmap[r];
        runs[r].out += row;
    }
    return row;
}

/* As many runs as keep all sums in registers. */
#define RUNS(batch) ((batch) <= 4 ? 4 : 2)
static int row_runs(const endor_operand *x) { return RUNS(x->batch); }

#define ROWS(KIND, CALL_TARGET, ONE, MANY)                                                                            static CALL_TARGET uint64_t rows_##KIND(endor_run *runs, int n_runs, uint64_t count, uint64_t cols,                                                       const uint8_t *end, const endor_operand *x, uint64_t stride) {                uint64_t done = 0;                                                                                                if (n_runs == 1) BATCHES(ONE) else BATCHES(MANY)                                                                  return done;                                                                                                  }
#define ONE_PAIRS(B) done = rows_pairs(runs, count, cols, end, x, stride, 1, B)
#define MANY_PAIRS(B) done = rows_pairs(runs, count, cols, end, x, stride, RUNS(B), B)
#define ONE_FLOATS(KIND, B) done = rows_floats(runs, count, cols, end, x, stride, KIND, 1, B)
#define MANY_FLOATS(KIND, B) done = rows_floats(runs, count, cols, end, x, stride, KIND, RUNS(B), B)
#define ONE_BF16(B) ONE_FLOATS(ENDOR_X_BF16, B)
#define MANY_BF16(B) MANY_FLOATS(ENDOR_X_BF16, B)
#define ONE_F16(B) ONE_FLOATS(ENDOR_X_F16, B)
#define MANY_F16(B) MANY_FLOATS(ENDOR_X_F16, B)
#define ONE_F32(B) ONE_FLOATS(ENDOR_X_F32, B)
#define MANY_F32(B) MANY_FLOATS(ENDOR_X_F32, B)
ROWS(PAIRS, TARGET_BF16, ONE_PAIRS, MANY_PAIRS)
ROWS(BF16, TARGET, ONE_BF16, MANY_BF16)
ROWS(F16, TARGET, ONE_F16, MANY_F16)
ROWS(F32, TARGET, ONE_F32, MANY_F32)

static uint64_t rows(endor_run *runs, int n_runs, uint64_t count, uint64_t cols, const uint8_t *end,
                     const endor_operand *x, uint64_t stride) {
    if (x->bf16_pairs) return rows_PAIRS(runs, n_runs, count, cols, end, x, stride);
    if (x->weight == ENDOR_X_BF16) return rows_BF16(runs, n_runs, count, cols, end, x, stride);
    if (x->weight == ENDOR_X_F16) return rows_F16(runs, n_runs, count, cols, end, x, stride);
    return rows_F32(runs, n_runs, count, cols, end, x, stride);
}

static endor_ops ops = {
    .name = "avx512",
    .expand = {expand8, expand16, expand32},
    .stream = stream,
    .scan = {scan8, scan16, scan32},
    .compress = {compress8, compress16, compress32},
    .histogram = histogram,
    .split = split,
    .copy_streaming = copy_streaming,
    .read = read_words,
    .fence = fence,
    .dot = dot,
    .rows = rows,
    .row_runs = row_runs,
};

static int supported;

static void probe(void) {
    supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    ops.bf16_pairs = __builtin_cpu_supports("avx512bf16") != 0;
}

const endor_ops *endor_avx512_ops(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, probe);
    return supported ? &ops : NULL;
}

#else

const endor_ops *endor_avx512_ops(void) { return NULL; }

#endif
