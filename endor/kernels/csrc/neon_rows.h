/* Rows of a weight from the packed form, included by the sources that say how eight weights are multiplied:
 * operand_type is the type of x's elements; MULTIPLY(values, bits, column, pair) takes eight weights, placed by `bits`,
 * times x[b][column : column + 8] into pair[0] and pair[1], for each b below batch. */
#ifndef ENDOR_NEON_ROWS_H
#define ENDOR_NEON_ROWS_H

/* Pairs of sums of a row: enough that additions need not wait for each other, few enough for the 32 registers. */
#define PAIRS(batch) ((batch) == 1 ? 4 : (batch) == 2 ? 2 : 1)

ENDOR_INLINE uint64_t rows_of(endor_run *run, const endor_span *span, const endor_operand *x, int kind, int batch) {
    const uint64_t itemsize = kind == ENDOR_X_F32 ? 4 : 2;
    const uint8_t *v = run->values, *bitmap = run->bitmap;
    const operand_type *xs = (const operand_type *)x->x + span->column;
    uint64_t row = 0;
    for (; row < span->rows; row++) {
        float32x4_t sum[8][8];
        if (span->end && (uint64_t)(span->end - v) < itemsize * span->columns + ENDOR_SLACK) break;
        for (int b = 0; b < batch; b++) {
            for (int i = 0; i < 2 * PAIRS(batch); i++) {
                sum[b][i] = span->begins ? vdupq_n_f32(0) : vld1q_f32(run->sums + 32 * b + 4 * i);
            }
        }
        for (uint64_t k = 0; k < span->columns; k += 64) {
            uint64_t bits = load64(bitmap + k / 8), ranks = neon_ranks(bits);
            __builtin_prefetch(v + 1024);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                MULTIPLY(v + itemsize * neon_before(ranks, i), (uint8_t)(bits >> 8 * i), k + 8 * (uint64_t)i,
                         &sum[b][2 * (i % PAIRS(batch))])
            }
            v += itemsize * (ranks >> 56);
        }
        bitmap += span->columns / 8;
        for (int b = 0; b < batch; b++) {
            if (span->finishes && b >= x->batch) break;
            if (!span->finishes) {
                for (int i = 0; i < 2 * PAIRS(batch); i++) vst1q_f32(run->sums + 32 * b + 4 * i, sum[b][i]);
                continue;
            }
            for (int n = PAIRS(batch); n > 1; n /= 2) {
                for (int i = 0; i < n; i++) sum[b][i] = vaddq_f32(sum[b][i], sum[b][i + n]);
            }
            run->out[(uint64_t)b * span->out_stride + row] = vaddvq_f32(vaddq_f32(sum[b][0], sum[b][1]));
        }
    }
    run->values = v, run->bitmap = bitmap;
    if (span->finishes) run->out += row;
    return row;
}

#define ROWS(NAME, KIND)                                                                                          \
    uint64_t NAME(endor_run *run, const endor_span *span, const endor_operand *x) {                               \
        if (x->batch == 1) return rows_of(run, span, x, KIND, 1);                                                 \
        if (x->batch == 2) return rows_of(run, span, x, KIND, 2);                                                 \
        if (x->batch <= 4) return rows_of(run, span, x, KIND, 4);                                                 \
        return rows_of(run, span, x, KIND, 8);                                                                    \
    }

#endif
