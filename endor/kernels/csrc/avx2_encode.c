/* AVX2: finding, gathering and splitting stored elements.
 *
 * Gathered eight at a time, by byte shuffles whose control comes from a table indexed by eight bitmap bits. `pext` would
 * need no table, but is microcode on Zen 1 and 2. Split 32 at a time: the exponents become one vector of bytes, and
 * `pmovmskb` takes a bit plane of it in one instruction. */
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

/* Bytes ahead of what is gathered or split, which keeps the core from running far enough ahead by itself to hide memory:
 * gathering took 14.1 ms without, 12.3 with 2, 4, 8 or 16 KB, for a weight whose copy takes 7.2. A prefetch past the end
 * of src does no harm. */
#define AHEAD 4096

INLINE TARGET void fetch_ahead(const uint8_t *s, int nbytes) {
    for (int i = 0; i < nbytes; i += 64) _mm_prefetch((const char *)s + AHEAD + i, _MM_HINT_T0);
}

/* Byte i of a bitmap word, times a power of two: the offset of its row in a table. Its bits can be counted like this. */
INLINE TARGET uint64_t scaled_byte(uint64_t word, int i, int log2_scale) {
    int right = 8 * i - log2_scale;
    return (right >= 0 ? word >> right : word << -right) & 0xffu << log2_scale;
}

TARGET uint32_t endor_avx2_compress8(const uint8_t *bitmap, const void *src, void *dst) {
    const uint8_t *s = src;
    uint8_t *d = dst;
    for (int w = 0; w < ENDOR_WORDS; w++, s += 64) {
        uint64_t word = load64(bitmap + 8 * w);
        fetch_ahead(s, 64);
        for (int i = 0; i < 8; i++) {
            uint64_t at = scaled_byte(word, i, 3);
            __m128i x = _mm_loadl_epi64((const __m128i *)(s + 8 * i));
            __m128i control = _mm_loadl_epi64((const __m128i *)((const uint8_t *)gather_table.bytes + at));
            _mm_storel_epi64((__m128i *)d, _mm_shuffle_epi8(x, control));
            d += count(at);
        }
    }
    return (uint32_t)(d - (uint8_t *)dst);
}

TARGET uint32_t endor_avx2_compress16(const uint8_t *bitmap, const void *src, void *dst) {
    const uint8_t *s = src;
    uint16_t *d = dst;
    for (int w = 0; w < ENDOR_WORDS; w++, s += 128) {
        uint64_t word = load64(bitmap + 8 * w);
        fetch_ahead(s, 128);
        for (int i = 0; i < 8; i++) {
            uint64_t at = scaled_byte(word, i, 4);
            __m128i control = load128((const uint8_t *)gather_table.words + at);
            _mm_storeu_si128((__m128i *)d, _mm_shuffle_epi8(load128(s + 16 * i), control));
            d += count(at);
        }
    }
    return (uint32_t)(d - (uint16_t *)dst);
}

TARGET uint32_t endor_avx2_compress32(const uint8_t *bitmap, const void *src, void *dst) {
    const uint8_t *s = src;
    uint32_t *d = dst;
    for (int w = 0; w < ENDOR_WORDS; w++, s += 256) {
        uint64_t word = load64(bitmap + 8 * w);
        fetch_ahead(s, 256);
        for (int i = 0; i < 8; i++) {
            uint64_t at = scaled_byte(word, i, 3);
            __m128i places = _mm_loadl_epi64((const __m128i *)((const uint8_t *)gather_table.bytes + at));
            __m256i x = _mm256_permutevar8x32_epi32(load256(s + 32 * i), _mm256_cvtepu8_epi32(places));
            _mm256_storeu_si256((__m256i *)d, x);
            d += count(at);
        }
    }
    return (uint32_t)(d - (uint32_t *)dst);
}

/* a and b packed to bytes, in order: pack works within 128-bit lanes. Elements are at most 255. */
INLINE TARGET __m256i narrow16(__m256i a, __m256i b) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
}

/* The bytes of 32 four-byte elements: byte j of each to b[j], in order. */
INLINE TARGET void bytes32(const uint32_t *s, __m256i *b) {
    const __m256i by_byte = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i v[4], l[2], h[2];
    for (int i = 0; i < 4; i++) v[i] = _mm256_shuffle_epi8(load256(s + 8 * i), by_byte);
    for (int i = 0; i < 2; i++) {
        l[i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        h[i] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    b[0] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(l[0], l[1]), order);
    b[1] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(l[0], l[1]), order);
    b[2] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(h[0], h[1]), order);
    b[3] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(h[0], h[1]), order);
}

/* Bytes shifted right by a number of bits, the field of `mask` kept. */
INLINE TARGET __m256i field8(__m256i x, __m128i shift, __m256i mask) {
    return _mm256_and_si256(_mm256_srl_epi16(x, shift), mask);
}

/* Exponent fields and rests of 32 elements whose upper two bytes are [sign | exponent | 7 bits of mantissa]: the sign and
 * the lowest exponent bit change bytes. */
INLINE TARGET __m256i bf16_exponents(__m256i high, __m256i low) {
    return _mm256_sub_epi8(_mm256_add_epi8(high, high), _mm256_cmpgt_epi8(_mm256_setzero_si256(), low));
}

INLINE TARGET __m256i bf16_rests(__m256i high, __m256i low) {
    const __m256i sign = _mm256_set1_epi8((char)0x80);
    return _mm256_or_si256(_mm256_and_si256(high, sign), _mm256_andnot_si256(sign, low));
}

/* Exponent fields of 32 elements. */
INLINE TARGET __m256i exponents(const void *src, int itemsize, int exponent_bits, int mantissa_bits) {
    const __m128i shift = _mm_cvtsi32_si128(mantissa_bits);
    const int field = (1 << exponent_bits) - 1;
    if (itemsize == 1) return field8(load256(src), shift, _mm256_set1_epi8((char)field));
    if (itemsize == 2) {
        const __m256i mask = _mm256_set1_epi16((short)field);
        __m256i a = _mm256_and_si256(_mm256_srl_epi16(load256(src), shift), mask);
        __m256i b = _mm256_and_si256(_mm256_srl_epi16(load256((const uint16_t *)src + 16), shift), mask);
        return narrow16(a, b);
    }
    __m256i b[4];
    bytes32(src, b);
    return bf16_exponents(b[3], b[2]);
}

INLINE TARGET uint32_t max_byte(__m256i x) {
    __m128i z = _mm_max_epu8(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    z = _mm_max_epu8(z, _mm_srli_epi16(z, 8));
    /* the low byte of each 16 bits; minpos finds a minimum */
    z = _mm_xor_si128(_mm_and_si128(z, _mm_set1_epi16(0xff)), _mm_set1_epi16(0xff));
    return 0xff ^ (uint32_t)_mm_extract_epi16(_mm_minpos_epu16(z), 0);
}

/* Sums of the bytes of a and of b, each at most 65535. */
INLINE TARGET uint64_t sums8(__m256i a, __m256i b) { /* the first in the lower half */
    const __m256i zero = _mm256_setzero_si256();
    __m256i sums = _mm256_packus_epi32(_mm256_sad_epu8(a, zero), _mm256_sad_epu8(b, zero));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_srli_epi64(sum, 32)); /* words 0 and 4 */
    return (uint32_t)_mm_extract_epi16(sum, 0) | (uint64_t)(uint32_t)_mm_extract_epi16(sum, 4) << 32;
}

/* Whole bytes are spread: one by one, in four tables. */
static void count_bytes(const uint8_t *src, uint32_t *hist) {
    for (size_t i = 0; i < ENDOR_TILE; i += 8) {
        uint64_t x = load64(src + i);
        for (int j = 0; j < 8; j++) hist[256 * (j & 3) + (x >> 8 * j & 0xff)]++;
    }
}

/* As in avx512_encode.c, the highest exponents of the tile are counted by comparison: two at a time, each vector being
 * loaded for both, until few elements are left. Those are counted one by one, zeros beforehand. */
#define COMPARED 12
#define FEW 16
TARGET void endor_avx2_histogram(const void *src, int itemsize, int exponent_bits, int mantissa_bits, uint32_t *hist) {
    enum { VECTORS = ENDOR_TILE / 32 };
    if (itemsize == 1 && !mantissa_bits) {
        count_bytes(src, hist);
        return;
    }
    const __m256i zero = _mm256_setzero_si256();
    __m256i x[VECTORS], most = zero, zeros = zero;
    for (size_t i = 0; i < VECTORS; i++) {
        x[i] = exponents((const uint8_t *)src + 32 * i * (size_t)itemsize, itemsize, exponent_bits, mantissa_bits);
        most = _mm256_max_epu8(most, x[i]);
        zeros = _mm256_sub_epi8(zeros, _mm256_cmpeq_epi8(x[i], zero)); /* at most VECTORS a byte */
    }
    uint32_t top = max_byte(most), none = (uint32_t)sums8(zeros, zero), left = ENDOR_TILE - none;
    uint32_t most_compared = top < COMPARED ? top : COMPARED, compared = 0;
    hist[0] += none;
    for (; compared < most_compared && left > FEW; compared += 2) {
        const __m256i first = _mm256_set1_epi8((char)(top - compared));
        const __m256i second = _mm256_set1_epi8((char)(top - compared - 1));
        __m256i a = zero, b = zero;
        for (size_t i = 0; i < VECTORS; i++) {
            a = _mm256_sub_epi8(a, _mm256_cmpeq_epi8(x[i], first));
            b = _mm256_sub_epi8(b, _mm256_cmpeq_epi8(x[i], second));
        }
        uint64_t found = sums8(a, b);
        hist[top - compared] += (uint32_t)found;
        left -= (uint32_t)found;
        if (top - compared == 1) break; /* the second was zero */
        hist[top - compared - 1] += (uint32_t)(found >> 32);
        left -= (uint32_t)(found >> 32);
    }
    if (!left) return;
    const __m256i above = _mm256_set1_epi8((char)(top - compared + 1)); /* counted, from here on */
    uint32_t *more = hist + 256;
    for (size_t i = 0; i < VECTORS; i++) {
        __m256i done = _mm256_cmpeq_epi8(_mm256_max_epu8(x[i], above), x[i]);
        if (!compared) done = zero;
        uint32_t m = ~(uint32_t)_mm256_movemask_epi8(_mm256_or_si256(done, _mm256_cmpeq_epi8(x[i], zero)));
        if (!m) continue;
        uint8_t e[32];
        _mm256_storeu_si256((__m256i *)e, x[i]);
        for (; m; m &= m - 1) {
            more[e[__builtin_ctz(m)]]++;
            more = more == hist + 768 ? hist + 256 : more + 256;
        }
    }
}

/* What splitting needs of a stream, as vectors. */
typedef struct {
    __m256i base, width; /* width: the highest code */
    __m256i exponent, fraction, sign;
    __m128i shift, sign_shift, rest_shift;
} splitter;

INLINE TARGET splitter splitter_of(const endor_stream *s) {
    const int field = (1 << s->exponent_bits) - 1, m = s->mantissa_bits;
    return (splitter){
        .base = _mm256_set1_epi8((char)s->base),
        .width = _mm256_set1_epi8((char)((1 << s->k) - 1)),
        .exponent = s->itemsize == 1 ? _mm256_set1_epi8((char)field) : _mm256_set1_epi16((short)field),
        .fraction = s->itemsize == 1 ? _mm256_set1_epi8((char)((1 << m) - 1)) : _mm256_set1_epi16((short)((1 << m) - 1)),
        .sign = s->itemsize == 1 ? _mm256_set1_epi8((char)(1 << m)) : _mm256_set1_epi16((short)(1 << m)),
        .shift = _mm_cvtsi32_si128(m),
        .sign_shift = _mm_cvtsi32_si128(8 * s->itemsize - 1 - m),
        .rest_shift = _mm_cvtsi32_si128(s->rest_bits % 8),
    };
}

INLINE TARGET __m256i codes_of(const splitter *p, __m256i exponent, uint32_t *outside) {
    __m256i code = _mm256_sub_epi8(exponent, p->base);
    __m256i inside = _mm256_cmpeq_epi8(_mm256_min_epu8(code, p->width), code);
    *outside = ~(uint32_t)_mm256_movemask_epi8(inside);
    return _mm256_and_si256(code, inside);
}

/* Kinds of elements that are split alike. */
enum { BYTES, HALVES, BF16, WORDS };

/* Byte planes of 32 elements to slots + at; returns the bytes whose bits are the bit planes. */
INLINE TARGET __m256i split32(int kind, const endor_stream *s, const splitter *p, const uint8_t *src,
                              uint8_t *const *slots, uint64_t at, uint32_t *outside) {
    if (kind == BYTES) {
        __m256i x = load256(src), code = codes_of(p, field8(x, p->shift, p->exponent), outside);
        if (!s->rest_bits) return code;
        __m256i rest = _mm256_or_si256(field8(x, p->sign_shift, p->sign), _mm256_and_si256(x, p->fraction));
        return _mm256_or_si256(_mm256_sll_epi16(code, p->rest_shift), rest); /* at most eight bits in all */
    }
    if (kind == HALVES) {
        __m256i e[2], rest[2], low[2];
        for (int i = 0; i < 2; i++) {
            __m256i x = load256(src + 32 * i);
            e[i] = _mm256_and_si256(_mm256_srl_epi16(x, p->shift), p->exponent);
            rest[i] = _mm256_or_si256(_mm256_and_si256(_mm256_srl_epi16(x, p->sign_shift), p->sign),
                                      _mm256_and_si256(x, p->fraction));
            low[i] = _mm256_and_si256(rest[i], _mm256_set1_epi16(0xff));
            rest[i] = _mm256_srli_epi16(rest[i], 8);
        }
        _mm256_storeu_si256((__m256i *)(slots[0] + at), narrow16(low[0], low[1]));
        __m256i code = codes_of(p, narrow16(e[0], e[1]), outside);
        /* the bits of the rest above the byte stand below the code */
        return _mm256_or_si256(_mm256_sll_epi16(code, p->rest_shift), narrow16(rest[0], rest[1]));
    }
    __m256i b[4];
    if (kind == BF16) {
        const __m256i byte = _mm256_set1_epi16(0xff);
        __m256i x = load256(src), y = load256(src + 32);
        b[2] = narrow16(_mm256_and_si256(x, byte), _mm256_and_si256(y, byte));
        b[3] = narrow16(_mm256_srli_epi16(x, 8), _mm256_srli_epi16(y, 8));
        _mm256_storeu_si256((__m256i *)(slots[0] + at), bf16_rests(b[3], b[2]));
    } else {
        bytes32((const uint32_t *)src, b);
        _mm256_storeu_si256((__m256i *)(slots[0] + at), b[0]);
        _mm256_storeu_si256((__m256i *)(slots[1] + at), b[1]);
        _mm256_storeu_si256((__m256i *)(slots[2] + at), bf16_rests(b[3], b[2]));
    }
    return codes_of(p, bf16_exponents(b[3], b[2]), outside);
}

INLINE TARGET void split_some(int kind, int itemsize, int k, const endor_stream *s, const uint8_t *src, int cached,
                              uint8_t *const *slots, uint8_t *planes, uint64_t stride, uint64_t words,
                              uint64_t *outside, uint64_t *counts) {
    const splitter p = splitter_of(s);
    const int below = s->rest_bits % 8, n = kind == BF16 || kind == WORDS ? k : k + below;
    const __m128i unused = _mm_cvtsi32_si128(8 - n);
    for (uint64_t w = 0; w < words; w++, src += 64 * itemsize) {
        uint8_t *to[3];
        uint32_t out[2];
        uint64_t bits[8];
        if (!cached) fetch_ahead(src, 64 * itemsize);
        for (int j = 0; j < itemsize - 1; j++) to[j] = slots[j] + 64 * w;
        __m256i a = split32(kind, s, &p, src, to, 0, &out[0]);
        __m256i b = split32(kind, s, &p, src + 32 * itemsize, to, 32, &out[1]);
        a = _mm256_sll_epi16(a, unused), b = _mm256_sll_epi16(b, unused);
        for (int j = n - 1; j >= 0; j--) { /* the highest bits left are a plane */
            bits[j] = (uint32_t)_mm256_movemask_epi8(a) | (uint64_t)(uint32_t)_mm256_movemask_epi8(b) << 32;
            store64(planes + (uint64_t)j * stride + 8 * w, bits[j]);
            a = _mm256_add_epi8(a, a), b = _mm256_add_epi8(b, b);
        }
        outside[w] = out[0] | (uint64_t)out[1] << 32;
        if (counts) endor_tally(bits + (n - k), k, counts);
    }
}

static TARGET void split_to(const endor_stream *s, const void *src, int cached, uint8_t *const *slots, uint8_t *planes,
                            uint64_t stride, uint64_t words, uint64_t *outside, uint64_t *counts) {
#define SPLIT(kind, itemsize, k) \
    split_some(kind, itemsize, k, s, src, cached, slots, planes, stride, words, outside, counts)
#define SPLIT_ALL(kind, itemsize) /* the usual widths of code, without loops over their planes */                 \
    (s->k == 2 ? SPLIT(kind, itemsize, 2) : s->k == 3 ? SPLIT(kind, itemsize, 3) : SPLIT(kind, itemsize, s->k))
    if (s->itemsize == 1) SPLIT_ALL(BYTES, 1);
    else if (s->itemsize == 4) SPLIT_ALL(WORDS, 4);
    else if (s->mantissa_bits == 7) SPLIT_ALL(BF16, 2);
    else SPLIT_ALL(HALVES, 2);
}

TARGET uint64_t endor_avx2_split(const endor_stream *s, const void *src, endor_slots *slots) {
    uint64_t outside;
    split_to(s, src, 1, slots->bytes, (uint8_t *)slots->planes, 8, 1, &outside, NULL);
    return outside;
}

TARGET void endor_avx2_split_words(const endor_stream *s, const void *src, int cached, uint64_t word, uint64_t words,
                                   uint64_t *outside, uint64_t *counts) {
    uint8_t *slots[3];
    for (int j = 0; j < s->byte_planes; j++) slots[j] = (uint8_t *)s->bytes + j * s->byte_stride + 64 * word;
    split_to(s, src, cached, slots, (uint8_t *)s->planes + 8 * word, s->plane_stride, words, outside, counts);
}

#endif
