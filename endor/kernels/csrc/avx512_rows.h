/* What products of rows in lockstep share. */
#ifndef ENDOR_AVX512_ROWS_H
#define ENDOR_AVX512_ROWS_H

#include "avx512.h"

/* Compiled for some batches; the others run as the next larger one, on rows of zeros, whose sums nobody stores. */
#define BATCHES(CALL)                                                                                             \
    switch (x->batch) {                                                                                           \
    case 1: CALL(1); break;                                                                                       \
    case 2: CALL(2); break;                                                                                       \
    case 3:                                                                                                       \
    case 4: CALL(4); break;                                                                                       \
    default: CALL(8); break;                                                                                      \
    }

/* As many runs as keep all sums in registers. */
#define RUNS(batch) ((batch) <= 4 ? 4 : 2)
#define EXP_RUNS 2

/* Which sums a weight vector goes to must not depend on the number of runs, or the order of a row's sum would. */
#define SUMS(batch) ((batch) > 2 ? 1 : 2)

typedef struct {
    const uint8_t *values[ENDOR_MAX_RUNS], *bitmap[ENDOR_MAX_RUNS];
    __m512 sum[ENDOR_MAX_RUNS][ENDOR_MAX_BATCH][2];
} lanes;

/* Sums of the runs' next row, as they are before the span. */
INLINE TARGET void begin_row(lanes *l, const endor_run *runs, const endor_span *span, int n_runs, int batch) {
    for (int r = 0; r < n_runs; r++) {
        for (int b = 0; b < batch; b++) {
            for (int i = 0; i < SUMS(batch); i++) {
                l->sum[r][b][i] = span->begins ? _mm512_setzero_ps() : _mm512_load_ps(runs[r].sums + 32 * b + 16 * i);
            }
        }
    }
}

INLINE TARGET void end_row(lanes *l, endor_run *runs, const endor_span *span, const endor_operand *x, uint64_t row,
                           int n_runs, int batch) {
    for (int r = 0; r < n_runs; r++) {
        l->bitmap[r] += span->columns / 8;
        for (int b = 0; b < batch; b++) {
            if (span->finishes && b >= x->batch) break;
            if (span->finishes) {
                __m512 all = SUMS(batch) == 2 ? _mm512_add_ps(l->sum[r][b][0], l->sum[r][b][1]) : l->sum[r][b][0];
                runs[r].out[(uint64_t)b * span->out_stride + row] = _mm512_reduce_add_ps(all);
            } else {
                for (int i = 0; i < SUMS(batch); i++) _mm512_store_ps(runs[r].sums + 32 * b + 16 * i, l->sum[r][b][i]);
            }
        }
    }
}

#endif
