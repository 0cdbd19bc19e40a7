/* out[0:len] += h * w[0:len], in float, w being elements of a matrix: what a product adds of one row of the transposed
 * weight. Each element of out is one fused multiply-add (scalar: as the compiler makes it) wherever the call begins, so
 * that a sum does not depend on how a row is cut. */
#include "endor.h"

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
ENDOR_INLINE TARGET2 void axpy2_of(const uint8_t *w, int kind, uint64_t len, float h, float *out) {
    const uint64_t size = kind == ENDOR_X_F32 ? 4 : 2;
    const __m256 factor = _mm256_set1_ps(h);
    uint64_t i = 0;
    for (; i + 8 <= len; i += 8) {
        _mm256_storeu_ps(out + i, _mm256_fmadd_ps(factor, eight_of(w + size * i, kind), _mm256_loadu_ps(out + i)));
    }
    if (i == len) return;
    const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(len - i)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256 old = _mm256_maskload_ps(out + i, lanes);
    _mm256_maskstore_ps(out + i, lanes, _mm256_fmadd_ps(factor, eight_of(w + size * i, kind), old));
}

static TARGET2 void axpy2(const uint8_t *w, int kind, uint64_t len, float h, float *out) {
    if (kind == ENDOR_X_BF16) axpy2_of(w, ENDOR_X_BF16, len, h, out);
    else if (kind == ENDOR_X_F16) axpy2_of(w, ENDOR_X_F16, len, h, out);
    else axpy2_of(w, ENDOR_X_F32, len, h, out);
}

ENDOR_INLINE TARGET5 __m512 sixteen_of(const uint8_t *w, int kind) {
    if (kind == ENDOR_X_F32) return _mm512_loadu_ps(w);
    __m256i x = _mm256_loadu_si256((const __m256i *)w);
    if (kind == ENDOR_X_F16) return _mm512_cvtph_ps(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

ENDOR_INLINE TARGET5 void axpy5_of(const uint8_t *w, int kind, uint64_t len, float h, float *out) {
    const uint64_t size = kind == ENDOR_X_F32 ? 4 : 2;
    const __m512 factor = _mm512_set1_ps(h);
    uint64_t i = 0;
    for (; i + 16 <= len; i += 16) {
        _mm512_storeu_ps(out + i, _mm512_fmadd_ps(factor, sixteen_of(w + size * i, kind), _mm512_loadu_ps(out + i)));
    }
    if (i == len) return;
    const __mmask16 lanes = (__mmask16)((1u << (len - i)) - 1);
    const __m512 old = _mm512_maskz_loadu_ps(lanes, out + i);
    _mm512_mask_storeu_ps(out + i, lanes, _mm512_fmadd_ps(factor, sixteen_of(w + size * i, kind), old));
}

static TARGET5 void axpy5(const uint8_t *w, int kind, uint64_t len, float h, float *out) {
    if (kind == ENDOR_X_BF16) axpy5_of(w, ENDOR_X_BF16, len, h, out);
    else if (kind == ENDOR_X_F16) axpy5_of(w, ENDOR_X_F16, len, h, out);
    else axpy5_of(w, ENDOR_X_F32, len, h, out);
}
#endif

#if defined(__aarch64__)
#include <arm_neon.h>

ENDOR_INLINE float32x4_t four_of(const uint8_t *w, int kind) {
    if (kind == ENDOR_X_F32) return vreinterpretq_f32_u8(vld1q_u8(w));
    uint16x4_t x = vreinterpret_u16_u8(vld1_u8(w));
    if (kind == ENDOR_X_F16) return vcvt_f32_f16(vreinterpret_f16_u16(x));
    return vreinterpretq_f32_u32(vshll_n_u16(x, 16));
}

ENDOR_INLINE void axpy_neon_of(const uint8_t *w, int kind, uint64_t len, float h, float *out) {
    const uint64_t size = kind == ENDOR_X_F32 ? 4 : 2;
    const float32x4_t factor = vdupq_n_f32(h);
    uint64_t i = 0;
    for (; i + 4 <= len; i += 4) vst1q_f32(out + i, vfmaq_f32(vld1q_f32(out + i), factor, four_of(w + size * i, kind)));
    if (i == len) return;
    float rest[4] = {0};
    memcpy(rest, out + i, (len - i) * sizeof *rest);
    vst1q_f32(rest, vfmaq_f32(vld1q_f32(rest), factor, four_of(w + size * i, kind)));
    memcpy(out + i, rest, (len - i) * sizeof *rest);
}

static void axpy_neon(const uint8_t *w, int kind, uint64_t len, float h, float *out) {
    if (kind == ENDOR_X_BF16) axpy_neon_of(w, ENDOR_X_BF16, len, h, out);
    else if (kind == ENDOR_X_F16) axpy_neon_of(w, ENDOR_X_F16, len, h, out);
    else axpy_neon_of(w, ENDOR_X_F32, len, h, out);
}
#endif

static void axpy(const uint8_t *w, int kind, uint64_t len, float h, float *out) {
    for (uint64_t i = 0; i < len; i++) {
        float x;
        uint32_t bits = kind == ENDOR_X_F32 ? load32(w + 4 * i) : (uint32_t)load16(w + 2 * i) << 16;
        memcpy(&x, &bits, 4);
        if (kind == ENDOR_X_F16) x = endor_half(load16(w + 2 * i));
        out[i] += h * x;
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
