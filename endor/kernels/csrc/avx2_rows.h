/* What products of rows in lockstep share: weights placed by their bits as floats, and the sums of 64 columns. */
#ifndef ENDOR_AVX2_ROWS_H
#define ENDOR_AVX2_ROWS_H

#include "avx2.h"

#define PREFETCH 2048 /* bytes of values ahead */

INLINE TARGET __m256 floats_of(const uint8_t *w, uint64_t i, int kind) {
    if (kind == ENDOR_X_F32) return _mm256_loadu_ps((const float *)(w + 4 * i));
    __m128i x = load128(w + 2 * i);
    if (kind == ENDOR_X_F16) return _mm256_cvtph_ps(x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

/* Bytes of an entry of the controls, as a shift. */
INLINE int entry_shift(int kind) { return kind == ENDOR_X_BF16 ? 5 : kind == ENDOR_X_F16 ? 4 : 3; }

/* Eight weights as floats. */
INLINE TARGET __m256 place(const uint8_t *v, uint64_t entry, int kind) {
    if (kind == ENDOR_X_F32) return _mm256_castsi256_ps(placed32(v, entry));
    if (kind == ENDOR_X_F16) return _mm256_cvtph_ps(_mm_shuffle_epi8(load128(v), place16(entry)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(v)), place_bf16(entry)));
}

INLINE TARGET float total(__m256 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

/* As many runs as keep all sums in registers, and sums of a row, which must not depend on the number of runs. */
#define RUNS(batch) ((batch) <= 4 ? 2 : 1)
#define SUMS(batch) ((batch) == 1 ? 4 : 1)

typedef struct {
    const uint8_t *values[ENDOR_MAX_RUNS], *bitmap[ENDOR_MAX_RUNS];
    __m256 sum[ENDOR_MAX_RUNS][ENDOR_MAX_BATCH][4];
} lanes;

INLINE TARGET void begin_row(lanes *l, const endor_run *runs, const endor_span *span, int n_runs, int batch) {
    for (int r = 0; r < n_runs; r++) {
        for (int b = 0; b < batch; b++) {
            for (int i = 0; i < SUMS(batch); i++) {
                l->sum[r][b][i] = span->begins ? _mm256_setzero_ps() : _mm256_load_ps(runs[r].sums + 32 * b + 8 * i);
            }
        }
    }
}

INLINE TARGET void end_row(const lanes *l, endor_run *runs, const endor_span *span, const endor_operand *x, uint64_t row,
                           int n_runs, int batch) {
    for (int r = 0; r < n_runs; r++) {
        for (int b = 0; b < batch; b++) {
            if (span->finishes && b >= x->batch) break;
            if (span->finishes) {
                __m256 all = l->sum[r][b][0];
                for (int i = 1; i < SUMS(batch); i++) all = _mm256_add_ps(all, l->sum[r][b][i]);
                runs[r].out[(uint64_t)b * span->out_stride + row] = total(all);
            } else {
                for (int i = 0; i < SUMS(batch); i++) _mm256_store_ps(runs[r].sums + 32 * b + 8 * i, l->sum[r][b][i]);
            }
        }
    }
}

/* 64 columns of all runs, the bits of which are at `byte` of the bitmap. */
INLINE TARGET void step(lanes *l, const float *xs, uint64_t stride, uint64_t byte, int kind, int n_runs, int batch,
                        int placed, int direct) {
    const uint64_t itemsize = kind == ENDOR_X_F32 ? 4 : 2;
    uint64_t word[ENDOR_MAX_RUNS], used[ENDOR_MAX_RUNS] = {0};
    for (int r = 0; r < n_runs; r++) {
        if (placed) word[r] = load64(l->bitmap[r] + byte);
        if (direct) _mm_prefetch((const char *)l->values[r] + PREFETCH, _MM_HINT_T0);
    }
    __m256i pair[ENDOR_MAX_RUNS];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m256 w[ENDOR_MAX_RUNS];
        for (int r = 0; r < n_runs; r++) {
            if (placed) {
                uint64_t m = entry(word[r], i, entry_shift(kind));
                w[r] = place(l->values[r] + itemsize * used[r], m, kind);
                used[r] += count(m);
            } else if (kind == ENDOR_X_BF16) { /* x is arranged: each second weight is the upper half of a float already */
                if (i % 2 == 0) pair[r] = load256(l->values[r] + 16 * i);
                __m256i half = i % 2 ? _mm256_and_si256(pair[r], _mm256_set1_epi32((int)0xffff0000))
                                     : _mm256_slli_epi32(pair[r], 16);
                w[r] = _mm256_castsi256_ps(half);
            } else {
                w[r] = floats_of(l->values[r], 8 * (uint64_t)i, kind);
            }
        }
        for (int b = 0; b < batch; b++) {
            __m256 at = _mm256_load_ps(xs + (uint64_t)b * stride + 8 * i);
            for (int r = 0; r < n_runs; r++) {
                l->sum[r][b][i % SUMS(batch)] = _mm256_fmadd_ps(w[r], at, l->sum[r][b][i % SUMS(batch)]);
            }
        }
    }
    for (int r = 0; r < n_runs; r++) l->values[r] += itemsize * (placed ? used[r] : 64);
}

#endif
