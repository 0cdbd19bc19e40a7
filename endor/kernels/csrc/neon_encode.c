/* NEON kernels that pack: bitmaps, gathering of stored elements, and their split into planes. */
#include "endor.h"

#if defined(__aarch64__)
#include "neon.h"

#define tables endor_neon_tables

ENDOR_INLINE uint8x16_t zeros8(const uint8_t *s) { return vceqzq_u8(vld1q_u8(s)); }

ENDOR_INLINE uint8x16_t zeros16(const uint8_t *s) {
    uint16x8_t a = vceqzq_u16(vreinterpretq_u16_u8(vld1q_u8(s))), b = vceqzq_u16(vreinterpretq_u16_u8(vld1q_u8(s + 16)));
    return vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
}

ENDOR_INLINE uint8x16_t zeros32(const uint8_t *s) {
    uint16x8_t half[2];
    for (int i = 0; i < 2; i++) {
        uint32x4_t a = vceqzq_u32(vreinterpretq_u32_u8(vld1q_u8(s + 32 * i)));
        uint32x4_t b = vceqzq_u32(vreinterpretq_u32_u8(vld1q_u8(s + 32 * i + 16)));
        half[i] = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
    }
    return vuzp1q_u8(vreinterpretq_u8_u16(half[0]), vreinterpretq_u8_u16(half[1]));
}

#define SCAN(BITS)                                                                                                \
    uint32_t endor_neon_scan##BITS(const void *src, uint8_t *bitmap) {                                            \
        const uint8_t *s = src;                                                                                   \
        for (int w = 0; w < ENDOR_WORDS; w++, s += 8 * BITS) {                                                    \
            store64(bitmap + 8 * w, ~neon_mask(zeros##BITS(s), zeros##BITS(s + 2 * BITS), zeros##BITS(s + 4 * BITS), \
                                               zeros##BITS(s + 6 * BITS)));                                       \
        }                                                                                                         \
        uint8x16_t counts = vdupq_n_u8(0); /* at most 64 a byte */                                                \
        for (int i = 0; i < ENDOR_TILE / 8; i += 16) counts = vaddq_u8(counts, vcntq_u8(vld1q_u8(bitmap + i)));   \
        return vaddlvq_u8(counts);                                                                                \
    }
SCAN(8)
SCAN(16)
SCAN(32)

uint32_t endor_neon_compress8(const uint8_t *bitmap, const void *src, void *dst) {
    uint8_t *d = dst;
    const uint8_t *s = src;
    for (int w = 0; w < ENDOR_WORDS; w++, bitmap += 8, s += 64) {
        uint64_t ranks = neon_ranks(load64(bitmap));
        for (int i = 0; i < 8; i++) {
            vst1_u8(d + neon_before(ranks, i), vtbl1_u8(vld1_u8(s + 8 * i), vcreate_u8(tables.gather[bitmap[i]])));
        }
        d += ranks >> 56;
    }
    return (uint32_t)(d - (uint8_t *)dst);
}

uint32_t endor_neon_compress16(const uint8_t *bitmap, const void *src, void *dst) {
    uint8_t *d = dst;
    const uint8_t *s = src;
    for (int w = 0; w < ENDOR_WORDS; w++, bitmap += 8, s += 128) {
        uint64_t ranks = neon_ranks(load64(bitmap));
        for (int i = 0; i < 8; i++) {
            vst1q_u8(d + 2 * neon_before(ranks, i), neon_table(vld1q_u8(s + 16 * i), tables.gather16[bitmap[i]]));
        }
        d += 2 * (ranks >> 56);
    }
    return (uint32_t)((d - (uint8_t *)dst) / 2);
}

uint32_t endor_neon_compress32(const uint8_t *bitmap, const void *src, void *dst) {
    uint8_t *d = dst;
    const uint8_t *s = src;
    for (int w = 0; w < ENDOR_WORDS; w++, bitmap += 8, s += 256) {
        uint64_t ranks = neon_ranks(load64(bitmap));
        for (int i = 0; i < 8; i++) {
            uint32_t m = bitmap[i], low = m & 15;
            uint8_t *at = d + 4 * neon_before(ranks, i);
            vst1q_u8(at, neon_table(vld1q_u8(s + 32 * i), tables.gather32[low]));
            vst1q_u8(at + 4 * __builtin_popcount(low), neon_table(vld1q_u8(s + 32 * i + 16), tables.gather32[m >> 4]));
        }
        d += 4 * (ranks >> 56);
    }
    return (uint32_t)((d - (uint8_t *)dst) / 4);
}

/* The exponent field and the rest of 16 elements, the rest cut into `itemsize` bytes, lowest first. */
typedef struct {
    uint8x16_t exponent, rest[4];
} fields;

ENDOR_INLINE fields fields8(const endor_stream *s, const uint8_t *src) {
    const uint8x16_t mantissa = vdupq_n_u8((uint8_t)((1u << s->mantissa_bits) - 1));
    uint8x16_t x = vld1q_u8(src), e = vshlq_u8(x, vdupq_n_s8((int8_t)-s->mantissa_bits));
    fields f = {.exponent = vandq_u8(e, vdupq_n_u8((uint8_t)((1u << s->exponent_bits) - 1))), .rest = {vdupq_n_u8(0)}};
    if (!s->rest_bits) return f;
    uint8x16_t sign = vshlq_u8(vshrq_n_u8(x, 7), vdupq_n_s8((int8_t)s->mantissa_bits));
    f.rest[0] = vorrq_u8(vandq_u8(x, mantissa), sign);
    return f;
}

ENDOR_INLINE fields fields_bf16(const uint8_t *src) {
    uint8x16x2_t x = vld2q_u8(src); /* low bytes, high bytes */
    fields f = {.exponent = vsriq_n_u8(vshlq_n_u8(x.val[1], 1), x.val[0], 7),
                .rest = {vbslq_u8(vdupq_n_u8(0x80), x.val[1], x.val[0]), vdupq_n_u8(0)}};
    return f;
}

ENDOR_INLINE fields fields16(const endor_stream *s, const uint8_t *src) {
    uint8x16_t part[2][2], exponent[2];
    for (int h = 0; h < 2; h++) {
        uint16x8_t x = vreinterpretq_u16_u8(vld1q_u8(src + 16 * h));
        uint16x8_t e = vshlq_u16(x, vdupq_n_s16((int16_t)-s->mantissa_bits));
        uint16x8_t sign = vshlq_u16(vshrq_n_u16(x, 15), vdupq_n_s16((int16_t)s->mantissa_bits));
        uint16x8_t rest = vorrq_u16(vandq_u16(x, vdupq_n_u16((uint16_t)((1u << s->mantissa_bits) - 1))), sign);
        exponent[h] = vreinterpretq_u8_u16(vandq_u16(e, vdupq_n_u16((uint16_t)((1u << s->exponent_bits) - 1))));
        part[h][0] = part[h][1] = vreinterpretq_u8_u16(rest);
    }
    fields f = {.exponent = vuzp1q_u8(exponent[0], exponent[1]),
                .rest = {vuzp1q_u8(part[0][0], part[1][0]), vuzp2q_u8(part[0][1], part[1][1])}};
    return f;
}

ENDOR_INLINE fields fields32(const endor_stream *s, const uint8_t *src) {
    uint16x8_t low[2], high[2];
    uint8x16_t exponent[2];
    for (int h = 0; h < 2; h++) {
        uint16x8_t rest[2], e[2];
        for (int q = 0; q < 2; q++) {
            uint32x4_t x = vreinterpretq_u32_u8(vld1q_u8(src + 32 * h + 16 * q));
            uint32x4_t field = vshlq_u32(x, vdupq_n_s32(-s->mantissa_bits));
            uint32x4_t sign = vshlq_u32(vshrq_n_u32(x, 31), vdupq_n_s32(s->mantissa_bits));
            rest[q] = vreinterpretq_u16_u32(vorrq_u32(vandq_u32(x, vdupq_n_u32((1u << s->mantissa_bits) - 1)), sign));
            e[q] = vreinterpretq_u16_u32(vandq_u32(field, vdupq_n_u32((1u << s->exponent_bits) - 1)));
        }
        exponent[h] = vreinterpretq_u8_u16(vuzp1q_u16(e[0], e[1]));
        low[h] = vuzp1q_u16(rest[0], rest[1]);
        high[h] = vuzp2q_u16(rest[0], rest[1]);
    }
    uint8x16_t l0 = vreinterpretq_u8_u16(low[0]), l1 = vreinterpretq_u8_u16(low[1]);
    uint8x16_t h0 = vreinterpretq_u8_u16(high[0]), h1 = vreinterpretq_u8_u16(high[1]);
    fields f = {.exponent = vuzp1q_u8(exponent[0], exponent[1]),
                .rest = {vuzp1q_u8(l0, l1), vuzp2q_u8(l0, l1), vuzp1q_u8(h0, h1), vuzp2q_u8(h0, h1)}};
    return f;
}

/* The code of an element outside the window is zero. Where the rest is empty, codes wrap round the exponent's width. */
ENDOR_INLINE uint64_t split_of(const endor_stream *s, const uint8_t *src, endor_slots *slots, int itemsize, int bf16) {
    const uint8x16_t base = vdupq_n_u8((uint8_t)s->base), last = vdupq_n_u8((uint8_t)((1u << s->k) - 1));
    const uint8x16_t wrap = vdupq_n_u8((uint8_t)((1u << s->exponent_bits) - 1));
    const int8x16_t rest_shift = vdupq_n_s8((int8_t)(s->rest_bits % 8));
    uint8x16_t high[4], outside[4];
    for (int i = 0; i < 4; i++, src += 16 * itemsize) {
        fields f = bf16            ? fields_bf16(src)
                   : itemsize == 1 ? fields8(s, src)
                   : itemsize == 2 ? fields16(s, src)
                                   : fields32(s, src);
        uint8x16_t code = vsubq_u8(f.exponent, base);
        outside[i] = vdupq_n_u8(0);
        if (s->rest_bits) outside[i] = vcltq_u8(f.exponent, base);
        else code = vandq_u8(code, wrap);
        outside[i] = vorrq_u8(outside[i], vcgtq_u8(code, last));
        code = vbicq_u8(code, outside[i]);
        for (int j = 0; j < itemsize - 1; j++) vst1q_u8(slots->bytes[j] + 16 * i, f.rest[j]);
        high[i] = bf16 ? code : vorrq_u8(f.rest[itemsize - 1], vshlq_u8(code, rest_shift));
    }
    for (int j = 0; j < s->bit_planes; j++) {
        const uint8x16_t bit = vdupq_n_u8((uint8_t)(1 << j));
        slots->planes[j] = neon_mask(vtstq_u8(high[0], bit), vtstq_u8(high[1], bit), vtstq_u8(high[2], bit),
                                     vtstq_u8(high[3], bit));
    }
    return neon_mask(outside[0], outside[1], outside[2], outside[3]);
}

uint64_t endor_neon_split(const endor_stream *s, const void *src, endor_slots *slots) {
    if (s->itemsize == 1) return split_of(s, src, slots, 1, 0);
    if (s->itemsize == 4) return split_of(s, src, slots, 4, 0);
    return s->mantissa_bits == 7 ? split_of(s, src, slots, 2, 1) : split_of(s, src, slots, 2, 0);
}

#endif
