/* Codec `int`: symbols to states and words, from the last row of a chunk back to its first.
 *
 * Portable code, for every kernel: 32 lanes that do not wait for each other keep the divider busy.
 */
#include "int.h"

#include <stdatomic.h>

typedef struct {
    uint32_t frequency, start;
} symbol;

typedef struct {
    symbol symbols[256];
    const uint8_t *in;
    uint64_t n;
    uint32_t *states;
    uint32_t *counts;
    uint16_t *words;
    uint8_t filler;
    atomic_uint_fast64_t next;
} encode_job;

/* The words of a chunk end where its room ends. */
static void encode_chunk(const encode_job *job, uint64_t chunk) {
    uint64_t begin = chunk * ENDOR_CHUNK, n = min64(job->n - begin, ENDOR_CHUNK);
    uint64_t n_rows = (n + ENDOR_LANES - 1) / ENDOR_LANES;
    uint16_t *end = job->words + (chunk + 1) * ENDOR_CHUNK, *at = end;
    uint32_t x[ENDOR_LANES];
    for (int i = 0; i < ENDOR_LANES; i++) x[i] = ENDOR_LOWEST;
    for (uint64_t row = n_rows; row--;) {
        for (uint64_t i = ENDOR_LANES; i--;) {
            uint64_t place = row * ENDOR_LANES + i;
            const symbol *s = job->symbols + (place < n ? job->in[begin + place] : job->filler);
            uint32_t state = x[i];
            if (state >= s->frequency << 20) {
                *--at = (uint16_t)state;
                state >>= 16;
            }
            uint32_t quotient = state / s->frequency;
            x[i] = quotient * ENDOR_SCALE + (state - quotient * s->frequency) + s->start;
        }
    }
    memcpy(job->states + chunk * ENDOR_LANES, x, sizeof x);
    job->counts[chunk] = (uint32_t)(end - at);
}

static void encode_chunks(void *context) {
    encode_job *job = context;
    uint64_t n_chunks = (job->n + ENDOR_CHUNK - 1) / ENDOR_CHUNK;
    for (;;) {
        uint64_t chunk = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (chunk >= n_chunks) return;
        encode_chunk(job, chunk);
    }
}

/* symbols: u8[n], each with a frequency; filler stands behind the last one. states: u32[n_chunks][32], counts:
 * u32[n_chunks]; words: u16[n_chunks * 32768], of which the words of chunk c are the last counts[c] of its share. */
ENDOR_API int endor_int_encode(const uint8_t *symbols, uint64_t n, const uint16_t *frequencies, int n_symbols,
                               int filler, uint32_t *states, uint32_t *counts, uint16_t *words, int threads) {
    encode_job job = {.in = symbols, .n = n, .states = states, .counts = counts, .words = words};
    uint32_t start = 0;
    if (n_symbols < 1 || n_symbols > 256 || filler < 0 || filler >= n_symbols) return ENDOR_UNSUPPORTED;
    for (int i = 0; i < 256; i++) { /* what has no frequency is coded as if it had: nonsense, but no division by 0 */
        uint32_t frequency = i < n_symbols ? frequencies[i] : 0;
        job.symbols[i] = (symbol){frequency ? frequency : 1, start};
        start += frequency;
    }
    job.filler = (uint8_t)filler;
    atomic_init(&job.next, 0);
    endor_parallel(threads, 8 * n, encode_chunks, &job);
    return ENDOR_OK;
}
