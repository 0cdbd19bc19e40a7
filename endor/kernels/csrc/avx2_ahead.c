/* AVX2: products of bf16 from an exp stream that decode, between the columns of one span, the stored elements of the next.
 *
 * Placing waits for loads, decoding for byte arithmetic: in turn, 64 columns and what as many later ones need, they overlap
 * in the processor, where a loop of the one after a loop of the other does not. One run at a time, for the places of two
 * do not fit the registers; x of a span stays in L1 for both.
 */
#include "endor.h"

#if defined(__x86_64__)
#include "avx2_join.h"
#include "avx2_rows.h"

#define BYTES_AHEAD 1536 /* of the byte plane; fetched here, as a burst of them would hold up what is decoded */

INLINE TARGET void run_ahead(endor_run *run, const endor_span *span, const endor_operand *x, const endor_stream *s,
                             endor_ahead *ahead, int planes, int odd) {
    const spreading how = SPREAD_PAIRS;
    const __m256i half = _mm256_set1_epi8((char)(s->base >> 1));
    const float *begin = (const float *)x->x + span->column, *end = begin + span->columns;
    const uint64_t steps = span->rows * (span->columns / 64), each = ahead->units / steps, stride = s->plane_stride;
    const uint8_t *bits = ahead->bits, *bytes = ahead->bytes;
    uint8_t *out = ahead->out;
    int64_t more = (int64_t)(ahead->units % steps); /* steps that decode one unit more than each */
    lanes l;
    l.values[0] = run->values, l.bitmap[0] = run->bitmap;
    for (uint64_t row = 0; row < span->rows; row++) {
        begin_row(&l, run, span, 1, 1);
        for (const float *at = begin; at != end; at += 64, l.bitmap[0] += 8) {
            for (uint8_t *stop = out + 64 * (each + (more-- > 0)); out != stop; bits += 4, bytes += 32, out += 64) {
                __m256i low, high;
                _mm_prefetch((const char *)bytes + BYTES_AHEAD, _MM_HINT_T0);
                join(bits, stride, half, PAIRS_FROM(bytes), &how, planes, odd, 0, &low, &high);
                store_pairs(out, low, high);
            }
            step(&l, at, 0, 0, ENDOR_X_BF16, 1, 1, 1, 0);
        }
        end_row(&l, run, span, x, row, 1, 1);
    }
    run->values = l.values[0], run->bitmap = l.bitmap[0];
    if (span->finishes) run->out += span->rows;
    *ahead = (endor_ahead){bits, bytes, out, 0};
}

#define AHEAD(PLANES, ODD)                                                                                        \
    static TARGET void ahead_##PLANES##_##ODD(endor_run *run, const endor_span *span, const endor_operand *x,     \
                                              const endor_stream *s, endor_ahead *ahead) {                        \
        run_ahead(run, span, x, s, ahead, PLANES, ODD);                                                           \
    }
AHEAD(1, 0)
AHEAD(1, 1)
AHEAD(2, 0)
AHEAD(2, 1)
AHEAD(3, 0)
AHEAD(3, 1)
AHEAD(4, 0)
AHEAD(4, 1)

/* Further rows of x leave decoding no registers. */
endor_row_ahead endor_avx2_row_ahead(const endor_operand *x, const endor_stream *s) {
    static const endor_row_ahead by_planes[4][2] = {
        {ahead_1_0, ahead_1_1},
        {ahead_2_0, ahead_2_1},
        {ahead_3_0, ahead_3_1},
        {ahead_4_0, ahead_4_1},
    };
    int planes = s->bit_planes;
    if (x->batch > 1 || x->weight != ENDOR_X_BF16 || s->itemsize != 2 || s->exponent_bits != 8) return NULL;
    if (planes < 1 || planes > 4 || s->base + (1u << planes) > 256) return NULL; /* exponents that wrap */
    return by_planes[planes - 1][s->base & 1];
}

#endif
