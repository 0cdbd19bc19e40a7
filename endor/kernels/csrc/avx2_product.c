/* AVX2 products: of elements in memory, and of values placed by their bitmap. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx2.h"

INLINE TARGET __m256 floats_of(const uint8_t *w, uint64_t i, int kind) {
    if (kind == ENDOR_X_F32) return _mm256_loadu_ps((const float *)(w + 4 * i));
    __m128i x = load128(w + 2 * i);
    if (kind == ENDOR_X_F16) return _mm256_cvtph_ps(x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

INLINE TARGET void dot_of(const uint8_t *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc, int kind) {
    uint64_t whole = len / 16 * 16, itemsize = kind == ENDOR_X_F32 ? 4 : 2;
    for (int b0 = 0; b0 < x->batch; b0 += 4) { /* eight sums fit the registers */
        int batch = x->batch - b0 < 4 ? x->batch - b0 : 4;
        const float *row[4];
        __m256 sum[4][2];
        for (int b = 0; b < 4; b++) {
            int at = b0 + (b < batch ? b : 0);
            row[b] = (const float *)x->x + (uint64_t)at * x->stride + column;
            sum[b][0] = _mm256_loadu_ps(acc + 16 * at);
            sum[b][1] = _mm256_loadu_ps(acc + 16 * at + 8);
        }
        if (batch == 1) {
            for (uint64_t i = 0; i < whole; i += 16) {
                sum[0][0] = _mm256_fmadd_ps(floats_of(w, i, kind), _mm256_loadu_ps(row[0] + i), sum[0][0]);
                sum[0][1] = _mm256_fmadd_ps(floats_of(w, i + 8, kind), _mm256_loadu_ps(row[0] + i + 8), sum[0][1]);
            }
        } else {
            for (uint64_t i = 0; i < whole; i += 16) {
                __m256 w0 = floats_of(w, i, kind), w1 = floats_of(w, i + 8, kind);
                for (int b = 0; b < 4; b++) {
                    sum[b][0] = _mm256_fmadd_ps(w0, _mm256_loadu_ps(row[b] + i), sum[b][0]);
                    sum[b][1] = _mm256_fmadd_ps(w1, _mm256_loadu_ps(row[b] + i + 8), sum[b][1]);
                }
            }
        }
        for (int b = 0; b < batch; b++) {
            _mm256_storeu_ps(acc + 16 * (b0 + b), sum[b][0]);
            _mm256_storeu_ps(acc + 16 * (b0 + b) + 8, sum[b][1]);
        }
    }
    if (whole < len) endor_scalar_ops()->dot(w + whole * itemsize, x, column + whole, len - whole, acc);
}

TARGET void endor_avx2_dot(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) {
    if (x->weight == ENDOR_X_BF16) dot_of(w, x, column, len, acc, ENDOR_X_BF16);
    else if (x->weight == ENDOR_X_F16) dot_of(w, x, column, len, acc, ENDOR_X_F16);
    else dot_of(w, x, column, len, acc, ENDOR_X_F32);
}

/* Eight weights as floats, placed by the bits m. */
INLINE TARGET __m256 place(const uint8_t *v, uint32_t m, int kind) {
    if (kind == ENDOR_X_BF16) {
        __m256i both = _mm256_broadcastsi128_si256(load128(v));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, load256(endor_avx2_tables.place_bf16[m])));
    }
    if (kind == ENDOR_X_F16) return _mm256_cvtph_ps(_mm_shuffle_epi8(load128(v), load128(endor_avx2_tables.place16[m])));
    __m256i index = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)endor_avx2_tables.place[m]));
    __m256i x = _mm256_permutevar8x32_epi32(load256(v), index);
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srai_epi32(index, 31), x));
}

INLINE TARGET float total(__m256 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

/* Sums of a row: enough that additions need not wait for each other, few enough for the registers. */
#define SUMS(batch) ((batch) == 1 ? 4 : (batch) == 2 ? 2 : 1)

INLINE TARGET uint64_t rows_of(endor_run *run, const endor_span *span, const endor_operand *x, int kind, int batch) {
    const uint64_t itemsize = kind == ENDOR_X_F32 ? 4 : 2;
    const uint8_t *v = run->values, *bitmap = run->bitmap;
    const float *xs = (const float *)x->x + span->column;
    uint64_t row = 0;
    for (; row < span->rows; row++) {
        __m256 sum[8][4];
        if (span->end && (uint64_t)(span->end - v) < itemsize * span->columns + ENDOR_SLACK) break;
        for (int b = 0; b < batch; b++) {
            for (int i = 0; i < SUMS(batch); i++) {
                sum[b][i] = span->begins ? _mm256_setzero_ps() : _mm256_loadu_ps(run->sums + 32 * b + 8 * i);
            }
        }
        for (uint64_t k = 0; k < span->columns; k += 64) {
            uint64_t bits = load64(bitmap + k / 8);
            _mm_prefetch((const char *)v + 1024, _MM_HINT_T0);
#pragma GCC unroll 8
            for (uint64_t i = 0; i < 8; i++) {
                uint32_t m = (uint8_t)(bits >> 8 * i);
                __m256 w = place(v, m, kind);
                v += itemsize * count(m);
                for (int b = 0; b < batch; b++) {
                    __m256 at = _mm256_loadu_ps(xs + (uint64_t)b * x->stride + k + 8 * i);
                    sum[b][i % SUMS(batch)] = _mm256_fmadd_ps(w, at, sum[b][i % SUMS(batch)]);
                }
            }
        }
        bitmap += span->columns / 8;
        for (int b = 0; b < batch; b++) {
            if (span->finishes && b >= x->batch) break;
            if (!span->finishes) {
                for (int i = 0; i < SUMS(batch); i++) _mm256_storeu_ps(run->sums + 32 * b + 8 * i, sum[b][i]);
                continue;
            }
            __m256 all = sum[b][0];
            if (SUMS(batch) == 4) all = _mm256_add_ps(_mm256_add_ps(all, sum[b][2]), _mm256_add_ps(sum[b][1], sum[b][3]));
            if (SUMS(batch) == 2) all = _mm256_add_ps(all, sum[b][1]);
            run->out[(uint64_t)b * span->out_stride + row] = total(all);
        }
    }
    run->values = v, run->bitmap = bitmap;
    if (span->finishes) run->out += row;
    return row;
}

#define ROWS(KIND)                                                                                                \
    static TARGET uint64_t rows_##KIND(endor_run *run, const endor_span *span, const endor_operand *x) {          \
        if (x->batch == 1) return rows_of(run, span, x, ENDOR_X_##KIND, 1);                                       \
        if (x->batch == 2) return rows_of(run, span, x, ENDOR_X_##KIND, 2);                                       \
        if (x->batch <= 4) return rows_of(run, span, x, ENDOR_X_##KIND, 4);                                       \
        return rows_of(run, span, x, ENDOR_X_##KIND, 8);                                                          \
    }
ROWS(BF16)
ROWS(F16)
ROWS(F32)

uint64_t endor_avx2_rows(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x) {
    (void)n_runs;
    if (x->weight == ENDOR_X_BF16) return rows_BF16(runs, span, x);
    if (x->weight == ENDOR_X_F16) return rows_F16(runs, span, x);
    return rows_F32(runs, span, x);
}

int endor_avx2_row_runs(const endor_operand *x, int exp) {
    (void)x, (void)exp;
    return 1;
}

TARGET uint64_t endor_avx2_popcount(const uint8_t *bitmap, uint64_t words) {
    uint64_t total = 0;
    for (uint64_t i = 0; i < words; i++) total += count(load64(bitmap + 8 * i));
    return total;
}

#endif
