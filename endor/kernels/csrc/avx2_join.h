/* Bit planes spread over bytes, and the two bytes of 32 bf16 made of them. */
#ifndef ENDOR_AVX2_JOIN_H
#define ENDOR_AVX2_JOIN_H

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

INLINE TARGET __m256i spread(const uint8_t *bits, const spreading *how) {
    __m256i x = _mm256_shuffle_epi8(_mm256_set1_epi32((int)load32(bits)), how->which);
    return _mm256_cmpeq_epi8(_mm256_and_si256(x, how->bit), how->bit);
}

/* bf16, and the upper half of a float: the lower byte is the lowest exponent bit and the mantissa, the upper one the
 * sign and the rest of the exponent. The exponent is base + code: plane 0 alone decides its lowest bit; above stand half
 * the base, a carry where the base is odd, and the other planes. `wraps`: the sum may pass the largest exponent. */
INLINE TARGET void join(const uint8_t *bits, uint64_t stride, __m256i half, __m256i rest, const spreading *how,
                        int planes, int odd, int wraps, __m256i *low, __m256i *high) {
    const __m256i seven = _mm256_set1_epi8(0x7f), top = _mm256_set1_epi8((char)0x80);
    __m256i lowest = spread(bits, how);
    __m256i bit = odd ? _mm256_andnot_si256(lowest, top) : _mm256_and_si256(lowest, top);
    *low = _mm256_or_si256(_mm256_and_si256(rest, seven), bit);
    if (odd) half = _mm256_sub_epi8(half, lowest);
    for (int j = 1; j < planes; j++) {
        __m256i m = spread(bits + (uint64_t)j * stride, how);
        if (j == 1) half = _mm256_sub_epi8(half, m);
        else half = _mm256_add_epi8(half, _mm256_and_si256(m, _mm256_set1_epi8((char)(1 << (j - 1)))));
    }
    if (wraps) half = _mm256_and_si256(half, seven);
    *high = _mm256_or_si256(_mm256_and_si256(rest, top), half);
}

/* Elements in order from the bytes that `join` made, SPREAD_PAIRS being how. */
INLINE TARGET void store_pairs(uint8_t *out, __m256i low, __m256i high) {
    _mm256_store_si256((__m256i *)out, _mm256_unpacklo_epi8(low, high));
    _mm256_store_si256((__m256i *)(out + 32), _mm256_unpackhi_epi8(low, high));
}

#endif
