/* Matrices whose rows are bundled: a bundle is a stored tensor of its own, in one run of bytes.
 *
 *   bundle  | nnz u32 | patches u32 | tile_offsets | bitmap | values, or bytes | planes | patch_offsets | ranks | exponents |
 *           ^ 8 * offsets[b]        ^ arrays at multiples of 8 bytes, those that the codec has
 *
 * No content is trusted: a bundle whose head contradicts its length is ENDOR_CORRUPT, and its arrays then lie inside. */
#ifndef ENDOR_BUNDLES_H
#define ENDOR_BUNDLES_H

#include "endor.h"

#define BUNDLE_UNIT 8
#define BUNDLE_HEAD 8

/* Mirrored field by field in bundles.py. */
typedef struct {
    endor_tensor form;       /* codec, element and window of every bundle; its other members are not used */
    uint64_t rows, cols;     /* of the matrix: a row is what one neuron adds */
    uint64_t bundle_rows;
    uint64_t units;          /* of BUNDLE_UNIT bytes in data */
    const uint8_t *offsets;  /* u32[n_bundles + 1], in units */
    const uint8_t *data;
    int32_t bitmap;
    int32_t reserved;
} endor_bundles;

ENDOR_INLINE uint64_t endor_bundle_count(const endor_bundles *b) {
    return b->bundle_rows ? (b->rows + b->bundle_rows - 1) / b->bundle_rows : 0;
}

/* Elements of bundle `index`. */
ENDOR_INLINE uint64_t endor_bundle_numel(const endor_bundles *b, uint64_t index) {
    return min64(b->bundle_rows, b->rows - index * b->bundle_rows) * b->cols;
}

/* Fill in the arrays of a bundle that begins at `at` and whose counts are in `out`; return its bytes. */
uint64_t endor_bundle_arrays(const endor_bundles *b, const uint8_t *at, endor_tensor *out);

/* The tensor that bundle `index` is. */
int endor_bundle_at(const endor_bundles *b, uint64_t index, endor_tensor *out);

#endif
