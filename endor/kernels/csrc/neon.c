/* NEON kernels for 64-bit ARM: expansion, the exp stream, bandwidth probes, and the table of kernels. Elements are
 * placed eight at a time (32-bit ones four) by byte shuffles whose control comes from a table indexed by bitmap bits. */
#include "endor.h"

#if defined(__aarch64__)
#include "neon.h"

#include <pthread.h>
#include "glibc.h"

endor_neon_controls endor_neon_tables ENDOR_ALIGNED;
#define tables endor_neon_tables

/* Element i of `count` takes the next of the stored ones where bit i of m is set; `gather` is the inverse. Each element
 * is `size` bytes of a control. */
static void fill_control(int m, int count, int size, uint8_t *place, uint8_t *gather) {
    int k = 0;
    memset(place, 0x80, (size_t)(count * size));
    memset(gather, 0x80, (size_t)(count * size));
    for (int i = 0; i < count; i++) {
        if (!(m >> i & 1)) continue;
        for (int byte = 0; byte < size; byte++) {
            place[size * i + byte] = (uint8_t)(size * k + byte);
            gather[size * k + byte] = (uint8_t)(size * i + byte);
        }
        k++;
    }
}

static void fill_tables(void) {
    for (int m = 0; m < 256; m++) {
        fill_control(m, 8, 1, (uint8_t *)&tables.place[m], (uint8_t *)&tables.gather[m]);
        fill_control(m, 8, 2, tables.place16[m], tables.gather16[m]);
        if (m < 16) fill_control(m, 4, 4, tables.place32[m], tables.gather32[m]);
    }
}

ENDOR_INLINE void store_pair(uint8_t *p, uint8x16_t a, uint8x16_t b, int streaming) {
    if (streaming) {
        __asm__("stnp %q2, %q3, [%1]" : "=m"(*(uint8_t(*)[32])p) : "r"(p), "w"(a), "w"(b));
    } else {
        vst1q_u8(p, a);
        vst1q_u8(p + 16, b);
    }
}

/* Sixteen one-byte elements from the bits of two bytes, the second's elements beginning after n of the run's. */
ENDOR_INLINE uint8x16_t place8(const uint8_t *v, uint32_t a, uint32_t b, uint64_t n) {
    uint64_t second = tables.place[b] + 0x0101010101010101u * n; /* n is at most 8, so 0x80 stays out of range */
    return vqtbl1q_u8(vld1q_u8(v), vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(tables.place[a]), vcreate_u64(second))));
}

ENDOR_INLINE uint32_t expand8_of(const uint8_t *bitmap, const uint8_t *v, uint8_t *out, int streaming) {
    const uint8_t *v0 = v;
    for (int w = 0; w < ENDOR_WORDS; w++, bitmap += 8, out += 64) {
        uint64_t ranks = neon_ranks(load64(bitmap));
        uint8x16_t x[4];
        for (int i = 0; i < 4; i++) {
            uint64_t at = neon_before(ranks, 2 * i), next = neon_before(ranks, 2 * i + 1);
            x[i] = place8(v + at, bitmap[2 * i], bitmap[2 * i + 1], next - at);
        }
        store_pair(out, x[0], x[1], streaming);
        store_pair(out + 32, x[2], x[3], streaming);
        v += ranks >> 56;
    }
    return (uint32_t)(v - v0);
}

ENDOR_INLINE uint32_t expand16_of(const uint8_t *bitmap, const uint8_t *v, uint8_t *out, int streaming) {
    const uint8_t *v0 = v;
    for (int w = 0; w < ENDOR_WORDS; w++, bitmap += 8, out += 128) {
        uint64_t ranks = neon_ranks(load64(bitmap));
        for (int i = 0; i < 8; i += 2) {
            uint8x16_t a = neon_table(vld1q_u8(v + 2 * neon_before(ranks, i)), tables.place16[bitmap[i]]);
            uint8x16_t b = neon_table(vld1q_u8(v + 2 * neon_before(ranks, i + 1)), tables.place16[bitmap[i + 1]]);
            store_pair(out + 16 * i, a, b, streaming);
        }
        v += 2 * (ranks >> 56);
    }
    return (uint32_t)(v - v0) / 2;
}

ENDOR_INLINE uint32_t expand32_of(const uint8_t *bitmap, const uint8_t *v, uint8_t *out, int streaming) {
    const uint8_t *v0 = v;
    for (int w = 0; w < ENDOR_WORDS; w++, bitmap += 8, out += 256) {
        uint64_t ranks = neon_ranks(load64(bitmap));
        for (int i = 0; i < 8; i++) {
            uint32_t m = bitmap[i], low = m & 15;
            const uint8_t *from = v + 4 * neon_before(ranks, i);
            uint8x16_t a = neon_table(vld1q_u8(from), tables.place32[low]);
            uint8x16_t b = neon_table(vld1q_u8(from + 4 * (0x4332322132212110u >> 4 * low & 15)), tables.place32[m >> 4]);
            store_pair(out + 32 * i, a, b, streaming);
        }
        v += 4 * (ranks >> 56);
    }
    return (uint32_t)(v - v0) / 4;
}

#define EXPAND(BITS)                                                                                              \
    static uint32_t expand##BITS(const uint8_t *bitmap, const void *v, void *out, int streaming) {                \
        return streaming ? expand##BITS##_of(bitmap, v, out, 1) : expand##BITS##_of(bitmap, v, out, 0);           \
    }
EXPAND(8)
EXPAND(16)
EXPAND(32)

/* The bit planes of 16 stored elements, the quarter-th of plane word w, as bytes. */
ENDOR_INLINE uint8x16_t high_bytes(const endor_stream *s, uint64_t w, int quarter) {
    const uint8x16_t which = vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(0), vcreate_u64(0x0101010101010101u)));
    const uint8x16_t select = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    uint8x16_t high = vdupq_n_u8(0);
    for (int j = 0; j < s->bit_planes; j++) {
        uint16_t bits = load16(s->planes + (uint64_t)j * s->plane_stride + 8 * w + 2 * (uint64_t)quarter);
        uint8x16_t set = vtstq_u8(vqtbl1q_u8(vreinterpretq_u8_u16(vdupq_n_u16(bits)), which), select);
        high = vorrq_u8(high, vandq_u8(set, vdupq_n_u8((uint8_t)(1 << j))));
    }
    return high;
}

/* One-byte elements: through the table of 256, 64 of its entries at a time. */
ENDOR_INLINE uint8x16_t look_up(const uint8_t *lut, uint8x16_t w, int bit_planes) {
    uint8x16_t out = vqtbl4q_u8(vld1q_u8_x4(lut), w);
    for (int part = 1; part < 1 << bit_planes >> 6; part++) {
        w = vsubq_u8(w, vdupq_n_u8(64));
        out = vqtbx4q_u8(out, vld1q_u8_x4(lut + 64 * part), w);
    }
    return out;
}

typedef struct {
    uint32_t mantissa, sign, exponent, base;
    int sign_shift, rest_shift, mantissa_shift;
} joiner;

ENDOR_INLINE uint16x8_t join16(const joiner *j, uint16x8_t w) {
    uint16x8_t e = vaddq_u16(vshlq_u16(w, vdupq_n_s16((int16_t)-j->rest_shift)), vdupq_n_u16((uint16_t)j->base));
    e = vandq_u16(vshlq_u16(e, vdupq_n_s16((int16_t)j->mantissa_shift)), vdupq_n_u16((uint16_t)j->exponent));
    uint16x8_t sign = vandq_u16(vshlq_u16(w, vdupq_n_s16((int16_t)j->sign_shift)), vdupq_n_u16((uint16_t)j->sign));
    return vorrq_u16(vorrq_u16(e, sign), vandq_u16(w, vdupq_n_u16((uint16_t)j->mantissa)));
}

ENDOR_INLINE uint32x4_t join32(const joiner *j, uint32x4_t w) {
    uint32x4_t e = vaddq_u32(vshlq_u32(w, vdupq_n_s32(-j->rest_shift)), vdupq_n_u32(j->base));
    e = vandq_u32(vshlq_u32(e, vdupq_n_s32(j->mantissa_shift)), vdupq_n_u32(j->exponent));
    uint32x4_t sign = vandq_u32(vshlq_u32(w, vdupq_n_s32(j->sign_shift)), vdupq_n_u32(j->sign));
    return vorrq_u32(vorrq_u32(e, sign), vandq_u32(w, vdupq_n_u32(j->mantissa)));
}

static joiner joiner_of(const endor_stream *s) {
    joiner j = {.mantissa = (1u << s->mantissa_bits) - 1,
                .sign = 1u << (8 * s->itemsize - 1),
                .exponent = ((1u << s->exponent_bits) - 1) << s->mantissa_bits,
                .base = s->base,
                .sign_shift = 8 * s->itemsize - 1 - s->mantissa_bits,
                .rest_shift = s->rest_bits,
                .mantissa_shift = s->mantissa_bits};
    return j;
}

/* bf16: the exponent's low bit is the low byte's top, the sign the high byte's: two inserts into the stored byte. */
ENDOR_INLINE uint8x16x2_t join_bf16(uint8x16_t rest, uint8x16_t exponent) {
    uint8x16x2_t out = {{vsliq_n_u8(rest, exponent, 7), vsriq_n_u8(rest, exponent, 1)}};
    return out;
}

ENDOR_INLINE void stream_of(const endor_stream *s, uint64_t word, uint64_t words, uint8_t *out, int bf16) {
    const joiner j = joiner_of(s);
    for (uint64_t i = 0; i < 4 * words; i++) {
        const uint8_t *low = s->bytes + 64 * word + 16 * i;
        uint8x16_t high = high_bytes(s, word + i / 4, (int)(i & 3));
        if (bf16) {
            vst2q_u8(out + 32 * i, join_bf16(vld1q_u8(low), vaddq_u8(high, vdupq_n_u8((uint8_t)s->base))));
        } else if (s->itemsize == 1) {
            vst1q_u8(out + 16 * i, look_up(s->lut, high, s->bit_planes));
        } else if (s->itemsize == 2) {
            uint8x16x2_t w = vzipq_u8(vld1q_u8(low), high);
            for (int h = 0; h < 2; h++) {
                uint16x8_t joined = join16(&j, vreinterpretq_u16_u8(w.val[h]));
                vst1q_u8(out + 32 * i + 16 * h, vreinterpretq_u8_u16(joined));
            }
        } else {
            uint8x16x2_t a = vzipq_u8(vld1q_u8(low), vld1q_u8(low + s->byte_stride));
            uint8x16x2_t b = vzipq_u8(vld1q_u8(low + 2 * s->byte_stride), high);
            for (int h = 0; h < 2; h++) {
                uint16x8x2_t w = vzipq_u16(vreinterpretq_u16_u8(a.val[h]), vreinterpretq_u16_u8(b.val[h]));
                for (int q = 0; q < 2; q++) {
                    uint32x4_t joined = join32(&j, vreinterpretq_u32_u16(w.val[q]));
                    vst1q_u8(out + 64 * i + 32 * h + 16 * q, vreinterpretq_u8_u32(joined));
                }
            }
        }
    }
}

static void stream(const endor_stream *s, uint64_t word, uint64_t words, void *buf) {
    if (s->itemsize == 2 && s->mantissa_bits == 7) stream_of(s, word, words, buf, 1);
    else stream_of(s, word, words, buf, 0);
}

static void copy_streaming(void *dst, const void *src, size_t nbytes) {
    uint8_t *d = dst;
    const uint8_t *s = src;
    for (; nbytes >= 64; nbytes -= 64, d += 64, s += 64) {
        uint8x16_t a = vld1q_u8(s), b = vld1q_u8(s + 16), c = vld1q_u8(s + 32), e = vld1q_u8(s + 48);
        store_pair(d, a, b, 1);
        store_pair(d + 32, c, e, 1);
    }
    memcpy(d, s, nbytes);
}

static uint64_t read_words(const void *src, size_t nbytes) {
    const uint8_t *s = src;
    uint8x16_t sum[4] = {vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};
    for (size_t i = 0; i + 64 <= nbytes; i += 64) {
        for (size_t j = 0; j < 4; j++) sum[j] = veorq_u8(sum[j], vld1q_u8(s + i + 16 * j));
    }
    uint64x2_t all = vreinterpretq_u64_u8(veorq_u8(veorq_u8(sum[0], sum[1]), veorq_u8(sum[2], sum[3])));
    uint64_t total = vgetq_lane_u64(all, 0) ^ vgetq_lane_u64(all, 1);
    for (size_t i = nbytes / 64 * 64; i + 8 <= nbytes; i += 8) total ^= load64(s + i);
    return total;
}

static void fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static uint64_t popcount(const uint8_t *bitmap, uint64_t words) {
    uint64_t total = 0, i = 0;
    for (; i + 2 <= words; i += 2) total += vaddlvq_u8(vcntq_u8(vld1q_u8(bitmap + 8 * i)));
    return i < words ? total + (uint64_t)__builtin_popcountll(load64(bitmap + 8 * i)) : total;
}

static endor_ops ops = {
    .name = "neon",
    .expand = {expand8, expand16, expand32},
    .stream = stream,
    .scan = {endor_neon_scan8, endor_neon_scan16, endor_neon_scan32},
    .compress = {endor_neon_compress8, endor_neon_compress16, endor_neon_compress32},
    .split = endor_neon_split,
    .copy_streaming = copy_streaming,
    .read = read_words,
    .fence = fence,
    .dot = endor_neon_dot,
    .rows = endor_neon_rows,
    .row_runs = endor_neon_row_runs,
    .popcount = popcount,
};

static void prepare(void) {
    ops.bf16_pairs = endor_neon_has_pairs();
    ops.histogram = endor_scalar_ops()->histogram;
    fill_tables();
}

const endor_ops *endor_neon_ops(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, prepare);
    return &ops;
}

#else

const endor_ops *endor_neon_ops(void) { return NULL; }

#endif
