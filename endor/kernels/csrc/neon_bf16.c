/* Products of bf16 pairs, where the CPU has BFMLAL (Neoverse V1, N2 and later): bf16 weights times bf16 x as they are, with
 * half the loads of x and no widening. */
#include "endor.h"

#if defined(__aarch64__)

#if !defined(__clang__)
#pragma GCC target("arch=armv8.2-a+bf16")
#include "neon.h"

#include <sys/auxv.h>

#define HWCAP2_WITH_BF16 (1u << 14) /* older headers lack HWCAP2_BF16 */

int endor_neon_has_pairs(void) { return (getauxval(AT_HWCAP2) & HWCAP2_WITH_BF16) != 0; }

ENDOR_INLINE void multiply(float32x4_t *pair, bfloat16x8_t w, const uint16_t *x) {
    bfloat16x8_t at = vreinterpretq_bf16_u16(vld1q_u16(x));
    pair[0] = vbfmlalbq_f32(pair[0], w, at);
    pair[1] = vbfmlaltq_f32(pair[1], w, at);
}

static float from_bf16(const uint8_t *p) {
    uint32_t bits = (uint32_t)load16(p) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void endor_neon_dot_pairs(const uint8_t *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) {
    uint64_t whole = len / 16 * 16;
    for (int b = 0; b < x->batch; b++) {
        const uint16_t *row = (const uint16_t *)x->x + (uint64_t)b * x->stride + column;
        float *lanes = acc + 16 * b;
        float32x4_t sum[4];
        for (int i = 0; i < 4; i++) sum[i] = vld1q_f32(lanes + 4 * i);
        for (uint64_t i = 0; i < whole; i += 16) {
            multiply(sum, vreinterpretq_bf16_u8(vld1q_u8(w + 2 * i)), row + i);
            multiply(sum + 2, vreinterpretq_bf16_u8(vld1q_u8(w + 2 * i + 16)), row + i + 8);
        }
        for (int i = 0; i < 4; i++) vst1q_f32(lanes + 4 * i, sum[i]);
        for (uint64_t i = whole; i < len; i++) {
            lanes[i & 15] += from_bf16(w + 2 * i) * from_bf16((const uint8_t *)(row + i));
        }
    }
}

typedef uint16_t operand_type;

#define MULTIPLY(VALUES, BITS, COLUMN, PAIR)                                                                      \
    bfloat16x8_t w = vreinterpretq_bf16_u8(neon_table(vld1q_u8(VALUES), endor_neon_tables.place16[BITS]));        \
    for (int b = 0; b < batch; b++) multiply(PAIR, w, xs + (uint64_t)b * x->stride + (COLUMN));
#include "neon_rows.h"

ROWS(endor_neon_rows_pairs, ENDOR_X_BF16)

#else /* clang's intrinsics would need the whole library to be compiled for such a CPU */
#include "neon.h"

int endor_neon_has_pairs(void) { return 0; }

void endor_neon_dot_pairs(const uint8_t *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) {
    (void)w, (void)x, (void)column, (void)len, (void)acc;
}

uint64_t endor_neon_rows_pairs(endor_run *run, const endor_span *span, const endor_operand *x) {
    (void)run, (void)span, (void)x;
    return 0;
}
#endif

#endif
