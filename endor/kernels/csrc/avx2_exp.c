/* AVX2: the exp stream, 32 stored elements at a time, of bf16 64.
 *
 * A plane's 32 bits are broadcast, each byte of the vector takes the byte of bits it belongs to, and a comparison with
 * its own bit makes it 0 or 0xff. Sign and exponent are joined as bytes, in half the registers that 16-bit arithmetic
 * would need, and bytes are brought together last. The unpack instructions that do this work within 128 bits, so bytes
 * are loaded, and bits spread, in the order from which they leave elements in the right one.
 */
#include "endor.h"

#if defined(__x86_64__)
#include "avx2.h"

/* Which byte of a plane's four, and which of its bits, each of 32 bytes is. */
typedef struct {
    __m256i which, bit;
} spreading;

#define EIGHT(x) (0x0101010101010101 * (x))
#define FOURS(a, b) (0x01010101 * (long long)(a) + 0x0101010100000000 * (long long)(b))
#define EACH_BIT _mm256_set1_epi64x((long long)0x8040201008040201u)
/* 0-31 */
#define SPREAD_BYTES (spreading){_mm256_setr_epi64x(EIGHT(0), EIGHT(1), EIGHT(2), EIGHT(3)), EACH_BIT}
/* 0-7 16-23 8-15 24-31: one unpack makes 16-bit elements */
#define SPREAD_PAIRS (spreading){_mm256_setr_epi64x(EIGHT(0), EIGHT(2), EIGHT(1), EIGHT(3)), EACH_BIT}
#define PAIRS_FROM(p) _mm256_permute4x64_epi64(load256(p), 0xd8)
/* 0-3 8-11 16-19 24-27 4-7 12-15 20-23 28-31: two unpacks make 32-bit elements */
#define SPREAD_QUADS                                                                                              \
    (spreading) {                                                                                                 \
        _mm256_setr_epi64x(FOURS(0, 1), FOURS(2, 3), FOURS(0, 1), FOURS(2, 3)),                                   \
            _mm256_setr_epi64x(0x0804020108040201, 0x0804020108040201, (long long)0x8040201080402010u,            \
                               (long long)0x8040201080402010u)                                                    \
    }
#define QUADS_FROM(p) _mm256_permutevar8x32_epi32(load256(p), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7))

/* A plane's bits, in every 32 or 64 of the vector. */
INLINE TARGET __m256i plane32(const uint8_t *bits) { return _mm256_set1_epi32((int)load32(bits)); }
INLINE TARGET __m256i plane64(const uint8_t *bits) { return _mm256_set1_epi64x((long long)load64(bits)); }

INLINE TARGET __m256i spread_of(__m256i plane, const spreading *how) {
    __m256i x = _mm256_shuffle_epi8(plane, how->which);
    return _mm256_cmpeq_epi8(_mm256_and_si256(x, how->bit), how->bit);
}
INLINE TARGET __m256i spread(const uint8_t *bits, const spreading *how) { return spread_of(plane32(bits), how); }

#define AHEAD 2048 /* stored elements that are fetched beforehand */

INLINE void fetch(const uint8_t *bytes, uint64_t byte_stride, int byte_planes, const uint8_t *bits, uint64_t stride,
                  int planes) {
    for (int j = 0; j < byte_planes; j++) _mm_prefetch((const char *)bytes + (uint64_t)j * byte_stride + AHEAD, _MM_HINT_T0);
    for (int j = 0; j < planes; j++) _mm_prefetch((const char *)bits + (uint64_t)j * stride + AHEAD / 8, _MM_HINT_T0);
}

/* bf16, and the upper half of a float: the lower byte is the lowest exponent bit and the mantissa, the upper one the
 * sign and the rest of the exponent. The exponent is base + code: plane 0 alone decides its lowest bit; above stand half
 * the base, a carry where the base is odd, and the other planes. `wraps`: the sum may pass the largest exponent. */
INLINE TARGET void join(const __m256i *plane, __m256i half, __m256i rest, const spreading *how, int planes, int odd,
                        int wraps, __m256i *low, __m256i *high) {
    const __m256i seven = _mm256_set1_epi8(0x7f), top = _mm256_set1_epi8((char)0x80);
    __m256i lowest = spread_of(plane[0], how);
    __m256i bit = odd ? _mm256_andnot_si256(lowest, top) : _mm256_and_si256(lowest, top);
    *low = _mm256_or_si256(_mm256_and_si256(rest, seven), bit);
    if (odd) half = _mm256_sub_epi8(half, lowest);
    for (int j = 1; j < planes; j++) {
        __m256i m = spread_of(plane[j], how);
        if (j == 1) half = _mm256_sub_epi8(half, m);
        else half = _mm256_add_epi8(half, _mm256_and_si256(m, _mm256_set1_epi8((char)(1 << (j - 1)))));
    }
    if (wraps) half = _mm256_and_si256(half, seven);
    *high = _mm256_or_si256(_mm256_and_si256(rest, top), half);
}

INLINE TARGET void put_pairs(const __m256i *plane, __m256i half, const uint8_t *bytes, const spreading *how, int planes,
                             int odd, int wraps, uint8_t *out) {
    __m256i low, high;
    join(plane, half, PAIRS_FROM(bytes), how, planes, odd, wraps, &low, &high);
    _mm256_store_si256((__m256i *)out, _mm256_unpacklo_epi8(low, high));
    _mm256_store_si256((__m256i *)(out + 32), _mm256_unpackhi_epi8(low, high));
}

INLINE TARGET void stream_bf16(const endor_stream *s, uint64_t first, uint64_t n, uint8_t *out, int planes, int odd,
                               int wraps) {
    const spreading how = SPREAD_PAIRS, upper = {_mm256_add_epi8(how.which, _mm256_set1_epi8(4)), how.bit};
    const uint8_t *bits = s->planes + first / 8, *bytes = s->bytes + first;
    const uint64_t stride = s->plane_stride;
    const __m256i half = _mm256_set1_epi8((char)(s->base >> 1));
    __m256i plane[8];
    for (; n >= 64; n -= 64, bits += 8, bytes += 64, out += 128) {
        fetch(bytes, 0, 1, bits, stride, planes);
        for (int j = 0; j < planes; j++) plane[j] = plane64(bits + (uint64_t)j * stride);
        put_pairs(plane, half, bytes, &how, planes, odd, wraps, out);
        put_pairs(plane, half, bytes + 32, &upper, planes, odd, wraps, out + 64);
    }
    if (n) {
        for (int j = 0; j < planes; j++) plane[j] = plane32(bits + (uint64_t)j * stride);
        put_pairs(plane, half, bytes, &how, planes, odd, wraps, out);
    }
}

INLINE TARGET void stream_f32(const endor_stream *s, uint64_t first, uint64_t n, uint8_t *out, int planes, int odd,
                              int wraps) {
    const spreading how = SPREAD_QUADS;
    const uint64_t step = s->byte_stride;
    const uint8_t *bits = s->planes + first / 8, *bytes = s->bytes + first;
    const uint64_t stride = s->plane_stride;
    const __m256i half = _mm256_set1_epi8((char)(s->base >> 1));
    for (; n; n -= 32, bits += 4, bytes += 32, out += 128) {
        fetch(bytes, step, 3, bits, stride, planes);
        __m256i lowest = QUADS_FROM(bytes), lower = QUADS_FROM(bytes + step), low, high, plane[8];
        for (int j = 0; j < planes; j++) plane[j] = plane32(bits + (uint64_t)j * stride);
        join(plane, half, QUADS_FROM(bytes + 2 * step), &how, planes, odd, wraps, &low, &high);
        __m256i a = _mm256_unpacklo_epi8(lowest, lower), b = _mm256_unpackhi_epi8(lowest, lower);
        __m256i c = _mm256_unpacklo_epi8(low, high), d = _mm256_unpackhi_epi8(low, high);
        _mm256_store_si256((__m256i *)out, _mm256_unpacklo_epi16(a, c));
        _mm256_store_si256((__m256i *)(out + 32), _mm256_unpackhi_epi16(a, c));
        _mm256_store_si256((__m256i *)(out + 64), _mm256_unpacklo_epi16(b, d));
        _mm256_store_si256((__m256i *)(out + 96), _mm256_unpackhi_epi16(b, d));
    }
}

#define STREAM(KIND)                                                                                              \
    static TARGET void stream_##KIND##_any(const endor_stream *s, uint64_t first, uint64_t n, uint8_t *out) {     \
        if (s->base & 1) stream_##KIND(s, first, n, out, s->bit_planes, 1, 1);                                    \
        else stream_##KIND(s, first, n, out, s->bit_planes, 0, 1);                                                \
    }                                                                                                             \
    static TARGET void stream_##KIND##_of(const endor_stream *s, uint64_t first, uint64_t n, uint8_t *out) {      \
        int planes = s->bit_planes, odd = (int)(s->base & 1);                                                     \
        if (planes > 4 || (s->base + (1u << planes)) > 256) stream_##KIND##_any(s, first, n, out);                \
        else if (planes == 1) odd ? stream_##KIND(s, first, n, out, 1, 1, 0) : stream_##KIND(s, first, n, out, 1, 0, 0); \
        else if (planes == 2) odd ? stream_##KIND(s, first, n, out, 2, 1, 0) : stream_##KIND(s, first, n, out, 2, 0, 0); \
        else if (planes == 3) odd ? stream_##KIND(s, first, n, out, 3, 1, 0) : stream_##KIND(s, first, n, out, 3, 0, 0); \
        else odd ? stream_##KIND(s, first, n, out, 4, 1, 0) : stream_##KIND(s, first, n, out, 4, 0, 0);           \
    }
STREAM(bf16)
STREAM(f32)

/* All of an element but its byte planes lies in one byte here: what each plane adds to it. */
typedef struct {
    __m256i base, field;       /* of the exponent, in place */
    __m256i rest[8], code[8];  /* sign and mantissa bits; code bits */
    int rests, codes;
} weights;

INLINE TARGET weights weights_of(const endor_stream *s) {
    int mantissa = s->mantissa_bits - 8 * s->byte_planes;
    weights w = {.base = _mm256_set1_epi8((char)(s->base << mantissa)),
                 .field = _mm256_set1_epi8((char)(((1u << s->exponent_bits) - 1) << mantissa)),
                 .rests = s->rest_bits - 8 * s->byte_planes,
                 .codes = s->k};
    for (int j = 0; j < w.rests; j++) w.rest[j] = _mm256_set1_epi8((char)(j < mantissa ? 1 << j : 0x80));
    for (int j = 0; j < w.codes; j++) w.code[j] = _mm256_set1_epi8((char)(1 << (mantissa + j)));
    return w;
}

/* The top bytes of 32 or 64 elements. */
INLINE TARGET void top_bytes(const uint8_t *bits, uint64_t stride, const weights *w, const spreading *how, int two,
                             __m256i top[2]) {
    __m256i rest[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, exponent[2] = {w->base, w->base};
    for (int j = 0; j < w->rests; j++, bits += stride) {
        for (int i = 0; i <= two; i++) {
            rest[i] = _mm256_or_si256(rest[i], _mm256_and_si256(spread(bits + 4 * i, how), w->rest[j]));
        }
    }
    for (int j = 0; j < w->codes; j++, bits += stride) {
        for (int i = 0; i <= two; i++) {
            exponent[i] = _mm256_add_epi8(exponent[i], _mm256_and_si256(spread(bits + 4 * i, how), w->code[j]));
        }
    }
    for (int i = 0; i <= two; i++) top[i] = _mm256_or_si256(rest[i], _mm256_and_si256(exponent[i], w->field));
}

INLINE TARGET void store_top(const uint8_t *bytes, __m256i top, int itemsize, uint8_t *out) {
    if (itemsize == 1) {
        _mm256_store_si256((__m256i *)out, top);
    } else {
        __m256i low = PAIRS_FROM(bytes);
        _mm256_store_si256((__m256i *)out, _mm256_unpacklo_epi8(low, top));
        _mm256_store_si256((__m256i *)(out + 32), _mm256_unpackhi_epi8(low, top));
    }
}

/* 8-bit elements, and f16, whose lower byte is in the byte plane. */
INLINE TARGET void stream_tops(const endor_stream *s, uint64_t first, uint64_t n, uint8_t *out, int itemsize) {
    const spreading how = itemsize == 1 ? SPREAD_BYTES : SPREAD_PAIRS;
    const weights w = weights_of(s);
    const uint64_t stride = s->plane_stride;
    const uint8_t *bits = s->planes + first / 8, *bytes = s->bytes + first;
    __m256i top[2];
    for (; n >= 64; n -= 64, bits += 8, bytes += 64, out += 64 * itemsize) {
        fetch(bytes, 0, itemsize == 2, bits, stride, w.rests + w.codes);
        top_bytes(bits, stride, &w, &how, 1, top);
        store_top(bytes, top[0], itemsize, out);
        store_top(bytes + 32, top[1], itemsize, out + 32 * itemsize);
    }
    if (n) {
        top_bytes(bits, stride, &w, &how, 0, top);
        store_top(bytes, top[0], itemsize, out);
    }
}

static TARGET void stream_byte(const endor_stream *s, uint64_t first, uint64_t n, uint8_t *out) {
    stream_tops(s, first, n, out, 1);
}

static TARGET void stream_f16(const endor_stream *s, uint64_t first, uint64_t n, uint8_t *out) {
    stream_tops(s, first, n, out, 2);
}

void endor_avx2_stream(const endor_stream *s, uint64_t first, uint64_t n, void *buf) {
    if (s->itemsize == 1) stream_byte(s, first, n, buf);
    else if (s->itemsize == 4) stream_f32_of(s, first, n, buf);
    else if (s->exponent_bits != 8) stream_f16(s, first, n, buf);
    else stream_bf16_of(s, first, n, buf);
}

#endif
