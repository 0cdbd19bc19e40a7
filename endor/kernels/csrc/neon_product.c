/* NEON products: of elements in memory, and of values placed by their bitmap. */
#include "endor.h"

#if defined(__aarch64__)
#include "neon.h"

#define tables endor_neon_tables

typedef struct {
    float32x4_t low, high;
} eight;

/* Eight 16-bit weights as floats. */
ENDOR_INLINE eight eight_of(uint8x16_t x, int kind) {
    eight out;
    if (kind == ENDOR_X_F16) {
        float16x8_t half = vreinterpretq_f16_u8(x);
        out.low = vcvt_f32_f16(vget_low_f16(half));
        out.high = vcvt_high_f32_f16(half);
    } else {
        const uint16x8_t zero = vdupq_n_u16(0);
        out.low = vreinterpretq_f32_u16(vzip1q_u16(zero, vreinterpretq_u16_u8(x)));
        out.high = vreinterpretq_f32_u16(vzip2q_u16(zero, vreinterpretq_u16_u8(x)));
    }
    return out;
}

/* Eight weights from element i of w on. */
ENDOR_INLINE eight load_eight(const uint8_t *w, uint64_t i, int kind) {
    if (kind != ENDOR_X_F32) return eight_of(vld1q_u8(w + 2 * i), kind);
    eight out = {vreinterpretq_f32_u8(vld1q_u8(w + 4 * i)), vreinterpretq_f32_u8(vld1q_u8(w + 4 * i + 16))};
    return out;
}

ENDOR_INLINE void dot_of(const uint8_t *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc, int kind) {
    uint64_t whole = len / 16 * 16, itemsize = kind == ENDOR_X_F32 ? 4 : 2;
    for (int b0 = 0; b0 < x->batch; b0 += 4) { /* sixteen sums fit the registers */
        int batch = x->batch - b0 < 4 ? x->batch - b0 : 4;
        const float *row[4];
        float32x4_t sum[4][4];
        for (int b = 0; b < 4; b++) {
            int at = b0 + (b < batch ? b : 0);
            row[b] = (const float *)x->x + (uint64_t)at * x->stride + column;
            for (int i = 0; i < 4; i++) sum[b][i] = vld1q_f32(acc + 16 * at + 4 * i);
        }
        for (uint64_t i = 0; i < whole; i += 16) {
            eight a = load_eight(w, i, kind), c = load_eight(w, i + 8, kind);
            for (int b = 0; b < (batch == 1 ? 1 : 4); b++) {
                sum[b][0] = vfmaq_f32(sum[b][0], a.low, vld1q_f32(row[b] + i));
                sum[b][1] = vfmaq_f32(sum[b][1], a.high, vld1q_f32(row[b] + i + 4));
                sum[b][2] = vfmaq_f32(sum[b][2], c.low, vld1q_f32(row[b] + i + 8));
                sum[b][3] = vfmaq_f32(sum[b][3], c.high, vld1q_f32(row[b] + i + 12));
            }
        }
        for (int b = 0; b < batch; b++) {
            for (int i = 0; i < 4; i++) vst1q_f32(acc + 16 * (b0 + b) + 4 * i, sum[b][i]);
        }
    }
    if (whole < len) endor_scalar_ops()->dot(w + whole * itemsize, x, column + whole, len - whole, acc);
}

void endor_neon_dot(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) {
    if (x->bf16_pairs) endor_neon_dot_pairs(w, x, column, len, acc);
    else if (x->weight == ENDOR_X_BF16) dot_of(w, x, column, len, acc, ENDOR_X_BF16);
    else if (x->weight == ENDOR_X_F16) dot_of(w, x, column, len, acc, ENDOR_X_F16);
    else dot_of(w, x, column, len, acc, ENDOR_X_F32);
}

/* Eight weights placed by the bits m. */
ENDOR_INLINE eight place(const uint8_t *v, uint32_t m, int kind) {
    if (kind != ENDOR_X_F32) return eight_of(neon_table(vld1q_u8(v), tables.place16[m]), kind);
    uint32_t low = m & 15;
    uint8x16_t a = neon_table(vld1q_u8(v), tables.place32[low]);
    uint8x16_t b = neon_table(vld1q_u8(v + 4 * __builtin_popcount(low)), tables.place32[m >> 4]);
    eight out = {vreinterpretq_f32_u8(a), vreinterpretq_f32_u8(b)};
    return out;
}

typedef float operand_type;

#define MULTIPLY(VALUES, BITS, COLUMN, PAIR)                                                                      \
    eight w = place(VALUES, BITS, kind);                                                                          \
    for (int b = 0; b < batch; b++) {                                                                             \
        const float *at = xs + (uint64_t)b * x->stride + (COLUMN);                                                \
        float32x4_t *pair = PAIR;                                                                                 \
        pair[0] = vfmaq_f32(pair[0], w.low, vld1q_f32(at));                                                       \
        pair[1] = vfmaq_f32(pair[1], w.high, vld1q_f32(at + 4));                                                  \
    }
#include "neon_rows.h"

static ROWS(rows_bf16, ENDOR_X_BF16)
static ROWS(rows_f16, ENDOR_X_F16)
static ROWS(rows_f32, ENDOR_X_F32)

uint64_t endor_neon_rows(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x) {
    (void)n_runs;
    if (x->bf16_pairs) return endor_neon_rows_pairs(runs, span, x);
    if (x->weight == ENDOR_X_BF16) return rows_bf16(runs, span, x);
    if (x->weight == ENDOR_X_F16) return rows_f16(runs, span, x);
    return rows_f32(runs, span, x);
}

int endor_neon_row_runs(const endor_operand *x, endor_way way) {
    (void)x, (void)way;
    return 1;
}

#endif
