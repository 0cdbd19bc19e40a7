/* AVX-512: products of bf16 weights straight from the exp stream.
 *
 * Bits and bytes are placed first and joined then: one vpexpandb places sign and mantissa of 64 weights, one pdep each
 * bit of their codes, which become the masks of byte arithmetic. So nothing passes through memory, and a run of rows
 * needs one place, its rank, for all arrays. The bytes of 64 weights are joined by the unpack instructions, which leave
 * them in an order of their own; x is brought into the same order once a call.
 */
#include "endor.h"

#if defined(__x86_64__)
#include "avx512_rows.h"

/* How bits of code become the exponent base + code, as a byte `high` = exponent >> 1 and its lowest bit. */
typedef struct {
    __m512i seven, top;
    __m512i clear, set;  /* high where the lowest bit is clear, and set; other planes add to it */
    uint64_t flip;       /* all ones where the base is odd: plane 0 is the lowest bit, or its inverse */
} exponents;

INLINE TARGET exponents exponents_of(const endor_stream *s) {
    uint32_t half = s->base >> 1, odd = s->base & 1;
    return (exponents){
        .seven = _mm512_set1_epi8(0x7f),
        .top = _mm512_set1_epi8((char)0x80),
        .clear = _mm512_set1_epi8((char)(half + odd)),
        .set = _mm512_set1_epi8((char)half),
        .flip = 0 - (uint64_t)odd,
    };
}

/* Bits of a plane from `rank` on, 57 or more. */
INLINE TARGET uint64_t bits_at(const uint8_t *plane, uint64_t rank) { return load64(plane + (rank >> 3)) >> (rank & 7); }

/* The 64 weights whose bits are m, the first stored element being `rank`; those without a bit are zero. In the order
 * 0-7 16-23 32-39 48-55, then 8-15 24-31 40-47 56-63. */
INLINE TARGET void join(const endor_stream *s, const exponents *e, uint64_t m, uint64_t rank, int planes, int odd, int full,
                        __m512i w[2]) {
    const uint8_t *plane = s->planes;
    __m512i rest = expand_b(m, load(s->bytes + rank));
    __m512i low = _mm512_and_si512(rest, e->seven), high = _mm512_maskz_mov_epi8(m, e->clear);
    for (int j = 0; j < planes; j++, plane += s->plane_stride) {
        uint64_t bits = bits_at(plane, rank);
        if (full) bits |= (uint64_t)plane[(rank >> 3) + 8] << 1 << (63 - (rank & 7));
        if (j == 0) {
            bits = _pdep_u64(bits ^ (odd ? e->flip : 0), m);
            low = _mm512_mask_sub_epi8(low, bits, low, e->top);
            if (odd) high = _mm512_mask_mov_epi8(high, bits, e->set);
        } else {
            high = _mm512_mask_add_epi8(high, _pdep_u64(bits, m), high, _mm512_set1_epi8((char)(1 << (j - 1))));
        }
    }
    high = _mm512_ternarylogic_epi32(e->seven, high, rest, 0xca); /* seven ? high : rest */
    w[0] = _mm512_unpacklo_epi8(low, high);
    w[1] = _mm512_unpackhi_epi8(low, high);
}

/* `join` for any word: more than 57 stored elements, or some with patches. Out of line, for inside it would take the
 * loop's registers. */
static __attribute__((noinline, cold)) TARGET void join_any(const endor_tensor *t, const endor_stream *s, endor_run *run,
                                                            uint64_t m, uint64_t rank, uint16_t *w) {
    const exponents e = exponents_of(s);
    const uint64_t after = rank + count(m);
    __m512i both[2];
    join(s, &e, m, rank, s->bit_planes, 1, 1, both);
    _mm512_store_si512(w, both[0]);
    _mm512_store_si512(w + 32, both[1]);
    while (run->next_patch < after) {
        if (run->next_patch >= rank) {
            uint64_t i = (uint64_t)__builtin_ctzll(_pdep_u64(1ull << (run->next_patch - rank), m));
            uint16_t *at = w + (i >> 3 & 1) * 32 + (i >> 4) * 8 + (i & 7);
            *at = (uint16_t)((*at & 0x807f) | t->patch_exponents[run->patches.at] << 7);
        }
        run->patches.at++;
        run->next_patch = endor_next_patch(t, &run->patches);
    }
}

INLINE TARGET_BF16 void add_pairs(lanes *l, const uint8_t *xs, const endor_operand *x, uint64_t k, int n_runs, int batch,
                                  __m512i w[ENDOR_MAX_RUNS][2]) {
    for (int b = 0; b < batch; b++) {
        const uint16_t *at = (const uint16_t *)xs + (uint64_t)b * x->stride + k;
        __m512bh x0 = (__m512bh)_mm512_loadu_si512(at), x1 = (__m512bh)_mm512_loadu_si512(at + 32);
        for (int r = 0; r < n_runs; r++) {
            l->sum[r][b][0] = _mm512_dpbf16_ps(l->sum[r][b][0], (__m512bh)w[r][0], x0);
            l->sum[r][b][SUMS(batch) - 1] = _mm512_dpbf16_ps(l->sum[r][b][SUMS(batch) - 1], (__m512bh)w[r][1], x1);
        }
    }
}

INLINE TARGET void add_floats(lanes *l, const uint8_t *xs, const endor_operand *x, uint64_t k, int n_runs, int batch,
                              __m512i w[ENDOR_MAX_RUNS][2]) {
    const __m512i zero = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) { /* a bf16 is the upper half of its float */
        __m512 f[ENDOR_MAX_RUNS];
        for (int r = 0; r < n_runs; r++) {
            __m512i all = w[r][i / 2];
            f[r] = _mm512_castsi512_ps(i & 1 ? _mm512_unpackhi_epi16(zero, all) : _mm512_unpacklo_epi16(zero, all));
        }
        for (int b = 0; b < batch; b++) {
            __m512 at = _mm512_loadu_ps((const float *)xs + (uint64_t)b * x->stride + k + 16 * i);
            int sum = i / 2 * (SUMS(batch) - 1);
            for (int r = 0; r < n_runs; r++) l->sum[r][b][sum] = _mm512_fmadd_ps(f[r], at, l->sum[r][b][sum]);
        }
    }
}

/* The rows of all runs, 64 columns at a time; prefetches what the same columns of 512 will need. */
#define BODY(ADD)                                                                                                 \
    const exponents e = exponents_of(s);                                                                          \
    lanes l;                                                                                                      \
    uint64_t row = 0, rank[ENDOR_MAX_RUNS];                                                                       \
    for (int r = 0; r < n_runs; r++) {                                                                            \
        l.bitmap[r] = runs[r].bitmap, rank[r] = runs[r].rank;                                                     \
        runs[r].next_patch = endor_next_patch(t, &runs[r].patches);                                               \
    }                                                                                                             \
    for (; row < span->rows; row++) {                                                                             \
        for (int r = 0; r < n_runs; r++) {                                                                        \
            if (rank[r] + span->columns + 128 > t->nnz) goto stop;                                                \
        }                                                                                                         \
        begin_row(&l, runs, span, n_runs, batch);                                                                 \
        for (uint64_t k = 0; k < span->columns;) {                                                                \
            for (int r = 0; r < n_runs; r++) {                                                                    \
                _mm_prefetch((const char *)l.bitmap[r] + k / 8 + PREFETCH / 4, _MM_HINT_T1);                      \
                for (int j = 0; j < planes; j++) {                                                                \
                    const uint8_t *plane = s->planes + (uint64_t)j * s->plane_stride;                             \
                    _mm_prefetch((const char *)plane + (rank[r] + PREFETCH) / 8, _MM_HINT_T1);                    \
                }                                                                                                 \
            }                                                                                                     \
            for (uint64_t stop = min64(k + 512, span->columns); k < stop; k += 64) {                              \
                __m512i w[ENDOR_MAX_RUNS][2];                                                                     \
                _Pragma("GCC unroll 4") for (int r = 0; r < n_runs; r++) {                                        \
                    uint64_t m = load64(l.bitmap[r] + k / 8), after;                                              \
                    __asm__("" : "+r"(m)); /* not by way of a mask register */                                    \
                    after = rank[r] + count(m);                                                                   \
                    _mm_prefetch((const char *)s->bytes + rank[r] + PREFETCH, _MM_HINT_T1);                       \
                    if (__builtin_expect(count(m) > 57 || runs[r].next_patch < after, 0)) {                       \
                        ENDOR_ALIGNED uint16_t word[64];                                                          \
                        join_any(t, s, runs + r, m, rank[r], word);                                               \
                        w[r][0] = _mm512_load_si512(word), w[r][1] = _mm512_load_si512(word + 32);                \
                    } else {                                                                                      \
                        join(s, &e, m, rank[r], planes, odd, 0, w[r]);                                            \
                    }                                                                                             \
                    rank[r] = after;                                                                              \
                }                                                                                                 \
                ADD(&l, x->x, x, k, n_runs, batch, w);                                                            \
            }                                                                                                     \
        }                                                                                                         \
        end_row(&l, runs, span, x, row, n_runs, batch);                                                           \
    }                                                                                                             \
stop:                                                                                                             \
    for (int r = 0; r < n_runs; r++) {                                                                            \
        runs[r].bitmap = l.bitmap[r], runs[r].rank = rank[r];                                                     \
        runs[r].out += row;                                                                                       \
    }                                                                                                             \
    return row;

#define ARGUMENTS                                                                                                 \
    endor_run *runs, const endor_span *span, const endor_operand *x, const endor_tensor *t, const endor_stream *s

INLINE TARGET_BF16 uint64_t exp_pairs(ARGUMENTS, int n_runs, int batch, int planes, int odd) { BODY(add_pairs) }
INLINE TARGET uint64_t exp_floats(ARGUMENTS, int n_runs, int batch, int planes, int odd) { BODY(add_floats) }

#define PASS runs, span, x, t, s
#define PAIRS(NAME, RUNS_OF, PLANES, ODD)                                                                         \
    static TARGET_BF16 uint64_t NAME(ARGUMENTS) { BATCHES(RUNS_OF##_PAIRS_##PLANES##_##ODD) }
#define ONE_PAIRS_2_0(B) return exp_pairs(PASS, 1, B, 2, 0)
#define ONE_PAIRS_3_0(B) return exp_pairs(PASS, 1, B, 3, 0)
#define ONE_PAIRS_2_1(B) return exp_pairs(PASS, 1, B, 2, 1)
#define ONE_PAIRS_3_1(B) return exp_pairs(PASS, 1, B, 3, 1)
#define ONE_PAIRS_k_1(B) return exp_pairs(PASS, 1, B, s->bit_planes, 1)
#define MANY_PAIRS_2_0(B) return exp_pairs(PASS, EXP_RUNS, B, 2, 0)
#define MANY_PAIRS_3_0(B) return exp_pairs(PASS, EXP_RUNS, B, 3, 0)
#define MANY_PAIRS_2_1(B) return exp_pairs(PASS, EXP_RUNS, B, 2, 1)
#define MANY_PAIRS_3_1(B) return exp_pairs(PASS, EXP_RUNS, B, 3, 1)
#define MANY_PAIRS_k_1(B) return exp_pairs(PASS, EXP_RUNS, B, s->bit_planes, 1)
PAIRS(one_2_0, ONE, 2, 0)
PAIRS(one_3_0, ONE, 3, 0)
PAIRS(one_2_1, ONE, 2, 1)
PAIRS(one_3_1, ONE, 3, 1)
PAIRS(one_k_1, ONE, k, 1)
PAIRS(many_2_0, MANY, 2, 0)
PAIRS(many_3_0, MANY, 3, 0)
PAIRS(many_2_1, MANY, 2, 1)
PAIRS(many_3_1, MANY, 3, 1)
PAIRS(many_k_1, MANY, k, 1)
#define ONE_FLOATS(B) return exp_floats(PASS, 1, B, s->bit_planes, 1)
#define MANY_FLOATS(B) return exp_floats(PASS, EXP_RUNS, B, s->bit_planes, 1)
static TARGET uint64_t one_floats(ARGUMENTS) { BATCHES(ONE_FLOATS) }
static TARGET uint64_t many_floats(ARGUMENTS) { BATCHES(MANY_FLOATS) }

uint64_t endor_avx512_exp_rows(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x,
                               const endor_tensor *t, const endor_stream *s) {
    static uint64_t (*const pairs[2][5])(ARGUMENTS) = {{one_2_0, one_2_1, one_3_0, one_3_1, one_k_1},
                                                       {many_2_0, many_2_1, many_3_0, many_3_1, many_k_1}};
    int which = s->bit_planes == 2 || s->bit_planes == 3 ? 2 * (s->bit_planes - 2) + (int)(s->base & 1) : 4;
    if (x->bf16_pairs) return pairs[n_runs > 1][which](PASS);
    return n_runs > 1 ? many_floats(PASS) : one_floats(PASS);
}

/* 64 elements at a time, the order in which `join` leaves weights, and for floats the one of `add_floats` from there. */
void endor_avx512_arrange(void *x, uint64_t cols, int itemsize) {
    uint8_t from[64];
    for (int i = 0; i < 64; i++) from[i] = (uint8_t)((i >> 5) * 8 + (i >> 3 & 3) * 16 + (i & 7));
    if (itemsize == 4) {
        uint8_t of_pairs[64];
        memcpy(of_pairs, from, 64);
        for (int i = 0; i < 64; i++) from[i] = of_pairs[(i >> 5) * 32 + (i >> 4 & 1) * 4 + (i >> 2 & 3) * 8 + (i & 3)];
    }
    for (uint64_t k = 0; k < cols; k += 64) {
        uint8_t old[256], *at = (uint8_t *)x + k * (uint64_t)itemsize;
        memcpy(old, at, 64 * (size_t)itemsize);
        for (size_t i = 0; i < 64; i++) {
            memcpy(at + i * (size_t)itemsize, old + from[i] * (size_t)itemsize, (size_t)itemsize);
        }
    }
}

#endif
