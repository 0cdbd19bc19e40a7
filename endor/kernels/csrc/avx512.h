/* What the AVX-512 sources share. Kernels need F, BW, VL, DQ, VBMI, VBMI2; products of bf16 pairs also BF16.
 *
 * Three habits, each measured against the obvious way:
 * - vpexpand and vpcompress in their register form, after a plain 64-byte load: the memory forms run at half the
 *   speed of DRAM, and compress-to-memory is microcoded on Zen 4. The empty asm in `load` keeps compilers from
 *   folding the load into the memory form.
 * - The destination of vpexpand and vpcompress is zeroed first: Zen 4 and 5 wait for its old value even under {z}.
 * - Non-temporal stores for large outputs: no read for ownership.
 */
#ifndef ENDOR_AVX512_H
#define ENDOR_AVX512_H

#include "endor.h"

#include <immintrin.h>

#define TARGET                                                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vpopcntdq,bmi,bmi2,popcnt")))
#define TARGET_BF16                                                                                               \
    __attribute__((                                                                                               \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vpopcntdq,avx512bf16,bmi,bmi2,popcnt")))
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

INLINE TARGET void store(void *p, __m512i x, int streaming) {
    if (streaming) _mm512_stream_si512(p, x);
    else _mm512_storeu_si512(p, x);
}

INLINE TARGET uint32_t count(uint64_t m) { return (uint32_t)_mm_popcnt_u64(m); }

uint32_t endor_avx512_expand8(const uint8_t *bitmap, const void *values, void *out, int streaming);
uint32_t endor_avx512_expand16(const uint8_t *bitmap, const void *values, void *out, int streaming);
uint32_t endor_avx512_expand32(const uint8_t *bitmap, const void *values, void *out, int streaming);
void endor_avx512_stream(const endor_stream *s, uint64_t word, uint64_t words, void *buf);
uint32_t endor_avx512_scan8(const void *src, uint8_t *bitmap);
uint32_t endor_avx512_scan16(const void *src, uint8_t *bitmap);
uint32_t endor_avx512_scan32(const void *src, uint8_t *bitmap);
uint32_t endor_avx512_compress8(const uint8_t *bitmap, const void *src, void *dst);
void endor_avx512_histogram(const void *src, int itemsize, int exponent_bits, int mantissa_bits, uint32_t *hist);
uint64_t endor_avx512_split(const endor_stream *s, const void *src, endor_slots *slots);
void endor_avx512_split_words(const endor_stream *s, const void *src, int cached, uint64_t word, uint64_t words,
                              uint64_t *outside, uint64_t *counts);
void endor_avx512_dot(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc);
uint64_t endor_avx512_rows(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x);
uint64_t endor_avx512_exp_rows(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x,
                               const endor_tensor *t, const endor_stream *s);
void endor_avx512_arrange(void *x, uint64_t cols, int itemsize);
uint64_t endor_avx512_popcount(const uint8_t *bitmap, uint64_t words);
int endor_avx512_row_runs(const endor_operand *x, endor_way way);

#endif
