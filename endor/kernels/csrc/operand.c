/* The vector operand of a product, in the form that kernels multiply. */
#include "endor.h"

#include <stdlib.h>

static void to_float(const uint8_t *x, int kind, uint64_t count, float *out) {
    if (kind == ENDOR_X_F32) {
        memcpy(out, x, count * 4);
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint32_t bits = load16(x + 2 * i);
        if (kind == ENDOR_X_F16) {
            out[i] = endor_half(bits);
        } else {
            bits <<= 16;
            memcpy(out + i, &bits, 4);
        }
    }
}

uint8_t *endor_operand_of(const endor_ops *ops, const endor_operand *form, uint64_t cols, const uint8_t *x, int x_kind,
                          uint64_t batch, int arranged) {
    uint64_t size = form->bf16_pairs ? 2 : 4, in_size = x_kind == ENDOR_X_F32 ? 4 : 2, stride = form->stride;
    uint64_t padded = batch < 3 ? batch : (batch + ENDOR_MAX_BATCH - 1) / ENDOR_MAX_BATCH * ENDOR_MAX_BATCH;
    uint8_t *rows = aligned_alloc(64, padded * stride * size);
    if (!rows) return NULL;
    memset(rows + batch * stride * size, 0, (padded - batch) * stride * size);
    for (uint64_t b = 0; b < batch; b++) {
        uint8_t *row = rows + b * stride * size;
        const uint8_t *in = x + b * cols * in_size;
        if (form->bf16_pairs) memcpy(row, in, cols * size);
        else to_float(in, x_kind, cols, (float *)row);
        if (arranged) ops->arrange(row, cols, (int)size);
    }
    return rows;
}
