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
int endor_avx2_row_runs(const endor_operand *x, int exp);
uint64_t endor_avx2_popcount(const uint8_t *bitmap, uint64_t words);

#endif
