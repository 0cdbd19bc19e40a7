/* AVX2: finding and gathering stored elements, eight at a time, by byte shuffles whose control comes from a table indexed
 * by eight bitmap bits. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx2.h"

/* For eight bitmap bits: the places of the set ones, then 0x80; as bytes, and as the two bytes of 16-bit elements. */
static struct {
    uint64_t bytes[256];
    uint8_t words[256][16];
} gather_table ENDOR_ALIGNED;

void endor_avx2_fill_gather(void) {
    for (int m = 0; m < 256; m++) {
        uint8_t places[8];
        int k = 0;
        memset(places, 0x80, 8);
        for (int i = 0; i < 8; i++) {
            if (m >> i & 1) places[k++] = (uint8_t)i;
        }
        memcpy(&gather_table.bytes[m], places, 8);
        for (int i = 0; i < 16; i++) {
            gather_table.words[m][i] = places[i / 2] & 0x80 ? 0x80 : (uint8_t)(2 * places[i / 2] + (i & 1));
        }
    }
}

INLINE TARGET uint32_t nonzero8(const uint8_t *s) { /* of 32 elements */
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(load256(s), _mm256_setzero_si256()));
}

INLINE TARGET uint32_t nonzero16(const uint16_t *s) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i a = _mm256_cmpeq_epi16(load256(s), zero), b = _mm256_cmpeq_epi16(load256(s + 16), zero);
    __m256i x = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
    return ~(uint32_t)_mm256_movemask_epi8(x);
}

INLINE TARGET uint32_t nonzero32(const uint32_t *s) {
    uint32_t m = 0;
    for (int i = 0; i < 4; i++) {
        __m256i x = _mm256_cmpeq_epi32(load256(s + 8 * i), _mm256_setzero_si256());
        m |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(x)) << 8 * i;
    }
    return ~m;
}

#define SCAN(BITS)                                                                                                \
    TARGET uint32_t endor_avx2_scan##BITS(const void *src, uint8_t *bitmap) {                                         \
        uint32_t total = 0;                                                                                       \
        for (int i = 0; i < ENDOR_TILE / 32; i++) {                                                               \
            uint32_t m = nonzero##BITS((const uint##BITS##_t *)src + 32 * i);                                     \
            store32(bitmap + 4 * i, m);                                                                           \
            total += count(m);                                                                                    \
        }                                                                                                         \
        return total;                                                                                             \
    }
SCAN(8)
SCAN(16)
SCAN(32)

TARGET uint32_t endor_avx2_compress8(const uint8_t *bitmap, const void *src, void *dst) {
    uint8_t *d = dst;
    for (int i = 0; i < ENDOR_TILE / 8; i++) {
        uint32_t m = bitmap[i];
        __m128i x = _mm_loadl_epi64((const __m128i *)((const uint8_t *)src + 8 * i));
        _mm_storel_epi64((__m128i *)d, _mm_shuffle_epi8(x, _mm_cvtsi64_si128((long long)gather_table.bytes[m])));
        d += count(m);
    }
    return (uint32_t)(d - (uint8_t *)dst);
}

TARGET uint32_t endor_avx2_compress16(const uint8_t *bitmap, const void *src, void *dst) {
    uint16_t *d = dst;
    for (int i = 0; i < ENDOR_TILE / 8; i++) {
        uint32_t m = bitmap[i];
        __m128i x = load128((const uint16_t *)src + 8 * i);
        _mm_storeu_si128((__m128i *)d, _mm_shuffle_epi8(x, load128(gather_table.words[m])));
        d += count(m);
    }
    return (uint32_t)(d - (uint16_t *)dst);
}

TARGET uint32_t endor_avx2_compress32(const uint8_t *bitmap, const void *src, void *dst) {
    uint32_t *d = dst;
    for (int i = 0; i < ENDOR_TILE / 8; i++) {
        uint32_t m = bitmap[i];
        __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)gather_table.bytes[m]));
        __m256i x = load256((const uint32_t *)src + 8 * i);
        _mm256_storeu_si256((__m256i *)d, _mm256_permutevar8x32_epi32(x, index));
        d += count(m);
    }
    return (uint32_t)(d - (uint32_t *)dst);
}

#endif
