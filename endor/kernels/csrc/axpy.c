/* out[0:len] += h[i] * w[i][0:len], one row i after the other, in float, w[i] being elements of a matrix: what a product adds
 * of some rows of the transposed weight, out being loaded and stored once for all of them. Each addition is one fused
 * multiply-add (scalar: as the compiler makes it) wherever the call begins, so that a sum does not depend on how rows are
 * cut and grouped. */
#include "endor.h"

#define ROWS(TYPE, LOAD, STORE, BROADCAST, ADD, WEIGHTS, STEP)                                                         \
    TYPE factors[ENDOR_AXPY_ROWS];                                                                                     \
    for (int j = 0; j < n; j++) factors[j] = BROADCAST(h[j]);                                                          \
    uint64_t i = 0;                                                                                                    \
    for (; i + STEP <= len; i += STEP) {                                                                               \
        TYPE sum = LOAD(out + i);                                                                                      \
        for (int j = 0; j < n; j++) sum = ADD(factors[j], WEIGHTS(w[j] + size * i, kind), sum);                        \
        STORE(out + i, sum);                                                                                           \
    }                                                                                                                  \
    if (i == len) return;

#define KINDS(NAME, TARGET)                                                                                            \
    ENDOR_INLINE TARGET void NAME##_of(const uint8_t *const *w, int kind, uint64_t len, const float *h, int n, float *out) { \
        if (n == 4) NAME##_rows(w, kind, len, h, 4, out);                                                              \
        else if (n == 3) NAME##_rows(w, kind, len, h, 3, out);                                                         \
        else if (n == 2) NAME##_rows(w, kind, len, h, 2, out);                                                         \
        else NAME##_rows(w, kind, len, h, 1, out);                                                                     \
    }                                                                                                                  \
    static TARGET void NAME(const uint8_t *const *w, int kind, uint64_t len, const float *h, int n, float *out) {      \
        if (kind == ENDOR_X_BF16) NAME##_of(w, ENDOR_X_BF16, len, h, n, out);                                          \
        else if (kind == ENDOR_X_F16) NAME##_of(w, ENDOR_X_F16, len, h, n, out);                                       \
        else NAME##_of(w, ENDOR_X_F32, len, h, n, out);                                                                \
    }

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET2 __attribute__((target("avx2,fma,f16c")))
#define TARGET5 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))

ENDOR_INLINE TARGET2 __m256 eight_of(const uint8_t *w, int kind) {
    if (kind == ENDOR_X_F32) return _mm256_loadu_ps((const float *)w);
    __m128i x = _mm_loadu_si128((const __m128i *)w);
    if (kind == ENDOR_X_F16) return _mm256_cvtph_ps(x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

/* w is readable ENDOR_SLACK bytes past its end. */
ENDOR_INLINE TARGET2 void axpy2_rows(const uint8_t *const *w, int kind, uint64_t len, const float *h, const int n,
                                     float *out) {
    const uint64_t size = kind == ENDOR_X_F32 ? 4 : 2;
    ROWS(__m256, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps, eight_of, 8)
    const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(len - i)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256 sum = _mm256_maskload_ps(out + i, lanes);
    for (int j = 0; j < n; j++) sum = _mm256_fmadd_ps(factors[j], eight_of(w[j] + size * i, kind), sum);
    _mm256_maskstore_ps(out + i, lanes, sum);
}

KINDS(axpy2, TARGET2)

ENDOR_INLINE TARGET5 __m512 sixteen_of(const uint8_t *w, int kind) {
    if (kind == ENDOR_X_F32) return _mm512_loadu_ps(w);
    __m256i x = _mm256_loadu_si256((const __m256i *)w);
    if (kind == ENDOR_X_F16) return _mm512_cvtph_ps(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

ENDOR_INLINE TARGET5 void axpy5_rows(const uint8_t *const *w, int kind, uint64_t len, const float *h, const int n,
                                     float *out) {
    const uint64_t size = kind == ENDOR_X_F32 ? 4 : 2;
    ROWS(__m512, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps, sixteen_of, 16)
    const __mmask16 lanes = (__mmask16)((1u << (len - i)) - 1);
    __m512 sum = _mm512_maskz_loadu_ps(lanes, out + i);
    for (int j = 0; j < n; j++) sum = _mm512_fmadd_ps(factors[j], sixteen_of(w[j] + size * i, kind), sum);
    _mm512_mask_storeu_ps(out + i, lanes, sum);
}

KINDS(axpy5, TARGET5)
#endif

#if defined(__aarch64__)
#include <arm_neon.h>

ENDOR_INLINE float32x4_t four_of(const uint8_t *w, int kind) {
    if (kind == ENDOR_X_F32) return vreinterpretq_f32_u8(vld1q_u8(w));
    uint16x4_t x = vreinterpret_u16_u8(vld1_u8(w));
    if (kind == ENDOR_X_F16) return vcvt_f32_f16(vreinterpret_f16_u16(x));
    return vreinterpretq_f32_u32(vshll_n_u16(x, 16));
}

ENDOR_INLINE float32x4_t fused(float32x4_t factor, float32x4_t weights, float32x4_t sum) {
    return vfmaq_f32(sum, factor, weights);
}

#define PLAIN

ENDOR_INLINE void axpy_neon_rows(const uint8_t *const *w, int kind, uint64_t len, const float *h, const int n, float *out) {
    const uint64_t size = kind == ENDOR_X_F32 ? 4 : 2;
    ROWS(float32x4_t, vld1q_f32, vst1q_f32, vdupq_n_f32, fused, four_of, 4)
    float rest[4] = {0};
    memcpy(rest, out + i, (len - i) * sizeof *rest);
    float32x4_t sum = vld1q_f32(rest);
    for (int j = 0; j < n; j++) sum = fused(factors[j], four_of(w[j] + size * i, kind), sum);
    vst1q_f32(rest, sum);
    memcpy(out + i, rest, (len - i) * sizeof *rest);
}

KINDS(axpy_neon, PLAIN)
#endif

static void axpy(const uint8_t *const *w, int kind, uint64_t len, const float *h, int n, float *out) {
    for (int j = 0; j < n; j++) {
        for (uint64_t i = 0; i < len; i++) {
            float x;
            uint32_t bits = kind == ENDOR_X_F32 ? load32(w[j] + 4 * i) : (uint32_t)load16(w[j] + 2 * i) << 16;
            memcpy(&x, &bits, 4);
            if (kind == ENDOR_X_F16) x = endor_half(load16(w[j] + 2 * i));
            out[i] += h[j] * x;
        }
    }
}

endor_axpy endor_axpy_of(int kernel) {
#if defined(__x86_64__)
    if (kernel == ENDOR_AVX2) return axpy2;
    if (kernel == ENDOR_AVX512) return axpy5;
#elif defined(__aarch64__)
    if (kernel == ENDOR_NEON) return axpy_neon;
#endif
    return axpy;
}
