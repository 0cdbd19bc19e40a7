/* What the AVX2 sources share: kernels need AVX2, BMI2, FMA and F16C. */
#ifndef ENDOR_AVX2_H
#define ENDOR_AVX2_H

#include "endor.h"

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,bmi,bmi2,fma,f16c,popcnt")))
#define INLINE static inline __attribute__((always_inline, unused))

/* For eight bitmap bits: where each of eight places finds its element (0x80: nowhere). As bytes, as the two bytes of
 * 16-bit elements, and as the four of floats whose upper half is a bf16. */
typedef struct {
    uint64_t place[256];
    uint8_t place16[256][16], place_bf16[256][32];
} endor_avx2_controls;

extern endor_avx2_controls endor_avx2_tables;

INLINE TARGET __m128i load128(const void *p) { return _mm_loadu_si128(p); }
INLINE TARGET __m256i load256(const void *p) { return _mm256_loadu_si256(p); }
INLINE TARGET uint32_t count(uint64_t m) { return (uint32_t)_mm_popcnt_u64(m); }

/* Eighth i of a word, times an entry of 1 << shift bytes: one rotation, one conjunction, and as many bits as the eighth.
 * Loads bound these kernels on Zen 3, so neither the eighth nor a count comes from memory. */
INLINE uint64_t entry(uint64_t word, int i, int shift) {
    int turn = (8 * i - shift) & 63;
    return (word >> turn | word << (64 - turn)) & (255u << shift);
}

/* Controls by entry. */
INLINE TARGET __m128i place8(uint64_t entry) {
    return _mm_loadl_epi64((const __m128i *)((const uint8_t *)endor_avx2_tables.place + entry));
}
INLINE TARGET __m128i place16(uint64_t entry) {
    return load128(*endor_avx2_tables.place16 + entry);
}
INLINE TARGET __m256i place_bf16(uint64_t entry) {
    return load256(*endor_avx2_tables.place_bf16 + entry);
}

/* Eight 32-bit elements from v on, placed. */
INLINE TARGET __m256i placed32(const void *v, uint64_t entry) {
    __m256i index = _mm256_cvtepi8_epi32(place8(entry)), x = _mm256_permutevar8x32_epi32(load256(v), index);
    return _mm256_andnot_si256(_mm256_srai_epi32(index, 31), x);
}

/* avx2_decode.c */
uint32_t endor_avx2_expand8(const uint8_t *bitmap, const void *values, void *out, int streaming);
uint32_t endor_avx2_expand16(const uint8_t *bitmap, const void *values, void *out, int streaming);
uint32_t endor_avx2_expand32(const uint8_t *bitmap, const void *values, void *out, int streaming);

/* avx2_exp.c */
void endor_avx2_stream(const endor_stream *s, uint64_t first, uint64_t n, void *buf);

/* avx2_encode.c */
void endor_avx2_fill_gather(void);
uint32_t endor_avx2_scan8(const void *src, uint8_t *bitmap);
uint32_t endor_avx2_scan16(const void *src, uint8_t *bitmap);
uint32_t endor_avx2_scan32(const void *src, uint8_t *bitmap);
uint32_t endor_avx2_compress8(const uint8_t *bitmap, const void *src, void *dst);
uint32_t endor_avx2_compress16(const uint8_t *bitmap, const void *src, void *dst);
uint32_t endor_avx2_compress32(const uint8_t *bitmap, const void *src, void *dst);
void endor_avx2_histogram(const void *src, int itemsize, int exponent_bits, int mantissa_bits, uint32_t *hist);
uint64_t endor_avx2_split(const endor_stream *s, const void *src, endor_slots *slots);
void endor_avx2_split_words(const endor_stream *s, const void *src, int cached, uint64_t word, uint64_t words,
                            uint64_t *outside, uint64_t *counts);

/* avx2_product.c */
void endor_avx2_dot(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc);
uint64_t endor_avx2_rows(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x);
int endor_avx2_row_runs(const endor_operand *x, endor_way way);
void endor_avx2_arrange(void *x, uint64_t cols, int itemsize);
uint64_t endor_avx2_popcount(const uint8_t *bitmap, uint64_t words);

#endif
