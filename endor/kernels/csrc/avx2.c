/* AVX2 kernels (with BMI2, FMA, F16C): elements are placed eight at a time by byte shuffles whose control comes from a
 * table indexed by eight bitmap bits. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx2.h"

#include <pthread.h>

endor_avx2_controls endor_avx2_tables ENDOR_ALIGNED;
#define tables endor_avx2_tables

static void fill_tables(void) {
    for (int m = 0; m < 256; m++) {
        uint8_t place[8];
        for (int i = 0, k = 0; i < 8; i++) place[i] = m >> i & 1 ? (uint8_t)k++ : 0x80;
        memcpy(&tables.place[m], place, 8);
        for (int i = 0; i < 16; i++) {
            tables.place16[m][i] = place[i / 2] & 0x80 ? 0x80 : (uint8_t)(2 * place[i / 2] + (i & 1));
        }
        for (int i = 0; i < 32; i++) {
            tables.place_bf16[m][i] = i & 2 ? tables.place16[m][i / 4 * 2 + (i & 1)] : 0x80;
        }
    }
}

INLINE TARGET void store128(void *p, __m128i x, int streaming) {
    if (streaming) _mm_stream_si128(p, x);
    else _mm_storeu_si128(p, x);
}

INLINE TARGET uint32_t expand8_of(const uint8_t *bitmap, const uint8_t *v, uint8_t *out, int streaming) {
    const uint8_t *v0 = v;
    for (int i = 0; i < ENDOR_TILE / 8; i += 2) {
        uint32_t a = bitmap[i], b = bitmap[i + 1], n = count(a);
        /* 0x80 entries keep their top bit: n is at most 8 */
        uint64_t second = tables.place[b] + 0x0101010101010101u * n;
        __m128i control = _mm_set_epi64x((long long)second, (long long)tables.place[a]);
        store128(out + 8 * i, _mm_shuffle_epi8(load128(v), control), streaming);
        v += n + count(b);
    }
    return (uint32_t)(v - v0);
}

INLINE TARGET uint32_t expand16_of(const uint8_t *bitmap, const uint16_t *v, uint16_t *out, int streaming) {
    const uint16_t *v0 = v;
    for (int i = 0; i < ENDOR_TILE / 8; i++) {
        uint32_t m = bitmap[i];
        store128(out + 8 * i, _mm_shuffle_epi8(load128(v), load128(tables.place16[m])), streaming);
        v += count(m);
    }
    return (uint32_t)(v - v0);
}

INLINE TARGET uint32_t expand32_of(const uint8_t *bitmap, const uint32_t *v, uint32_t *out, int streaming) {
    const uint32_t *v0 = v;
    for (int i = 0; i < ENDOR_TILE / 8; i++) {
        uint32_t m = bitmap[i];
        __m256i index = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)tables.place[m]));
        __m256i x = _mm256_permutevar8x32_epi32(load256(v), index);
        x = _mm256_andnot_si256(_mm256_srai_epi32(index, 31), x);
        if (streaming) _mm256_stream_si256((__m256i *)(out + 8 * i), x);
        else _mm256_storeu_si256((__m256i *)(out + 8 * i), x);
        v += count(m);
    }
    return (uint32_t)(v - v0);
}

#define EXPAND(BITS)                                                                                              \
    static TARGET uint32_t expand##BITS(const uint8_t *bitmap, const void *v, void *out, int streaming) {         \
        return streaming ? expand##BITS##_of(bitmap, v, out, 1) : expand##BITS##_of(bitmap, v, out, 0);           \
    }
EXPAND(8)
EXPAND(16)
EXPAND(32)

/* Bit i of `bits` set: byte i = 0xff. */
INLINE TARGET __m256i bytes_of_bits(uint32_t bits) {
    const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i select = _mm256_set1_epi64x((long long)0x8040201008040201u);
    __m256i x = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), which);
    return _mm256_cmpeq_epi8(_mm256_and_si256(x, select), select);
}

/* The bit planes of 32 stored elements from 32 * half of plane word w on. */
INLINE TARGET __m256i high_bytes(const endor_stream *s, uint64_t w, uint64_t half) {
    __m256i c = _mm256_setzero_si256();
    for (int j = 0; j < s->bit_planes; j++) {
        __m256i bits = bytes_of_bits(load32(s->planes + (uint64_t)j * s->plane_stride + 8 * w + 4 * half));
        c = _mm256_or_si256(c, _mm256_and_si256(bits, _mm256_set1_epi8((char)(1 << j))));
    }
    return c;
}

typedef struct {
    __m256i mantissa, sign, exponent, base;
    __m128i sign_shift, rest_shift, mantissa_shift;
} joiner;

#define JOINER(BITS, SET1)                                                                                        \
    {.mantissa = SET1((1u << s->mantissa_bits) - 1),                                                              \
     .sign = SET1(1u << (BITS - 1)),                                                                              \
     .exponent = SET1(((1u << s->exponent_bits) - 1) << s->mantissa_bits),                                        \
     .base = SET1(s->base),                                                                                       \
     .sign_shift = _mm_cvtsi32_si128(BITS - 1 - s->mantissa_bits),                                                \
     .rest_shift = _mm_cvtsi32_si128(s->rest_bits),                                                               \
     .mantissa_shift = _mm_cvtsi32_si128(s->mantissa_bits)}

#define JOIN(BITS)                                                                                                \
    INLINE TARGET __m256i join##BITS(const joiner *j, __m256i w) {                                                \
        __m256i e = _mm256_add_epi##BITS(_mm256_srl_epi##BITS(w, j->rest_shift), j->base);                        \
        e = _mm256_and_si256(_mm256_sll_epi##BITS(e, j->mantissa_shift), j->exponent);                            \
        __m256i sign = _mm256_and_si256(_mm256_sll_epi##BITS(w, j->sign_shift), j->sign);                         \
        return _mm256_or_si256(_mm256_or_si256(e, sign), _mm256_and_si256(w, j->mantissa));                       \
    }
JOIN(16)
JOIN(32)

/* a and b interleaved, in order, `unit` bits at a time: unpack works within 128-bit lanes. */
#define INTERLEAVE(unit, a, b, first, second)                                                                     \
    {                                                                                                             \
        __m256i l_ = _mm256_unpacklo_epi##unit(a, b), h_ = _mm256_unpackhi_epi##unit(a, b);                       \
        first = _mm256_permute2x128_si256(l_, h_, 0x20);                                                          \
        second = _mm256_permute2x128_si256(l_, h_, 0x31);                                                         \
    }

static TARGET void stream(const endor_stream *s, uint64_t word, uint64_t words, void *buf) {
    const joiner j16 = JOINER(16, _mm256_set1_epi16), j32 = JOINER(32, _mm256_set1_epi32);
    for (uint64_t i = 0; i < 2 * words; i++) {
        uint64_t at = 64 * word + 32 * i;
        __m256i high = high_bytes(s, word + i / 2, i & 1), a, b;
        if (s->itemsize == 1) {
            uint8_t w[32], *out = (uint8_t *)buf + 32 * i;
            _mm256_storeu_si256((__m256i *)w, high);
            for (int k = 0; k < 32; k++) out[k] = s->lut[w[k]];
        } else if (s->itemsize == 2) {
            __m256i *out = (__m256i *)buf + 2 * i;
            INTERLEAVE(8, load256(s->bytes + at), high, a, b)
            _mm256_store_si256(out, join16(&j16, a));
            _mm256_store_si256(out + 1, join16(&j16, b));
        } else {
            __m256i *out = (__m256i *)buf + 4 * i, c, d, x, y;
            INTERLEAVE(8, load256(s->bytes + at), load256(s->bytes + s->byte_stride + at), a, b)
            INTERLEAVE(8, load256(s->bytes + 2 * s->byte_stride + at), high, c, d)
            INTERLEAVE(16, a, c, x, y)
            _mm256_store_si256(out, join32(&j32, x));
            _mm256_store_si256(out + 1, join32(&j32, y));
            INTERLEAVE(16, b, d, x, y)
            _mm256_store_si256(out + 2, join32(&j32, x));
            _mm256_store_si256(out + 3, join32(&j32, y));
        }
    }
}

static TARGET void copy_streaming(void *dst, const void *src, size_t nbytes) {
    uint8_t *d = dst;
    const uint8_t *s = src;
    size_t head = (size_t)(-(uintptr_t)d & 63);
    if (head > nbytes) head = nbytes;
    memcpy(d, s, head);
    d += head, s += head, nbytes -= head;
    for (; nbytes >= 128; nbytes -= 128, d += 128, s += 128) {
        __m256i a = load256(s), b = load256(s + 32), c = load256(s + 64), e = load256(s + 96);
        _mm256_stream_si256((__m256i *)d, a);
        _mm256_stream_si256((__m256i *)(d + 32), b);
        _mm256_stream_si256((__m256i *)(d + 64), c);
        _mm256_stream_si256((__m256i *)(d + 96), e);
    }
    memcpy(d, s, nbytes);
}

static TARGET uint64_t read_words(const void *src, size_t nbytes) {
    const uint8_t *s = src;
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (size_t i = 0; i + 128 <= nbytes; i += 128) {
        for (int j = 0; j < 4; j++) sum[j] = _mm256_xor_si256(sum[j], load256(s + i + 32 * j));
    }
    sum[0] = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
    uint64_t words[4], total = 0;
    _mm256_storeu_si256((__m256i *)words, sum[0]);
    for (int i = 0; i < 4; i++) total ^= words[i];
    for (size_t i = nbytes / 128 * 128; i + 8 <= nbytes; i += 8) total ^= load64(s + i);
    return total;
}

static TARGET void fence(void) { _mm_sfence(); }

static endor_ops ops = {
    .name = "avx2",
    .expand = {expand8, expand16, expand32},
    .stream = stream,
    .scan = {endor_avx2_scan8, endor_avx2_scan16, endor_avx2_scan32},
    .compress = {endor_avx2_compress8, endor_avx2_compress16, endor_avx2_compress32},
    .histogram = endor_avx2_histogram,
    .split = endor_avx2_split,
    .split_words = endor_avx2_split_words,
    .copy_streaming = copy_streaming,
    .read = read_words,
    .fence = fence,
    .dot = endor_avx2_dot,
    .rows = endor_avx2_rows,
    .row_runs = endor_avx2_row_runs,
    .popcount = endor_avx2_popcount,
};

static int supported;

static void probe(void) {
    supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    fill_tables();
    endor_avx2_fill_gather();
}

const endor_ops *endor_avx2_ops(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, probe);
    return supported ? &ops : NULL;
}

#else

const endor_ops *endor_avx2_ops(void) { return NULL; }

#endif
