/* What the NEON sources share. Everything in them but the products of bf16 pairs is in the base of
 * ARMv8-A, which every 64-bit ARM has. */
#ifndef ENDOR_NEON_H
#define ENDOR_NEON_H

#include "endor.h"

#include <arm_neon.h>

/* Byte shuffles by bitmap bits: where each place finds its element, and the inverse. TBL gives zero for an index past
 * its sixteen bytes, so 0x80 stands for "nowhere". Of eight bits for 8- and 16-bit elements, of four for 32-bit ones. */
typedef struct {
    uint64_t place[256], gather[256];
    uint8_t place16[256][16], gather16[256][16], place32[16][16], gather32[16][16];
} endor_neon_controls;

extern endor_neon_controls endor_neon_tables;

ENDOR_INLINE uint8x16_t neon_table(uint8x16_t x, const uint8_t *control) { return vqtbl1q_u8(x, vld1q_u8(control)); }

/* Byte i: the set bits of bytes 0 to i. A position found so does not wait for the one before it, and there is no
 * instruction that counts bits in a general register. */
ENDOR_INLINE uint64_t neon_ranks(uint64_t bits) {
    return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(bits))), 0) * 0x0101010101010101u;
}

/* The set bits before byte i, from `neon_ranks`. */
ENDOR_INLINE uint64_t neon_before(uint64_t ranks, int i) { return i ? ranks >> 8 * (i - 1) & 0xff : 0; }

/* Bit i of the result: whether byte i of the 64, each 0 or 0xff, is set. */
ENDOR_INLINE uint64_t neon_mask(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d) {
    const uint8x16_t weight = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    uint8x16_t low = vpaddq_u8(vandq_u8(a, weight), vandq_u8(b, weight));
    uint8x16_t high = vpaddq_u8(vandq_u8(c, weight), vandq_u8(d, weight));
    uint8x16_t both = vpaddq_u8(low, high);
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(both, both)), 0);
}

void endor_neon_dot(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc);
uint64_t endor_neon_rows(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x);
int endor_neon_has_pairs(void);
void endor_neon_dot_pairs(const uint8_t *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc);
uint64_t endor_neon_rows_pairs(endor_run *run, const endor_span *span, const endor_operand *x);
int endor_neon_row_runs(const endor_operand *x, endor_way way);

uint32_t endor_neon_scan8(const void *src, uint8_t *bitmap);
uint32_t endor_neon_scan16(const void *src, uint8_t *bitmap);
uint32_t endor_neon_scan32(const void *src, uint8_t *bitmap);
uint32_t endor_neon_compress8(const uint8_t *bitmap, const void *src, void *dst);
uint32_t endor_neon_compress16(const uint8_t *bitmap, const void *src, void *dst);
uint32_t endor_neon_compress32(const uint8_t *bitmap, const void *src, void *dst);
uint64_t endor_neon_split(const endor_stream *s, const void *src, endor_slots *slots);

#endif
