/* Portable kernels: branch-free loops over 64-bit words, for any little-endian machine. */
#include "endor.h"

/* Bits 0..7 of b to the bytes 0..7 of the result, each 0 or 1. */
ENDOR_INLINE uint64_t spread(uint64_t b) {
    uint64_t x = (b & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
    return (x + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

/* The inverse: bit 0 of each byte to one byte. */
ENDOR_INLINE uint64_t gather(uint64_t x) { return (x & 0x0101010101010101u) * 0x0102040810204080u >> 56; }

#define DEFINE(BITS)                                                                                              \
    static uint32_t expand##BITS(const uint8_t *bitmap, const void *values, void *out, int streaming) {           \
        const uint8_t *v = values;                                                                                \
        uint8_t *o = out;                                                                                         \
        (void)streaming;                                                                                          \
        for (int w = 0; w < ENDOR_WORDS; w++) {                                                                   \
            uint64_t m = load64(bitmap + 8 * w);                                                                  \
            for (int i = 0; i < 64; i++, m >>= 1, o += BITS / 8) {                                                \
                uint##BITS##_t x;                                                                                 \
                memcpy(&x, v, sizeof x);                                                                          \
                x &= (uint##BITS##_t)(0 - (m & 1));                                                               \
                memcpy(o, &x, sizeof x);                                                                          \
                v += (m & 1) * (BITS / 8);                                                                        \
            }                                                                                                     \
        }                                                                                                         \
        return (uint32_t)((v - (const uint8_t *)values) / (BITS / 8));                                            \
    }                                                                                                             \
    static uint32_t scan##BITS(const void *src, uint8_t *bitmap) {                                                \
        const uint8_t *s = src;                                                                                   \
        uint32_t count = 0;                                                                                       \
        for (int w = 0; w < ENDOR_WORDS; w++) {                                                                   \
            uint64_t m = 0;                                                                                       \
            for (int i = 0; i < 64; i++, s += BITS / 8) {                                                         \
                uint##BITS##_t x;                                                                                 \
                memcpy(&x, s, sizeof x);                                                                          \
                m |= (uint64_t)(x != 0) << i;                                                                     \
            }                                                                                                     \
            store64(bitmap + 8 * w, m);                                                                           \
            count += (uint32_t)__builtin_popcountll(m);                                                           \
        }                                                                                                         \
        return count;                                                                                             \
    }                                                                                                             \
    static uint32_t compress##BITS(const uint8_t *bitmap, const void *src, void *dst) {                           \
        const uint8_t *s = src;                                                                                   \
        uint8_t *d = dst;                                                                                         \
        for (int w = 0; w < ENDOR_WORDS; w++) {                                                                   \
            uint64_t m = load64(bitmap + 8 * w);                                                                  \
            for (int i = 0; i < 64; i++, m >>= 1, s += BITS / 8) {                                                \
                memcpy(d, s, BITS / 8);                                                                           \
                d += (m & 1) * (BITS / 8);                                                                        \
            }                                                                                                     \
        }                                                                                                         \
        return (uint32_t)((d - (uint8_t *)dst) / (BITS / 8));                                                     \
    }

DEFINE(8)
DEFINE(16)
DEFINE(32)

/* Sign, exponent and mantissa from a stored number w = code << rest_bits | sign << mantissa_bits | mantissa. */
ENDOR_INLINE uint32_t join(const endor_stream *s, uint32_t w) {
    int m = s->mantissa_bits;
    uint32_t exponent = ((w >> m >> 1) + s->base) & ((1u << s->exponent_bits) - 1);
    return (w & ((1u << m) - 1)) | (w >> m & 1) << (8 * s->itemsize - 1) | exponent << m;
}

static void stream(const endor_stream *s, uint64_t word, uint64_t words, void *buf) {
    for (uint64_t w = word; w < word + words; w++) {
        uint64_t spreads[8] = {0};
        uint8_t high[64];
        for (int j = 0; j < s->bit_planes; j++) {
            uint64_t bits = load64(s->planes + j * s->plane_stride + 8 * w);
            for (int b = 0; b < 8; b++) spreads[b] |= spread(bits >> 8 * b) << j;
        }
        memcpy(high, spreads, 64);
        const uint8_t *low = s->bytes + 64 * w; /* not read where there are no byte planes */
        if (s->itemsize == 1) {
            uint8_t *out = (uint8_t *)buf + 64 * (w - word);
            for (int i = 0; i < 64; i++) out[i] = s->lut[high[i]];
        } else if (s->itemsize == 2) {
            uint16_t *out = (uint16_t *)buf + 64 * (w - word);
            for (int i = 0; i < 64; i++) out[i] = (uint16_t)join(s, (uint32_t)high[i] << 8 | low[i]);
        } else {
            uint32_t *out = (uint32_t *)buf + 64 * (w - word);
            const uint8_t *mid = low + s->byte_stride, *top = mid + s->byte_stride;
            for (int i = 0; i < 64; i++) {
                out[i] = join(s, (uint32_t)high[i] << 24 | (uint32_t)top[i] << 16 | (uint32_t)mid[i] << 8 | low[i]);
            }
        }
    }
}

ENDOR_INLINE uint32_t element(const void *src, int itemsize, size_t i) {
    uint32_t x = 0;
    memcpy(&x, (const uint8_t *)src + i * (size_t)itemsize, (size_t)itemsize);
    return x;
}

ENDOR_INLINE void histogram_of(const void *src, int itemsize, int exponent_bits, int mantissa_bits, uint32_t *hist) {
    uint32_t mask = (1u << exponent_bits) - 1;
    for (size_t i = 0; i < ENDOR_TILE; i += 4) {
        for (size_t j = 0; j < 4; j++) hist[256 * j + (element(src, itemsize, i + j) >> mantissa_bits & mask)]++;
    }
}

static void histogram(const void *src, int itemsize, int exponent_bits, int mantissa_bits, uint32_t *hist) {
    if (itemsize == 1) histogram_of(src, 1, exponent_bits, mantissa_bits, hist);
    else if (itemsize == 2) histogram_of(src, 2, exponent_bits, mantissa_bits, hist);
    else histogram_of(src, 4, exponent_bits, mantissa_bits, hist);
}

ENDOR_INLINE uint64_t split_of(const endor_stream *s, const void *src, endor_slots *slots, int itemsize) {
    int m = s->mantissa_bits;
    uint32_t exponent_mask = (1u << s->exponent_bits) - 1, wrap = s->rest_bits ? 0xffffffffu : exponent_mask;
    uint8_t high[64];
    uint64_t outside = 0;
    for (size_t i = 0; i < 64; i++) {
        uint32_t x = element(src, itemsize, i);
        uint32_t code = ((x >> m & exponent_mask) - s->base) & wrap;
        uint32_t inside = code < 1u << s->k;
        outside |= (uint64_t)!inside << i;
        uint32_t rest = s->rest_bits ? (x & ((1u << m) - 1)) | x >> (8 * itemsize - 1) << m : 0;
        uint32_t w = (code & (0 - inside)) << s->rest_bits | rest;
        for (int j = 0; j < itemsize - 1; j++) slots->bytes[j][i] = (uint8_t)(w >> 8 * j);
        high[i] = (uint8_t)(w >> 8 * (itemsize - 1));
    }
    for (int j = 0; j < s->bit_planes; j++) {
        slots->planes[j] = 0;
        for (int b = 0; b < 8; b++) slots->planes[j] |= gather(load64(high + 8 * b) >> j) << 8 * b;
    }
    return outside;
}

static uint64_t split(const endor_stream *s, const void *src, endor_slots *slots) {
    if (s->itemsize == 1) return split_of(s, src, slots, 1);
    if (s->itemsize == 2) return split_of(s, src, slots, 2);
    return split_of(s, src, slots, 4);
}

static void copy_streaming(void *dst, const void *src, size_t nbytes) { memcpy(dst, src, nbytes); }

static uint64_t read_words(const void *src, size_t nbytes) {
    const uint8_t *s = src;
    uint64_t sum[4] = {0};
    for (size_t i = 0; i + 32 <= nbytes; i += 32) {
        for (size_t j = 0; j < 4; j++) sum[j] ^= load64(s + i + 8 * j);
    }
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

static void fence(void) {}

ENDOR_INLINE float weight_of(const void *w, int kind, size_t i) {
    uint32_t bits = element(w, kind == ENDOR_X_F32 ? 4 : 2, i);
    float value;
    if (kind == ENDOR_X_F16) return endor_half(bits);
    if (kind == ENDOR_X_BF16) bits <<= 16;
    memcpy(&value, &bits, 4);
    return value;
}

ENDOR_INLINE void dot_of(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc, int kind) {
    float weights[64];
    for (uint64_t at = 0; at < len; at += 64) {
        uint64_t step = min64(64, len - at);
        for (uint64_t i = 0; i < step; i++) weights[i] = weight_of(w, kind, at + i);
        for (int b = 0; b < x->batch; b++) {
            const float *row = (const float *)x->x + (uint64_t)b * x->stride + column + at;
            for (uint64_t i = 0; i < step; i++) acc[16 * b + (i & 15)] += weights[i] * row[i];
        }
    }
}

static void dot(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) {
    if (x->weight == ENDOR_X_BF16) dot_of(w, x, column, len, acc, ENDOR_X_BF16);
    else if (x->weight == ENDOR_X_F16) dot_of(w, x, column, len, acc, ENDOR_X_F16);
    else dot_of(w, x, column, len, acc, ENDOR_X_F32);
}

static const endor_ops ops = {
    .name = "scalar",
    .expand = {expand8, expand16, expand32},
    .stream = stream,
    .scan = {scan8, scan16, scan32},
    .compress = {compress8, compress16, compress32},
    .histogram = histogram,
    .split = split,
    .copy_streaming = copy_streaming,
    .read = read_words,
    .fence = fence,
    .dot = dot,
};

const endor_ops *endor_scalar_ops(void) { return &ops; }
