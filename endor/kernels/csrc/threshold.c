/* Magnitude pruning of 16-bit elements: counting magnitudes, and zeroing what lies below a threshold.
 *
 * Two passes of reading and one of writing. Counting is one load, one increment and no branch an element; two tables
 * keep an increment from waiting for the one before when neighbours are equal.
 */
#include "endor.h"

/* counts: u64[32768], overwritten: how many of the n elements of src have each value under mask. */
ENDOR_API int endor_count16(const void *src, uint64_t n, uint32_t mask, uint64_t *counts) {
    if (mask > 0x7fff) return ENDOR_UNSUPPORTED;
    enum { PIECE = 1u << 30 }; /* elements whose counts fit 32 bits */
    static _Thread_local uint32_t tables[2][32768];
    const uint8_t *p = src;
    const size_t used = ((size_t)mask + 1) * sizeof(uint32_t);
    memset(counts, 0, 32768 * sizeof *counts);
    for (uint64_t done = 0; done < n;) {
        uint64_t length = min64(n - done, PIECE), i = 0;
        memset(tables[0], 0, used), memset(tables[1], 0, used);
        for (; i + 4 <= length; i += 4) {
            uint64_t four = load64(p + 2 * (done + i));
            tables[0][(uint32_t)four & mask]++;
            tables[1][(uint32_t)(four >> 16) & mask]++;
            tables[0][(uint32_t)(four >> 32) & mask]++;
            tables[1][(uint32_t)(four >> 48) & mask]++;
        }
        for (; i < length; i++) tables[0][load16(p + 2 * (done + i)) & mask]++;
        for (uint32_t value = 0; value <= mask; value++) counts[value] += (uint64_t)tables[0][value] + tables[1][value];
        done += length;
    }
    return ENDOR_OK;
}

/* Zero the elements whose value under mask is below threshold, and the first `ties` of those that equal it. */
ENDOR_API int endor_zero_below16(uint16_t *data, uint64_t n, uint32_t mask, uint32_t threshold, uint64_t ties) {
    enum { BLOCK = 4096 };
    if (mask > 0x7fff || threshold > 0x7fff) return ENDOR_UNSUPPORTED;
    const uint16_t limit = (uint16_t)threshold, used = (uint16_t)mask;
    for (uint64_t start = 0; start < n; start += BLOCK) {
        uint16_t *block = data + start;
        const int length = (int)min64(BLOCK, n - start);
        uint16_t equal = 0; /* at most BLOCK: as narrow as the elements, so that the loop vectorizes well */
        if (ties)
            for (int i = 0; i < length; i++) equal += (block[i] & used) == limit;
        if (ties < equal) {
            for (int i = 0; ties; i++)
                if ((block[i] & used) == limit) block[i] = 0, ties--;
            equal = 0;
        }
        ties -= equal;
        const uint16_t bound = limit + (equal != 0); /* with every tie of the block to go, one higher */
        for (int i = 0; i < length; i++) block[i] = (block[i] & used) < bound ? 0 : block[i];
    }
    return ENDOR_OK;
}
