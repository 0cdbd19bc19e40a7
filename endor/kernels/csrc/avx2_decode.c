/* AVX2: placing stored elements by the bitmap, eight at a time, by byte shuffles whose control comes from a table indexed
 * by eight bitmap bits. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx2.h"

INLINE TARGET void store128(void *p, __m128i x, int streaming) {
    if (streaming) _mm_stream_si128(p, x);
    else _mm_storeu_si128(p, x);
}

/* Bytes of values ahead: past the page at which the hardware stops. */
#define AHEAD 4096

#define FOR_WORDS(...)                                                                                            \
    for (int w = 0; w < ENDOR_WORDS; w++, out += 64) {                                                            \
        uint64_t word = load64(bitmap + 8 * w), used = 0;                                                         \
        for (size_t i = 0; i < sizeof *v; i += 2) _mm_prefetch((const char *)v + AHEAD + 32 * i, _MM_HINT_T0);    \
        __VA_ARGS__                                                                                               \
        v += used;                                                                                                \
    }                                                                                                             \
    return (uint32_t)(v - start)

INLINE TARGET uint32_t expand8_of(const uint8_t *bitmap, const uint8_t *v, uint8_t *out, int streaming) {
    const uint8_t *start = v;
    FOR_WORDS(_Pragma("GCC unroll 4") for (int i = 0; i < 8; i += 2) {
        uint32_t a = (uint8_t)(word >> 8 * i), b = (uint8_t)(word >> (8 * i + 8)), n = count(a);
        /* the second eight's elements follow the first's; 0x80 keeps its top bit, for at most 8 is added */
        uint64_t second = endor_avx2_tables.place[b] + 0x0101010101010101u * n;
        __m128i control = _mm_set_epi64x((long long)second, (long long)endor_avx2_tables.place[a]);
        store128(out + 8 * i, _mm_shuffle_epi8(load128(v + used), control), streaming);
        used += n + count(b);
    });
}

INLINE TARGET uint32_t expand16_of(const uint8_t *bitmap, const uint16_t *v, uint16_t *out, int streaming) {
    const uint16_t *start = v;
    FOR_WORDS(_Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {
        uint64_t m = entry(word, i, 4);
        store128(out + 8 * i, _mm_shuffle_epi8(load128(v + used), place16(m)), streaming);
        used += count(m);
    });
}

INLINE TARGET uint32_t expand32_of(const uint8_t *bitmap, const uint32_t *v, uint32_t *out, int streaming) {
    const uint32_t *start = v;
    FOR_WORDS(_Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {
        uint64_t m = entry(word, i, 3);
        __m256i x = placed32(v + used, m);
        store128(out + 8 * i, _mm256_castsi256_si128(x), streaming);
        store128(out + 8 * i + 4, _mm256_extracti128_si256(x, 1), streaming);
        used += count(m);
    });
}

#define EXPAND(BITS)                                                                                              \
    TARGET uint32_t endor_avx2_expand##BITS(const uint8_t *bitmap, const void *v, void *out, int streaming) {         \
        return streaming ? expand##BITS##_of(bitmap, v, out, 1) : expand##BITS##_of(bitmap, v, out, 0);           \
    }
EXPAND(8)
EXPAND(16)
EXPAND(32)

#endif
