/* AVX-512: products of elements in memory, and of raw values by their bitmap. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx512_rows.h"

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

void endor_avx512_dot(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) {
    if (x->bf16_pairs) dot_PAIRS(w, x, column, len, acc);
    else if (x->weight == ENDOR_X_BF16) dot_BF16(w, x, column, len, acc);
    else if (x->weight == ENDOR_X_F16) dot_F16(w, x, column, len, acc);
    else dot_F32(w, x, column, len, acc);
}

/* Rows straight to sums: the weights exist in registers only. */

INLINE int past_end(const lanes *l, const endor_span *span, uint64_t itemsize, int n_runs) {
    for (int r = 0; r < n_runs; r++) {
        if ((uint64_t)(span->end - l->values[r]) < itemsize * span->columns + ENDOR_SLACK) return 1;
    }
    return 0;
}

/* 64 columns of one row of each run, both operands bf16. */
INLINE TARGET_BF16 void step_pairs(lanes *l, const uint16_t *xs, const endor_operand *x, uint64_t k, int n_runs, int batch,
                                   int direct) {
    __m512i w[ENDOR_MAX_RUNS][2];
    for (int r = 0; r < n_runs; r++) {
        const uint16_t *v = (const uint16_t *)l->values[r];
        uint64_t m = load64(l->bitmap[r] + k / 8);
        if (direct) _mm_prefetch((const char *)v + PREFETCH, _MM_HINT_T1);
        w[r][0] = expand_w((uint32_t)m, load(v));
        w[r][1] = expand_w((uint32_t)(m >> 32), load(v + count((uint32_t)m)));
        l->values[r] = (const uint8_t *)(v + count(m));
    }
    for (int b = 0; b < batch; b++) {
        const uint16_t *at = xs + (uint64_t)b * x->stride + k;
        __m512bh x0 = (__m512bh)_mm512_loadu_si512(at), x1 = (__m512bh)_mm512_loadu_si512(at + 32);
        for (int r = 0; r < n_runs; r++) {
            l->sum[r][b][0] = _mm512_dpbf16_ps(l->sum[r][b][0], (__m512bh)w[r][0], x0);
            l->sum[r][b][SUMS(batch) - 1] = _mm512_dpbf16_ps(l->sum[r][b][SUMS(batch) - 1], (__m512bh)w[r][1], x1);
        }
    }
}

INLINE TARGET __m512 half_of(__m512i w, int half, int kind) {
    if (kind == ENDOR_X_F32) return _mm512_castsi512_ps(w);
    __m256i x = half ? _mm512_extracti64x4_epi64(w, 1) : _mm512_castsi512_si256(w);
    if (kind == ENDOR_X_F16) return _mm512_cvtph_ps(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

/* 32 columns, in float. */
INLINE TARGET void step_floats(lanes *l, const float *xs, const endor_operand *x, uint64_t k, int kind, int n_runs,
                               int batch, int direct) {
    __m512 w[ENDOR_MAX_RUNS][2];
    for (int r = 0; r < n_runs; r++) {
        const uint8_t *v = l->values[r];
        uint32_t m = load32(l->bitmap[r] + k / 8);
        if (direct) _mm_prefetch((const char *)v + PREFETCH, _MM_HINT_T1);
        if (kind == ENDOR_X_F32) {
            w[r][0] = _mm512_castsi512_ps(expand_d((uint16_t)m, load(v)));
            w[r][1] = _mm512_castsi512_ps(expand_d((uint16_t)(m >> 16), load(v + 4 * count((uint16_t)m))));
        } else {
            __m512i both = expand_w(m, load(v));
            w[r][0] = half_of(both, 0, kind), w[r][1] = half_of(both, 1, kind);
        }
        l->values[r] = v + (kind == ENDOR_X_F32 ? 4 : 2) * count(m);
    }
    for (int b = 0; b < batch; b++) {
        const float *at = xs + (uint64_t)b * x->stride + k;
        __m512 x0 = _mm512_loadu_ps(at), x1 = _mm512_loadu_ps(at + 16);
        for (int r = 0; r < n_runs; r++) {
            l->sum[r][b][0] = _mm512_fmadd_ps(w[r][0], x0, l->sum[r][b][0]);
            l->sum[r][b][SUMS(batch) - 1] = _mm512_fmadd_ps(w[r][1], x1, l->sum[r][b][SUMS(batch) - 1]);
        }
    }
}

/* The loop of all kinds of rows: ONE_BLOCK multiplies columns [k, stop) by steps. */
#define ROWS_BODY(ITEMSIZE, STEPS)                                                                                \
    lanes l;                                                                                                      \
    uint64_t row = 0;                                                                                             \
    for (int r = 0; r < n_runs; r++) l.values[r] = runs[r].values, l.bitmap[r] = runs[r].bitmap;                  \
    for (; row < span->rows; row++) {                                                                             \
        if (direct && past_end(&l, span, ITEMSIZE, n_runs)) break;                                                \
        begin_row(&l, runs, span, n_runs, batch);                                                                 \
        for (uint64_t k = 0; k < span->columns;) {                                                                \
            uint64_t stop = min64(k + 512, span->columns); /* whose bits fill a cache line */                     \
            if (direct) {                                                                                         \
                for (int r = 0; r < n_runs; r++) {                                                                \
                    _mm_prefetch((const char *)l.bitmap[r] + k / 8 + PREFETCH / 4, _MM_HINT_T1);                  \
                }                                                                                                 \
            }                                                                                                     \
            STEPS                                                                                                 \
        }                                                                                                         \
        end_row(&l, runs, span, x, row, n_runs, batch);                                                              \
    }                                                                                                             \
    for (int r = 0; r < n_runs; r++) {                                                                            \
        runs[r].values = l.values[r], runs[r].bitmap = l.bitmap[r];                                               \
        if (span->finishes) runs[r].out += row;                                                                   \
    }                                                                                                             \
    return row;

INLINE TARGET_BF16 uint64_t rows_pairs(endor_run *runs, const endor_span *span, const endor_operand *x, int n_runs,
                                       int batch, int direct) {
    const uint16_t *xs = (const uint16_t *)x->x + span->column;
    ROWS_BODY(2, for (; k < stop; k += 64) step_pairs(&l, xs, x, k, n_runs, batch, direct);)
}

INLINE TARGET uint64_t rows_floats(endor_run *runs, const endor_span *span, const endor_operand *x, int n_runs, int batch,
                                   int direct, int kind) {
    const float *xs = (const float *)x->x + span->column;
    ROWS_BODY(kind == ENDOR_X_F32 ? 4 : 2,
              for (; k < stop; k += 32) step_floats(&l, xs, x, k, kind, n_runs, batch, direct);)
}

int endor_avx512_row_runs(const endor_operand *x, endor_way way) {
    return way == ENDOR_EXP_IN_PLACE ? EXP_RUNS : RUNS(x->batch);
}

#define ROWS(KIND, CALL_TARGET)                                                                                   \
    static CALL_TARGET uint64_t rows_##KIND(endor_run *runs, int n_runs, const endor_span *span,                  \
                                            const endor_operand *x) {                                             \
        if (n_runs == 1) BATCHES(ONE_##KIND)                                                                      \
        if (span->end) BATCHES(DIRECT_##KIND) else BATCHES(BUFFER_##KIND)                                         \
    }
#define ONE_PAIRS(B) return rows_pairs(runs, span, x, 1, B, span->end != NULL)
#define DIRECT_PAIRS(B) return rows_pairs(runs, span, x, RUNS(B), B, 1)
#define BUFFER_PAIRS(B) return rows_pairs(runs, span, x, RUNS(B), B, 0)
#define ONE_BF16(B) return rows_floats(runs, span, x, 1, B, span->end != NULL, ENDOR_X_BF16)
#define DIRECT_BF16(B) return rows_floats(runs, span, x, RUNS(B), B, 1, ENDOR_X_BF16)
#define BUFFER_BF16(B) return rows_floats(runs, span, x, RUNS(B), B, 0, ENDOR_X_BF16)
#define ONE_F16(B) return rows_floats(runs, span, x, 1, B, span->end != NULL, ENDOR_X_F16)
#define DIRECT_F16(B) return rows_floats(runs, span, x, RUNS(B), B, 1, ENDOR_X_F16)
#define BUFFER_F16(B) return rows_floats(runs, span, x, RUNS(B), B, 0, ENDOR_X_F16)
#define ONE_F32(B) return rows_floats(runs, span, x, 1, B, span->end != NULL, ENDOR_X_F32)
#define DIRECT_F32(B) return rows_floats(runs, span, x, RUNS(B), B, 1, ENDOR_X_F32)
#define BUFFER_F32(B) return rows_floats(runs, span, x, RUNS(B), B, 0, ENDOR_X_F32)
ROWS(PAIRS, TARGET_BF16)
ROWS(BF16, TARGET)
ROWS(F16, TARGET)
ROWS(F32, TARGET)

uint64_t endor_avx512_rows(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x) {
    if (x->bf16_pairs) return rows_PAIRS(runs, n_runs, span, x);
    if (x->weight == ENDOR_X_BF16) return rows_BF16(runs, n_runs, span, x);
    if (x->weight == ENDOR_X_F16) return rows_F16(runs, n_runs, span, x);
    return rows_F32(runs, n_runs, span, x);
}

TARGET uint64_t endor_avx512_popcount(const uint8_t *bitmap, uint64_t words) {
    __m512i sum = _mm512_setzero_si512();
    uint64_t i = 0;
    for (; i + 8 <= words; i += 8) sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_loadu_si512(bitmap + 8 * i)));
    if (i < words) {
        __m512i rest = _mm512_maskz_loadu_epi64((__mmask8)((1u << (words - i)) - 1), bitmap + 8 * i);
        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(rest));
    }
    return (uint64_t)_mm512_reduce_add_epi64(sum);
}

#endif
