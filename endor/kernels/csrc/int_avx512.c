/* Codec `int` with AVX-512: 32 lanes are two registers of states, and the words that lanes need are one `vpexpandd`.
 * Low bits are few, and stay with the AVX2 kernel; so does coding, whose table `vpgatherdd` reads more slowly than single loads
 * do (Zen 5: 1.0 G codes/s against 1.5). */
#include "int.h"

#if defined(__x86_64__)
#include "avx512.h"

static TARGET const uint8_t *rows(const uint32_t *table, uint32_t *states, const uint8_t *words, uint64_t count,
                                  uint8_t *symbols) {
    const __m512i slots = _mm512_set1_epi32(ENDOR_SCALE - 1), lowest = _mm512_set1_epi32(ENDOR_LOWEST);
    __m512i x[2] = {_mm512_loadu_si512(states), _mm512_loadu_si512(states + 16)};
    for (uint64_t row = 0; row < count; row++, symbols += ENDOR_LANES) {
        for (int j = 0; j < 2; j++) {
            __m512i entry = _mm512_i32gather_epi32(_mm512_and_si512(x[j], slots), table, 4);
            __m512i factor = _mm512_srli_epi32(entry, 20), bias = _mm512_and_si512(_mm512_srli_epi32(entry, 8), slots);
            _mm_storeu_si128((__m128i *)(symbols + 16 * j), _mm512_cvtepi32_epi8(entry));
            __m512i y = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_srli_epi32(x[j], 12), factor), bias);
            __mmask16 need = _mm512_cmplt_epu32_mask(y, lowest);
            __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)words));
            next = ZEROED("vpexpandd", need, next);
            x[j] = _mm512_mask_or_epi32(y, need, _mm512_slli_epi32(y, 16), next);
            words += 2 * __builtin_popcount(need);
        }
    }
    _mm512_storeu_si512(states, x[0]);
    _mm512_storeu_si512(states + 16, x[1]);
    return words;
}

INLINE TARGET __m512i codes_at(const endor_values *v, uint64_t i) {
    __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(v->symbols + i)));
    code = _mm512_add_epi32(code, _mm512_set1_epi32(v->base));
    if (!v->low) return code;
    code = _mm512_sll_epi32(code, _mm_cvtsi32_si128(v->shift));
    return _mm512_or_si512(code, _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(v->low + i))));
}

/* Codes, or the levels that symbols stand for. */
INLINE TARGET __m512 numbers_at(const endor_values *v, uint64_t i) {
    if (!v->levels) return _mm512_cvtepi32_ps(codes_at(v, i));
    __m512i symbols = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(v->symbols + i)));
    return _mm512_i32gather_ps(symbols, v->levels, 4);
}

static TARGET void values(const endor_values *v, uint64_t n, void *out) {
    uint8_t *to = out;
    for (uint64_t i = 0; i < n; i += 16) {
        if (v->kind == ENDOR_CODES) {
            _mm512_storeu_si512(to + 4 * i, codes_at(v, i));
            continue;
        }
        __m512 value = _mm512_mul_ps(numbers_at(v, i), _mm512_loadu_ps(v->steps + i));
        if (v->kind == ENDOR_F32) {
            _mm512_storeu_ps(to + 4 * i, value);
        } else if (v->kind == ENDOR_F16) {
            _mm256_storeu_si256((__m256i *)(to + 2 * i), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
        } else {
            /* what vcvtneps2bf16 gives, on CPUs without it too */
            __m512i bits = _mm512_castps_si512(value);
            __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            _mm256_storeu_si256((__m256i *)(to + 2 * i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
        }
    }
}

const endor_int_ops *endor_int_avx512_ops(void) {
    static const endor_int_ops ops = {rows, endor_int_avx2_low, values, endor_int_avx2_code};
    endor_int_avx2_ops(); /* fills the tables that its functions read */
    return &ops;
}
#else
const endor_int_ops *endor_int_avx512_ops(void) { return NULL; }
#endif
