/* Matrices in bundles: counted, packed and expanded; one bundle is one piece of work. The layout is in bundles.h. */
#include "bundles.h"

#include <stdatomic.h>

typedef struct exp_job exp_job;
exp_job *endor_exp_start(int kernel, const endor_tensor *tensor, const void *src, uint64_t *histogram, uint64_t *nnz,
                         int threads);
int endor_exp_finish(const exp_job *job, const endor_tensor *t);
void endor_exp_free(exp_job *job);
uint64_t endor_pack_raw(int kernel, const void *src, uint64_t n, int itemsize, uint8_t *bitmap, uint8_t *tile_offsets,
                        uint8_t *values, int threads);
int endor_decode(int kernel, const endor_tensor *tensor, void *out, uint64_t start, uint64_t stop, int threads,
                 int streaming);

static const uint8_t *take(const uint8_t **at, uint64_t nbytes) {
    const uint8_t *begin = *at;
    *at += (nbytes + BUNDLE_UNIT - 1) / BUNDLE_UNIT * BUNDLE_UNIT;
    return begin;
}

uint64_t endor_bundle_arrays(const endor_bundles *b, const uint8_t *begin, endor_tensor *t) {
    const uint8_t *at = begin + BUNDLE_HEAD;
    const uint64_t tiles = tiles_of(t->numel), planes = (uint64_t)(t->k + t->rest_bits % 8);
    t->tile_offsets = b->bitmap ? take(&at, 4 * (tiles + 1)) : NULL;
    t->bitmap = b->bitmap ? take(&at, ENDOR_TILE / 8 * tiles) : NULL;
    if (t->codec != ENDOR_EXP) {
        t->values = take(&at, t->nnz * (uint64_t)t->itemsize);
    } else {
        t->bytes = take(&at, t->nnz * (uint64_t)(t->rest_bits / 8));
        t->planes = take(&at, planes * ((t->nnz + 63) / 64 * 8));
        if (t->patches) {
            t->patch_offsets = take(&at, 4 * ((tiles + ENDOR_GROUP - 1) / ENDOR_GROUP + 1));
            t->patch_ranks = take(&at, 2 * t->patches);
            t->patch_exponents = take(&at, t->patches);
        }
    }
    return (uint64_t)(at - begin);
}

int endor_bundle_at(const endor_bundles *b, uint64_t index, endor_tensor *t) {
    const uint64_t first = load32(b->offsets + 4 * index), last = load32(b->offsets + 4 * index + 4);
    if (first >= last || last > b->units) return ENDOR_CORRUPT;
    const uint8_t *begin = b->data + first * BUNDLE_UNIT;
    *t = b->form;
    t->numel = endor_bundle_numel(b, index);
    t->nnz = load32(begin);
    t->patches = load32(begin + 4);
    if (t->nnz > t->numel || (!b->bitmap && t->nnz != t->numel) || t->patches > t->nnz) return ENDOR_CORRUPT;
    if (t->codec != ENDOR_EXP && t->patches) return ENDOR_CORRUPT;
    return endor_bundle_arrays(b, begin, t) == (last - first) * BUNDLE_UNIT ? ENDOR_OK : ENDOR_CORRUPT;
}

typedef struct {
    const endor_bundles *bundles;
    const uint8_t *src;
    uint8_t *out;     /* elements, or u32[n_bundles][2] of nnz and patches */
    uint64_t first, last, step;
    int kernel;
    atomic_uint_fast64_t next;
    atomic_int status;
} bundle_job;

#define SHARE 64 /* kibibytes of elements that are taken at a time */

static void run_over(bundle_job *job, int threads, void (*one)(void *)) {
    const endor_bundles *b = job->bundles;
    const uint64_t each = b->bundle_rows * b->cols * (uint64_t)b->form.itemsize;
    job->step = each && each < SHARE * 1024 ? SHARE * 1024 / each : 1;
    atomic_init(&job->next, job->first);
    atomic_init(&job->status, ENDOR_OK);
    endor_parallel(threads, 2 * (job->last - job->first) * each, one, job);
}

#define EACH_BUNDLE(JOB, INDEX)                                                                                        \
    for (uint64_t from; (from = atomic_fetch_add_explicit(&(JOB)->next, (JOB)->step, memory_order_relaxed)) < (JOB)->last; \
    )                                                                                                                  \
        for (uint64_t INDEX = from; INDEX < min64(from + (JOB)->step, (JOB)->last); INDEX++)

#define COUNT(TYPE)                                                                                                    \
    for (uint64_t i = 0; i < n; i++) {                                                                                 \
        const TYPE x = ((const TYPE *)src)[i];                                                                         \
        const uint32_t code = ((uint32_t)(x >> t->mantissa_bits) & field) - (uint32_t)t->base;                         \
        const uint32_t window = t->rest_bits ? code : code & field;                                                    \
        stored += x != 0;                                                                                              \
        outside += (x != 0 || !b->bitmap) && window >> t->k != 0;                                                      \
    }

static void count_bundles(void *context) {
    bundle_job *job = context;
    const endor_bundles *b = job->bundles;
    const endor_tensor *t = &b->form;
    const uint32_t field = (1u << t->exponent_bits) - 1;
    EACH_BUNDLE(job, index) {
        const uint64_t n = endor_bundle_numel(b, index);
        const uint8_t *src = job->src + index * b->bundle_rows * b->cols * (uint64_t)t->itemsize;
        uint32_t stored = 0, outside = 0;
        if (t->itemsize == 1) { COUNT(uint8_t) }
        else if (t->itemsize == 2) { COUNT(uint16_t) }
        else { COUNT(uint32_t) }
        store32(job->out + 8 * index, b->bitmap ? stored : (uint32_t)n);
        store32(job->out + 8 * index + 4, t->codec == ENDOR_EXP ? outside : 0);
    }
}

/* Write nnz and patches of each bundle of the matrix at src to counts, u32[n_bundles][2], and what it takes, in units,
 * to the offsets of `bundles`, which then are those of a packed one. */
ENDOR_API int endor_bundles_count(const endor_bundles *bundles, const void *src, uint8_t *counts, int threads) {
    bundle_job job = {.bundles = bundles, .src = src, .out = counts, .last = endor_bundle_count(bundles)};
    uint64_t at = 0;
    run_over(&job, threads, count_bundles);
    store32((uint8_t *)bundles->offsets, 0);
    for (uint64_t index = 0; index < job.last; index++) {
        endor_tensor t = bundles->form;
        t.numel = endor_bundle_numel(bundles, index);
        t.nnz = load32(counts + 8 * index);
        t.patches = load32(counts + 8 * index + 4);
        at += endor_bundle_arrays(bundles, counts, &t) / BUNDLE_UNIT;
        if (at > UINT32_MAX) return ENDOR_UNSUPPORTED;
        store32((uint8_t *)bundles->offsets + 4 * (index + 1), (uint32_t)at);
    }
    return ENDOR_OK;
}

static int pack_exp(int kernel, const endor_tensor *t, const void *src) {
    uint64_t found;
    exp_job *begun = endor_exp_start(kernel, t, src, NULL, &found, 1);
    if (!begun) return ENDOR_NO_MEMORY;
    int status = endor_exp_finish(begun, t);
    endor_exp_free(begun);
    return status;
}

static void pack_bundles(void *context) {
    bundle_job *job = context;
    const endor_bundles *b = job->bundles;
    EACH_BUNDLE(job, index) {
        endor_tensor t;
        int status = endor_bundle_at(b, index, &t);
        const uint8_t *src = job->src + index * b->bundle_rows * b->cols * (uint64_t)t.itemsize;
        if (status == ENDOR_OK && t.codec == ENDOR_EXP) {
            status = pack_exp(job->kernel, &t, src);
        } else if (status == ENDOR_OK) {
            uint64_t nnz = endor_pack_raw(job->kernel, src, t.numel, t.itemsize, (uint8_t *)t.bitmap,
                                          (uint8_t *)t.tile_offsets, (uint8_t *)t.values, 1);
            status = nnz == t.nnz ? ENDOR_OK : ENDOR_NO_MEMORY;
        }
        if (status != ENDOR_OK) atomic_store(&job->status, status);
    }
}

/* Fill the data of `bundles`, which are zeros, from the matrix at src; counts and offsets are from endor_bundles_count. */
ENDOR_API int endor_bundles_pack(int kernel, const endor_bundles *bundles, const void *src, const uint8_t *counts,
                                 int threads) {
    bundle_job job = {.bundles = bundles, .src = src, .last = endor_bundle_count(bundles), .kernel = kernel};
    for (uint64_t index = 0; index < job.last; index++) {
        memcpy((uint8_t *)bundles->data + (uint64_t)load32(bundles->offsets + 4 * index) * BUNDLE_UNIT, counts + 8 * index, 8);
    }
    run_over(&job, threads, pack_bundles);
    return atomic_load(&job.status);
}

static void expand_bundles(void *context) {
    bundle_job *job = context;
    const endor_bundles *b = job->bundles;
    const uint64_t size = (uint64_t)b->form.itemsize;
    EACH_BUNDLE(job, index) {
        endor_tensor t;
        int status = endor_bundle_at(b, index, &t);
        uint8_t *out = job->out + index * b->bundle_rows * b->cols * size;
        if (status == ENDOR_OK) status = endor_decode(job->kernel, &t, out, 0, t.numel, 1, 0);
        if (status != ENDOR_OK) atomic_store(&job->status, status);
    }
}

/* The whole matrix, (rows, cols), to out. */
ENDOR_API int endor_bundles_decode(int kernel, const endor_bundles *bundles, void *out, int threads) {
    bundle_job job = {.bundles = bundles, .out = out, .last = endor_bundle_count(bundles), .kernel = kernel};
    if (!endor_ops_of(kernel)) return ENDOR_UNSUPPORTED;
    run_over(&job, threads, expand_bundles);
    return atomic_load(&job.status);
}
