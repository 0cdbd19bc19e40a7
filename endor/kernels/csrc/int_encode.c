/* Codec `int`: symbols to states and words, from the last row of a chunk back to its first. */
#include "int.h"

#include <stdatomic.h>

typedef struct {
    const endor_int_ops *in;
    uint32_t table[256];
    const uint8_t *symbols;
    uint64_t n;
    uint32_t *states;
    uint32_t *counts;
    uint16_t *words;
    uint8_t filler;
    atomic_uint_fast64_t next;
} encode_job;

/* The words of a chunk end where its room ends. */
static void encode_chunk(const encode_job *job, uint64_t chunk) {
    uint64_t begin = chunk * ENDOR_CHUNK, n = min64(job->n - begin, ENDOR_CHUNK), rest = n % ENDOR_LANES;
    uint16_t *end = job->words + (chunk + 1) * ENDOR_CHUNK, *at = end;
    ENDOR_ALIGNED uint32_t x[ENDOR_LANES];
    for (int i = 0; i < ENDOR_LANES; i++) x[i] = ENDOR_LOWEST;
    if (rest) {
        uint8_t last[ENDOR_LANES];
        memset(last, job->filler, sizeof last);
        memcpy(last, job->symbols + begin + n - rest, rest);
        at = job->in->code(job->table, x, last, 1, at);
    }
    at = job->in->code(job->table, x, job->symbols + begin, n / ENDOR_LANES, at);
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
ENDOR_API int endor_int_encode(int kernel, const uint8_t *symbols, uint64_t n, const uint16_t *frequencies,
                               int n_symbols, int filler, uint32_t *states, uint32_t *counts, uint16_t *words,
                               int threads) {
    encode_job job = {.symbols = symbols, .n = n, .states = states, .counts = counts, .words = words};
    uint32_t start = 0;
    job.in = endor_int_ops_of(kernel);
    if (!job.in || n_symbols < 1 || n_symbols > 256 || filler < 0 || filler >= n_symbols) return ENDOR_UNSUPPORTED;
    for (int i = 0; i < 256; i++) { /* what has no frequency is coded as if it had: nonsense, but no division by 0 */
        uint32_t frequency = i < n_symbols ? frequencies[i] % ENDOR_SCALE : 0;
        job.table[i] = (frequency ? frequency : 1) | start << 16;
        start = (start + frequency) % ENDOR_SCALE;
    }
    job.filler = (uint8_t)filler;
    atomic_init(&job.next, 0);
    endor_parallel(threads, 8 * n, encode_chunks, &job);
    return ENDOR_OK;
}
