/* Codec `int` with AVX2 (and BMI2, F16C): 32 lanes are four registers of states.
 *
 * Table entries are fetched one by one: `vpgatherdd` takes longer on Zen 2 to 4, and on Intel since its microcode was
 * mended against Downfall (measured on Zen 3, decoding and conversion together: 1.17 G weights/s against 0.80).
 */
#include "int.h"

#if defined(__x86_64__)
#include "avx2.h"

#include <pthread.h>
#include "glibc.h"

static uint8_t spread_words[256][16] ENDOR_ALIGNED; /* by the lanes that need a word: shuffle of the next words */
static uint8_t gather_words[256][16] ENDOR_ALIGNED; /* by the lanes that a word leaves: brings them to the end */

static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++) {
        uint8_t next = 0;
        int first = 16 - 2 * __builtin_popcount((unsigned)mask);
        for (int i = 0; i < first; i++) gather_words[mask][i] = 0x80;
        for (int i = 0; i < 8; i++) {
            int need = mask >> i & 1;
            spread_words[mask][2 * i] = need ? next : 0x80;
            spread_words[mask][2 * i + 1] = need ? (uint8_t)(next + 1) : 0x80;
            for (int j = 0; need && j < 2; j++) gather_words[mask][first + next + j] = (uint8_t)(2 * i + j);
            next = (uint8_t)(next + 2 * need);
        }
    }
}

INLINE TARGET __m256i look_up(const uint32_t *table, __m256i index) {
    __m128i low = _mm256_castsi256_si128(index), high = _mm256_extracti128_si256(index, 1);
    uint64_t a = (uint64_t)_mm_cvtsi128_si64(low), b = (uint64_t)_mm_extract_epi64(low, 1);
    uint64_t c = (uint64_t)_mm_cvtsi128_si64(high), d = (uint64_t)_mm_extract_epi64(high, 1);
    __m128i x = _mm_cvtsi32_si128((int)table[(uint32_t)a]), y = _mm_cvtsi32_si128((int)table[(uint32_t)c]);
    x = _mm_insert_epi32(x, (int)table[a >> 32], 1);
    y = _mm_insert_epi32(y, (int)table[c >> 32], 1);
    x = _mm_insert_epi32(x, (int)table[(uint32_t)b], 2);
    y = _mm_insert_epi32(y, (int)table[(uint32_t)d], 2);
    x = _mm_insert_epi32(x, (int)table[b >> 32], 3);
    y = _mm_insert_epi32(y, (int)table[d >> 32], 3);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(x), y, 1);
}

static TARGET const uint8_t *rows(const uint32_t *table, uint32_t *states, const uint8_t *words, uint64_t count,
                                  uint8_t *symbols) {
    const __m256i slots = _mm256_set1_epi32(ENDOR_SCALE - 1), byte = _mm256_set1_epi32(0xff);
    const __m256i zero = _mm256_setzero_si256(), sixteen = _mm256_set1_epi32(16);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i x[4];
    for (int j = 0; j < 4; j++) x[j] = _mm256_loadu_si256((const __m256i *)(states + 8 * j));
    for (uint64_t row = 0; row < count; row++, symbols += ENDOR_LANES) {
        __m256i s[4];
        for (int j = 0; j < 4; j++) {
            __m256i entry = look_up(table, _mm256_and_si256(x[j], slots));
            __m256i factor = _mm256_srli_epi32(entry, 20), bias = _mm256_and_si256(_mm256_srli_epi32(entry, 8), slots);
            s[j] = _mm256_and_si256(entry, byte);
            __m256i y = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_srli_epi32(x[j], 12), factor), bias);
            __m256i need = _mm256_cmpeq_epi32(_mm256_srli_epi32(y, 16), zero);
            unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(need));
            __m128i next = _mm_loadu_si128((const __m128i *)words);
            next = _mm_shuffle_epi8(next, _mm_load_si128((const __m128i *)spread_words[mask]));
            y = _mm256_sllv_epi32(y, _mm256_and_si256(need, sixteen));
            x[j] = _mm256_or_si256(y, _mm256_cvtepu16_epi32(next));
            words += 2 * __builtin_popcount(mask);
        }
        __m256i low = _mm256_packus_epi32(s[0], s[1]), high = _mm256_packus_epi32(s[2], s[3]);
        __m256i all = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
        _mm256_storeu_si256((__m256i *)symbols, all);
    }
    for (int j = 0; j < 4; j++) _mm256_storeu_si256((__m256i *)(states + 8 * j), x[j]);
    return words;
}

TARGET void endor_int_avx2_low(const uint8_t *bits, int shift, uint64_t n, uint8_t *out) {
    const uint64_t spots = ((1ull << shift) - 1) * 0x0101010101010101ull;
    for (uint64_t i = 0; i < n; i += 8, bits += shift) {
        store64(out + i, _pdep_u64(load64(bits), spots));
    }
}

INLINE TARGET __m256i codes_at(const endor_values *v, uint64_t i, int with_low) {
    __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(v->symbols + i)));
    code = _mm256_add_epi32(code, _mm256_set1_epi32(v->base));
    if (!with_low) return code;
    code = _mm256_sll_epi32(code, _mm_cvtsi32_si128(v->shift));
    return _mm256_or_si256(code, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(v->low + i))));
}

enum { PLAIN, WITH_LOW, LEVELS }; /* what numbers are made of: symbols, low bits too, or a table */

INLINE TARGET __m256 numbers_at(const endor_values *v, uint64_t i, int how) {
    if (how != LEVELS) return _mm256_cvtepi32_ps(codes_at(v, i, how == WITH_LOW));
    __m256i symbols = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(v->symbols + i)));
    return _mm256_i32gather_ps(v->levels, symbols, 4);
}

INLINE TARGET __m256i bf16_at(const endor_values *v, uint64_t i, int how) {
    __m256 value = _mm256_mul_ps(numbers_at(v, i, how), _mm256_loadu_ps(v->steps + i));
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_srli_epi32(bits, 16);
}

INLINE TARGET void values_of(const endor_values *v, uint64_t n, uint8_t *out, int kind, int how) {
    for (uint64_t i = 0; i < n; i += 16) {
        if (kind == ENDOR_BF16) {
            __m256i both = _mm256_packus_epi32(bf16_at(v, i, how), bf16_at(v, i + 8, how));
            _mm256_storeu_si256((__m256i *)(out + 2 * i), _mm256_permute4x64_epi64(both, 0xd8));
            continue;
        }
        for (uint64_t j = i; j < i + 16; j += 8) {
            if (kind == ENDOR_CODES) {
                _mm256_storeu_si256((__m256i *)(out + 4 * j), codes_at(v, j, how == WITH_LOW));
                continue;
            }
            __m256 value = _mm256_mul_ps(numbers_at(v, j, how), _mm256_loadu_ps(v->steps + j));
            if (kind == ENDOR_F32) _mm256_storeu_ps((float *)(out + 4 * j), value);
            else _mm_storeu_si128((__m128i *)(out + 2 * j), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
        }
    }
}

static TARGET void values(const endor_values *v, uint64_t n, void *out) {
    int how = v->levels ? LEVELS : v->low ? WITH_LOW : PLAIN;
    if (v->kind == ENDOR_BF16 && how == PLAIN) values_of(v, n, out, ENDOR_BF16, PLAIN);
    else if (v->kind == ENDOR_BF16 && how == LEVELS) values_of(v, n, out, ENDOR_BF16, LEVELS);
    else if (v->kind == ENDOR_BF16) values_of(v, n, out, ENDOR_BF16, WITH_LOW);
    else if (v->kind == ENDOR_F16) values_of(v, n, out, ENDOR_F16, how);
    else if (v->kind == ENDOR_F32) values_of(v, n, out, ENDOR_F32, how);
    else values_of(v, n, out, ENDOR_CODES, how);
}

/* A state below frequency << 20 is divided in float32: the ratio, below 2^20, is wrong by at most 2^-3 (state and division
 * are rounded once each), so what is left of it after 1/4 is off ends at the quotient or at one less. */
TARGET uint16_t *endor_int_avx2_code(const uint32_t *table, uint32_t *states, const uint8_t *symbols, uint64_t rows,
                                     uint16_t *at) {
    const __m256i low = _mm256_set1_epi32(0xffff), zero = _mm256_setzero_si256(), sixteen = _mm256_set1_epi32(16);
    const __m256i scale = _mm256_set1_epi32(ENDOR_SCALE);
    __m256i x[4];
    for (int j = 0; j < 4; j++) x[j] = _mm256_loadu_si256((const __m256i *)(states + 8 * j));
    for (symbols += rows * ENDOR_LANES; rows--;) {
        symbols -= ENDOR_LANES;
        for (int j = 4; j--;) {
            __m256i entry = look_up(table, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(symbols + 8 * j))));
            __m256i frequency = _mm256_and_si256(entry, low), limit = _mm256_slli_epi32(entry, 20);
            __m256i leaves = _mm256_cmpeq_epi32(_mm256_max_epu32(x[j], limit), x[j]);
            unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(leaves));
            __m256i half = _mm256_blend_epi16(x[j], zero, 0xaa);
            __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
            words = _mm_shuffle_epi8(words, _mm_load_si128((const __m128i *)gather_words[mask]));
            _mm_storeu_si128((__m128i *)(at - 8), words);
            at -= __builtin_popcount(mask);
            __m256i y = _mm256_srlv_epi32(x[j], _mm256_and_si256(leaves, sixteen));
            __m256 whole = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(y, 16)), _mm256_set1_ps(65536),
                                           _mm256_cvtepi32_ps(_mm256_blend_epi16(y, zero, 0xaa)));
            __m256 ratio = _mm256_div_ps(whole, _mm256_cvtepi32_ps(frequency));
            __m256i quotient = _mm256_cvttps_epi32(_mm256_sub_ps(ratio, _mm256_set1_ps(0.25f)));
            __m256i rest = _mm256_sub_epi32(y, _mm256_mullo_epi32(quotient, frequency));
            __m256i under = _mm256_cmpgt_epi32(frequency, rest);
            y = _mm256_add_epi32(_mm256_slli_epi32(quotient, 12), _mm256_add_epi32(rest, _mm256_srli_epi32(entry, 16)));
            x[j] = _mm256_add_epi32(y, _mm256_andnot_si256(under, _mm256_sub_epi32(scale, frequency)));
        }
    }
    for (int j = 0; j < 4; j++) _mm256_storeu_si256((__m256i *)(states + 8 * j), x[j]);
    return at;
}

const endor_int_ops *endor_int_avx2_ops(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    static const endor_int_ops ops = {rows, endor_int_avx2_low, values, endor_int_avx2_code};
    pthread_once(&once, fill_tables);
    return &ops;
}
#else
const endor_int_ops *endor_int_avx2_ops(void) { return NULL; }
#endif
