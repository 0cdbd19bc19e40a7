/* AVX-512: finding, gathering and splitting stored elements. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx512.h"

INLINE TARGET uint64_t nonzero8(const uint8_t *s) {
    __m512i a = _mm512_loadu_si512(s);
    return _mm512_test_epi8_mask(a, a);
}

INLINE TARGET uint64_t nonzero16(const uint16_t *s) {
    __m512i a = _mm512_loadu_si512(s), b = _mm512_loadu_si512(s + 32);
    return _mm512_test_epi16_mask(a, a) | (uint64_t)_mm512_test_epi16_mask(b, b) << 32;
}

INLINE TARGET uint64_t nonzero32(const uint32_t *s) {
    uint64_t m = 0;
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_loadu_si512(s + 16 * i);
        m |= (uint64_t)_mm512_test_epi32_mask(a, a) << 16 * i;
    }
    return m;
}

#define SCAN(BITS)                                                                                                \
    TARGET uint32_t endor_avx512_scan##BITS(const void *src, uint8_t *bitmap) {                                         \
        const uint##BITS##_t *s = src;                                                                            \
        uint32_t total = 0;                                                                                       \
        for (int w = 0; w < ENDOR_WORDS; w++) {                                                                   \
            uint64_t m = nonzero##BITS(s + 64 * w);                                                               \
            store64(bitmap + 8 * w, m);                                                                           \
            total += count(m);                                                                                    \
        }                                                                                                         \
        return total;                                                                                             \
    }
SCAN(8)
SCAN(16)
SCAN(32)

TARGET uint32_t endor_avx512_compress8(const uint8_t *bitmap, const void *src, void *dst) {
    uint8_t *d = dst;
    for (int w = 0; w < ENDOR_WORDS; w++) {
        uint64_t m = load64(bitmap + 8 * w);
        _mm512_storeu_si512(d, compress_b(m, load((const uint8_t *)src + 64 * w)));
        d += count(m);
    }
    return (uint32_t)(d - (uint8_t *)dst);
}

INLINE TARGET __m512i exponents16(const uint16_t *s, __m128i shift, __m512i mask) { /* of 64 elements, in any order */
    __m512i a = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(s), shift), mask);
    __m512i b = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(s + 32), shift), mask);
    return _mm512_packus_epi16(a, b);
}

INLINE TARGET __m512i exponents32(const uint32_t *s, __m128i shift, __m512i mask) {
    __m512i e[4];
    for (int i = 0; i < 4; i++) e[i] = _mm512_and_si512(_mm512_srl_epi32(_mm512_loadu_si512(s + 16 * i), shift), mask);
    return _mm512_packus_epi16(_mm512_packus_epi32(e[0], e[1]), _mm512_packus_epi32(e[2], e[3]));
}

INLINE TARGET uint32_t max_byte(__m512i x) {
    __m256i y = _mm256_max_epu8(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i z = _mm_max_epu8(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epu8(z, _mm_srli_epi16(z, 8));
    /* the low byte of each 16 bits; minpos finds a minimum */
    z = _mm_xor_si128(_mm_and_si128(z, _mm_set1_epi16(0xff)), _mm_set1_epi16(0xff));
    return 0xff ^ (uint32_t)_mm_extract_epi16(_mm_minpos_epu16(z), 0);
}

/* Weights crowd into few exponents, and counting one by one would wait for the same counter again and again. So count
 * each of the highest 12 exponents of the tile by comparison, zeros as what is left, and the few between one by one. */
#define COMPARED 12
TARGET void endor_avx512_histogram(const void *src, int itemsize, int exponent_bits, int mantissa_bits, uint32_t *hist) {
    ENDOR_ALIGNED uint8_t e[ENDOR_TILE];
    const __m128i shift = _mm_cvtsi32_si128(mantissa_bits);
    const uint32_t field = (1u << exponent_bits) - 1;
    __m512i x[ENDOR_TILE / 64], most = _mm512_setzero_si512();
    for (size_t i = 0; i < ENDOR_TILE / 64; i++) {
        if (itemsize == 2) x[i] = exponents16((const uint16_t *)src + 64 * i, shift, _mm512_set1_epi16((short)field));
        else if (itemsize == 4) x[i] = exponents32((const uint32_t *)src + 64 * i, shift, _mm512_set1_epi32((int)field));
        else x[i] = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512((const uint8_t *)src + 64 * i), shift),
                                     _mm512_set1_epi8((char)field));
        most = _mm512_max_epu8(most, x[i]);
    }
    uint32_t top = max_byte(most), left = ENDOR_TILE, compared = top < COMPARED ? top : COMPARED;
    for (uint32_t c = 0; c < compared; c++) {
        const __m512i value = _mm512_set1_epi8((char)(top - c));
        uint32_t found = 0;
        for (size_t i = 0; i < ENDOR_TILE / 64; i++) found += count(_mm512_cmpeq_epi8_mask(x[i], value));
        hist[top - c] += found;
        left -= found;
    }
    const __m512i low = _mm512_set1_epi8((char)(top - compared));
    uint32_t *more = hist + 256;
    for (size_t i = 0; i < ENDOR_TILE / 64; i++) {
        uint64_t m = _mm512_cmple_epu8_mask(x[i], low) & _mm512_test_epi8_mask(x[i], x[i]);
        if (!m) continue;
        _mm512_store_si512(e + 64 * i, x[i]);
        left -= count(m);
        for (; m; m &= m - 1) {
            more[e[64 * i + (size_t)__builtin_ctzll(m)]]++;
            more = more == hist + 768 ? hist + 256 : more + 256;
        }
    }
    hist[0] += left;
}

/* Exponent codes of 64 one-byte exponent fields; *outside = those not in the window. */
INLINE TARGET __m512i codes_of(const endor_stream *s, __m512i exponents, uint64_t *outside) {
    __m512i code = _mm512_sub_epi8(exponents, _mm512_set1_epi8((char)s->base));
    __mmask64 inside = s->k == 8 ? ~0ull : _mm512_cmplt_epu8_mask(code, _mm512_set1_epi8((char)(1 << s->k)));
    *outside = ~inside;
    return _mm512_maskz_mov_epi8(inside, code);
}

INLINE TARGET __m512i even_bytes(__m512i a, __m512i b, int odd) {
    uint8_t index[64];
    for (int i = 0; i < 64; i++) index[i] = (uint8_t)(2 * i + odd);
    return _mm512_permutex2var_epi8(a, _mm512_loadu_si512(index), b);
}

INLINE TARGET uint64_t split(const endor_stream *s, const void *src, endor_slots *slots) {
    const int m = s->mantissa_bits;
    const uint32_t field = (1u << s->exponent_bits) - 1, fraction = (1u << m) - 1;
    const __m128i m_shift = _mm_cvtsi32_si128(m), r_shift = _mm_cvtsi32_si128(s->rest_bits);
    const __m128i sign_shift = _mm_cvtsi32_si128(8 * s->itemsize - 1 - m);
    __m512i high;
    uint64_t outside;
    if (s->itemsize == 1) {
        __m512i x = _mm512_loadu_si512(src);
        __m512i e = _mm512_and_si512(_mm512_srl_epi16(x, m_shift), _mm512_set1_epi8((char)field));
        high = _mm512_sll_epi16(codes_of(s, e, &outside), r_shift);
        if (s->rest_bits) {
            __m512i sign = _mm512_and_si512(_mm512_srl_epi16(x, sign_shift), _mm512_set1_epi8((char)(1 << m)));
            x = _mm512_and_si512(x, _mm512_set1_epi8((char)fraction));
            high = _mm512_or_si512(high, _mm512_or_si512(sign, x));
        }
    } else if (s->itemsize == 2) {
        __m512i w[2], e[2];
        for (int i = 0; i < 2; i++) {
            __m512i x = _mm512_loadu_si512((const uint16_t *)src + 32 * i);
            e[i] = _mm512_and_si512(_mm512_srl_epi16(x, m_shift), _mm512_set1_epi16((short)field));
            __m512i sign = _mm512_and_si512(_mm512_srl_epi16(x, sign_shift), _mm512_set1_epi16((short)(1 << m)));
            w[i] = _mm512_or_si512(sign, _mm512_and_si512(x, _mm512_set1_epi16((short)fraction)));
        }
        __m512i code = codes_of(s, even_bytes(e[0], e[1], 0), &outside);
        _mm512_storeu_si512(slots->bytes[0], even_bytes(w[0], w[1], 0));
        /* the bits of rest above the byte stand below the code */
        high = _mm512_or_si512(_mm512_sll_epi16(code, _mm_cvtsi32_si128(s->rest_bits - 8)), even_bytes(w[0], w[1], 1));
    } else {
        __m128i b[3][4], e[4];
        for (int i = 0; i < 4; i++) {
            __m512i x = _mm512_loadu_si512((const uint32_t *)src + 16 * i);
            e[i] = _mm512_cvtepi32_epi8(_mm512_and_si512(_mm512_srl_epi32(x, m_shift), _mm512_set1_epi32((int)field)));
            __m512i sign = _mm512_and_si512(_mm512_srl_epi32(x, sign_shift), _mm512_set1_epi32(1 << m));
            __m512i w = _mm512_or_si512(sign, _mm512_and_si512(x, _mm512_set1_epi32((int)fraction)));
            b[0][i] = _mm512_cvtepi32_epi8(w);
            b[1][i] = _mm512_cvtepi32_epi8(_mm512_srli_epi32(w, 8));
            b[2][i] = _mm512_cvtepi32_epi8(_mm512_srli_epi32(w, 16));
        }
        for (int j = 0; j < 3; j++) {
            for (int i = 0; i < 4; i++) _mm_storeu_si128((__m128i *)(slots->bytes[j] + 16 * i), b[j][i]);
        }
        high = codes_of(s, _mm512_loadu_si512(e), &outside);
    }
    for (int j = 0; j < s->bit_planes; j++) {
        slots->planes[j] = _mm512_test_epi8_mask(high, _mm512_set1_epi8((char)(1 << j)));
    }
    return outside;
}

TARGET uint64_t endor_avx512_split(const endor_stream *s, const void *src, endor_slots *slots) {
    return split(s, src, slots);
}

TARGET void endor_avx512_split_words(const endor_stream *s, const void *src, int cached, uint64_t word, uint64_t words,
                                     uint64_t *outside, uint64_t *counts) {
    (void)cached;
    const uint64_t word_bytes = 64 * (uint64_t)s->itemsize;
    for (uint64_t i = 0; i < words; i++) {
        endor_slots slots;
        for (int j = 0; j < s->byte_planes; j++) {
            slots.bytes[j] = (uint8_t *)s->bytes + j * s->byte_stride + 64 * (word + i);
        }
        outside[i] = split(s, (const uint8_t *)src + i * word_bytes, &slots);
        for (int j = 0; j < s->bit_planes; j++) {
            store64((uint8_t *)s->planes + j * s->plane_stride + 8 * (word + i), slots.planes[j]);
        }
        if (counts) endor_tally(slots.planes + s->rest_bits % 8, s->k, counts);
    }
}

#endif
