/* AVX2: placing stored elements by the bitmap, eight at a time, by byte shuffles whose control comes from a table indexed
 * by eight bitmap bits. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx2.h"

INLINE TARGET void store128(void *p, __m128i x, int streaming) {
    if (streaming) _mm_stream_si128(p, x);
    else _mm_storeu_si128(p, x);
}

/* Where the eighth i of a word finds its stored elements: the bits before it. Counted for each eighth from the word, not
 * from the eighth before, or each would wait for the last. */
INLINE TARGET uint32_t before(uint64_t word, int i) { return i ? count(word << (64 - 8 * i)) : 0; }

/* Bytes of values ahead: past the page at which the hardware stops. */
#define AHEAD 4096

INLINE TARGET uint32_t eighth(uint64_t word, int i) { return (uint8_t)(word >> 8 * i); }

INLINE TARGET uint32_t expand8_of(const uint8_t *bitmap, const uint8_t *v, uint8_t *out, int streaming) {
    const uint8_t *v0 = v;
    for (int w = 0; w < ENDOR_WORDS; w++, out += 64) {
        uint64_t word = load64(bitmap + 8 * w);
        _mm_prefetch((const char *)v + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            uint32_t a = eighth(word, i), b = eighth(word, i + 1);
            /* 0x80 entries keep their top bit: at most 8 is added */
            uint64_t second = endor_avx2_tables.place[b] + 0x0101010101010101u * count(a);
            __m128i control = _mm_set_epi64x((long long)second, (long long)endor_avx2_tables.place[a]);
            store128(out + 8 * i, _mm_shuffle_epi8(load128(v + before(word, i)), control), streaming);
        }
        v += count(word);
    }
    return (uint32_t)(v - v0);
}

INLINE TARGET uint32_t expand16_of(const uint8_t *bitmap, const uint16_t *v, uint16_t *out, int streaming) {
    const uint16_t *v0 = v;
    for (int w = 0; w < ENDOR_WORDS; w++, out += 64) {
        uint64_t word = load64(bitmap + 8 * w);
        _mm_prefetch((const char *)v + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m128i control = load128(endor_avx2_tables.place16[eighth(word, i)]);
            store128(out + 8 * i, _mm_shuffle_epi8(load128(v + before(word, i)), control), streaming);
        }
        v += count(word);
    }
    return (uint32_t)(v - v0);
}

INLINE TARGET uint32_t expand32_of(const uint8_t *bitmap, const uint32_t *v, uint32_t *out, int streaming) {
    const uint32_t *v0 = v;
    for (int w = 0; w < ENDOR_WORDS; w++, out += 64) {
        uint64_t word = load64(bitmap + 8 * w);
        _mm_prefetch((const char *)v + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)v + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m128i place = _mm_loadl_epi64((const __m128i *)&endor_avx2_tables.place[eighth(word, i)]);
            __m256i index = _mm256_cvtepi8_epi32(place), x = load256(v + before(word, i));
            x = _mm256_permutevar8x32_epi32(x, index);
            x = _mm256_andnot_si256(_mm256_srai_epi32(index, 31), x);
            store128(out + 8 * i, _mm256_castsi256_si128(x), streaming);
            store128(out + 8 * i + 4, _mm256_extracti128_si256(x, 1), streaming);
        }
        v += count(word);
    }
    return (uint32_t)(v - v0);
}

#define EXPAND(BITS)                                                                                              \
    TARGET uint32_t endor_avx2_expand##BITS(const uint8_t *bitmap, const void *v, void *out, int streaming) {         \
        return streaming ? expand##BITS##_of(bitmap, v, out, 1) : expand##BITS##_of(bitmap, v, out, 0);           \
    }
EXPAND(8)
EXPAND(16)
EXPAND(32)

#endif
