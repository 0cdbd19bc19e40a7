/* Codec `int`: codes counted, and brought to symbols, low bits, and marks where a patch is needed. Portable code. */
#include "int.h"

#include <stdatomic.h>

#define NARROW 4096 /* codes whose four tables of counts stay in L1 and L2 */

/* counts: u64[size], overwritten: how many of the n codes are low, low + 1, ... Four tables for few values: an increment
 * then does not wait for the one before it when neighbours are equal. */
ENDOR_API int endor_int_count(const int32_t *codes, uint64_t n, int32_t low, uint32_t size, uint64_t *counts) {
    memset(counts, 0, size * sizeof *counts);
    if (size > NARROW) {
        for (uint64_t i = 0; i < n; i++) {
            uint32_t at = (uint32_t)codes[i] - (uint32_t)low;
            if (at < size) counts[at]++;
        }
        return ENDOR_OK;
    }
    enum { PIECE = 1u << 30 }; /* codes whose counts fit 32 bits */
    uint32_t tables[4][NARROW + 1];
    for (uint64_t done = 0; done < n;) {
        uint64_t length = min64(n - done, PIECE), i = 0;
        for (int j = 0; j < 4; j++) memset(tables[j], 0, (size + 1) * sizeof(uint32_t));
        for (; i < length; i++) {
            uint32_t at = (uint32_t)codes[done + i] - (uint32_t)low;
            tables[i % 4][at < size ? at : size]++;
        }
        for (uint32_t at = 0; at < size; at++) {
            counts[at] += (uint64_t)tables[0][at] + tables[1][at] + tables[2][at] + tables[3][at];
        }
        done += length;
    }
    return ENDOR_OK;
}

typedef struct {
    const int32_t *codes;
    uint64_t n;
    int32_t base;
    int shift;
    uint32_t n_symbols;
    uint16_t table[257]; /* of a symbol, and last of what is none: the symbol to code, and 256 where that needs a patch */
    uint8_t *symbols;
    uint8_t *low_bits;
    uint32_t *patched;
    atomic_uint_fast64_t next;
} symbol_job;

/* `n` codes, at most 32, from a multiple of 32 on. */
ENDOR_INLINE void split(const symbol_job *job, uint64_t begin, int n, int shift) {
    uint64_t low[4] = {0};
    uint32_t patched = 0;
    for (int i = 0; i < n; i++) {
        int32_t code = job->codes[begin + (uint64_t)i];
        uint32_t symbol = (uint32_t)(code >> shift) - (uint32_t)job->base;
        uint32_t entry = job->table[symbol < job->n_symbols ? symbol : 256], patch = entry >> 8;
        job->symbols[begin + (uint64_t)i] = (uint8_t)entry;
        patched |= patch << i;
        low[i / 8] |= ((uint64_t)(uint32_t)code & ((1u << shift) - 1) & (patch - 1)) << i % 8 * shift;
    }
    job->patched[begin / ENDOR_LANES] = patched;
    for (int i = 0; shift && i < 4; i++) {
        memcpy(job->low_bits + (begin / 8 + (uint64_t)i) * (uint64_t)shift, low + i, (size_t)shift);
    }
}

static void split_chunks(void *context) {
    symbol_job *job = context;
    for (;;) {
        uint64_t begin = atomic_fetch_add_explicit(&job->next, ENDOR_CHUNK, memory_order_relaxed);
        if (begin >= job->n) return;
        uint64_t end = begin + min64(job->n - begin, ENDOR_CHUNK), whole = begin + (end - begin) / ENDOR_LANES * ENDOR_LANES;
        if (job->shift) {
            for (uint64_t i = begin; i < whole; i += ENDOR_LANES) split(job, i, ENDOR_LANES, job->shift);
        } else {
            for (uint64_t i = begin; i < whole; i += ENDOR_LANES) split(job, i, ENDOR_LANES, 0);
        }
        if (whole < end) split(job, whole, (int)(end - whole), job->shift);
    }
}

/* codes: i32[n]. A code is (base + symbol << shift) + low bits; one whose symbol has no frequency needs a patch, the filler
 * stands in for it, without low bits. symbols: u8[n]; low_bits: u8[4 * shift * ceil(n / 32)], NULL without shift;
 * patched: u32[ceil(n / 32)], a bit for each code. */
ENDOR_API int endor_int_symbols(const int32_t *codes, uint64_t n, int32_t base, int shift, const uint16_t *frequencies,
                                int n_symbols, int filler, uint8_t *symbols, uint8_t *low_bits, uint32_t *patched,
                                int threads) {
    symbol_job job = {.codes = codes, .n = n, .base = base, .shift = shift, .n_symbols = (uint32_t)n_symbols,
                      .symbols = symbols, .low_bits = low_bits, .patched = patched};
    if (shift < 0 || shift > 8 || n_symbols < 1 || n_symbols > 256 || filler < 0 || filler >= n_symbols) {
        return ENDOR_UNSUPPORTED;
    }
    for (int i = 0; i <= 256; i++) {
        job.table[i] = (uint16_t)(i < n_symbols && frequencies[i] ? i : filler | 256);
    }
    atomic_init(&job.next, 0);
    endor_parallel(threads, 8 * n, split_chunks, &job);
    return ENDOR_OK;
}
