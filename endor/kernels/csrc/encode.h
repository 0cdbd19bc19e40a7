/* What packing of both codecs shares. */
#ifndef ENDOR_ENCODE_H
#define ENDOR_ENCODE_H

#include "endor.h"

#define UNKNOWN UINT64_MAX /* a place in an array that is not published yet */
#define PACK_TILES 16      /* tiles in a chunk */

/* Tile `tile` of src, padded with zeros past n. */
static inline const void *tile_of(const uint8_t *src, uint64_t n, uint64_t tile, uint64_t itemsize, uint8_t *tmp) {
    uint64_t begin = tile * ENDOR_TILE, left = n - begin;
    if (left >= ENDOR_TILE) return src + begin * itemsize;
    memcpy(tmp, src + begin * itemsize, left * itemsize);
    memset(tmp + left * itemsize, 0, (ENDOR_TILE - left) * itemsize);
    return tmp;
}

#endif
