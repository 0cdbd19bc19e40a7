/* Packed arrays of codec `exp` from dense elements, byte for byte those of the numpy reference.
 *
 * exp_start:  bitmap, offsets, byte planes and bit planes in one read of memory, and the statistics with them. Chunks are
 *             taken in order as in pack_raw, and what a chunk has beyond its last whole word of 64 stored elements goes
 *             on to the next with the rank. The caller guesses the window from a sample, and plans from the statistics:
 *             where it guessed right, the arrays stand.
 * exp_finish: the patches.
 */
#include "encode.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

/* Patches of one chunk, each rank << 8 | exponent. */
typedef struct {
    uint64_t *items;
    size_t count, room;
} patch_list;

/* Where a chunk begins: stored elements before it, UNKNOWN until published, and those of the plane word that it goes on
 * with, which its first elements complete. */
typedef struct {
    atomic_uint_fast64_t rank;
    uint8_t elements[64 * 4];
} handover;

typedef struct {
    const endor_ops *ops;
    endor_tensor tensor; /* the arrays to fill, nnz being the room in them */
    const uint8_t *src;
    endor_stream stream;
    patch_list *lists;   /* [chunks] */
    handover *begins;    /* [chunks + 1], with a bitmap */
    int counting;        /* fill `histogram` and `zeros` */
    uint64_t chunks, stored;
    atomic_uint_fast64_t next, zeros;
    atomic_uint_fast64_t histogram[256];
    atomic_int status;
} exp_job;

/* What a thread counts. */
typedef struct {
    uint64_t sets[1 << ENDOR_TALLIED]; /* of endor_tally */
    uint64_t outside[256], zeros;      /* exponents outside the window, and elements with no bit set among them */
} exp_counts;

static void add_patches(exp_job *job, patch_list *list, uint64_t outside, uint64_t rank, const uint8_t *elements,
                        exp_counts *counts) {
    const endor_stream *s = &job->stream;
    if (list->room - list->count < 64) {
        size_t room = 2 * list->room + 256;
        uint64_t *items = realloc(list->items, room * sizeof *items);
        if (!items) {
            atomic_store(&job->status, ENDOR_NO_MEMORY);
            return;
        }
        list->items = items;
        list->room = room;
    }
    const uint32_t field = (1u << s->exponent_bits) - 1;
    uint64_t *items = list->items + list->count;
    for (; outside; outside &= outside - 1) {
        const unsigned i = (unsigned)__builtin_ctzll(outside);
        const uint8_t *p = elements + i * (size_t)s->itemsize;
        const uint32_t x = s->itemsize == 2 ? load16(p) : s->itemsize == 4 ? load32(p) : *p;
        const uint32_t exponent = x >> s->mantissa_bits & field;
        *items++ = (rank + i) << 8 | exponent;
        counts->outside[exponent]++;
        counts->zeros += !x;
    }
    list->count = (size_t)(items - list->items);
}

#define EMIT_WORDS 64 /* plane words that are split at a time */

/* Store `words` plane words from `word` on; they are whole. */
static void emit_words(exp_job *job, patch_list *list, uint64_t word, uint64_t words, const uint8_t *elements,
                       int cached, exp_counts *counts) {
    const endor_stream *s = &job->stream;
    const int below = s->rest_bits % 8;
    const uint64_t word_bytes = 64 * (uint64_t)s->itemsize;
    uint64_t *sets = job->counting ? counts->sets : NULL, outside[EMIT_WORDS];
    for (uint64_t done = 0, step; done < words; done += step) {
        step = min64(words - done, EMIT_WORDS);
        const uint8_t *src = elements + done * word_bytes;
        if (job->ops->split_words) {
            job->ops->split_words(s, src, cached, word + done, step, outside, sets);
        } else {
            for (uint64_t i = 0; i < step; i++) {
                endor_slots slots;
                uint64_t at = word + done + i;
                for (int j = 0; j < s->byte_planes; j++) {
                    slots.bytes[j] = (uint8_t *)s->bytes + j * s->byte_stride + 64 * at;
                }
                outside[i] = job->ops->split(s, src + i * word_bytes, &slots);
                for (int j = 0; j < s->bit_planes; j++) {
                    store64((uint8_t *)s->planes + j * s->plane_stride + 8 * at, slots.planes[j]);
                }
                if (sets) endor_tally(slots.planes + below, s->k, sets);
            }
        }
        for (uint64_t i = 0; i < step; i++) {
            if (outside[i]) {
                add_patches(job, list, outside[i], 64 * (word + done + i), src + i * word_bytes, counts);
            }
        }
    }
    if (sets) sets[0] += 64 * words;
}

/* Store the last plane word, of which the first `valid` elements exist. */
static void emit_last(exp_job *job, patch_list *list, uint64_t word, uint64_t valid, const uint8_t *elements,
                      exp_counts *counts) {
    const endor_stream *s = &job->stream;
    ENDOR_ALIGNED uint8_t whole[64 * 4] = {0}, partial[3][64];
    uint64_t mask = (1ull << valid) - 1;
    endor_slots slots;
    memcpy(whole, elements, valid * (uint64_t)s->itemsize);
    for (int j = 0; j < s->byte_planes; j++) slots.bytes[j] = partial[j];
    uint64_t outside = job->ops->split(s, whole, &slots) & mask;
    for (int j = 0; j < s->bit_planes; j++) {
        slots.planes[j] &= mask;
        store64((uint8_t *)s->planes + j * s->plane_stride + 8 * word, slots.planes[j]);
    }
    for (int j = 0; j < s->byte_planes; j++) {
        memcpy((uint8_t *)s->bytes + j * s->byte_stride + 64 * word, partial[j], valid);
    }
    if (job->counting) {
        endor_tally(slots.planes + s->rest_bits % 8, s->k, counts->sets);
        counts->sets[0] += valid;
    }
    if (outside) add_patches(job, list, outside, 64 * word, elements, counts);
}

static void emit_dense(exp_job *job, uint64_t c, exp_counts *counts) {
    uint64_t n = job->tensor.numel, itemsize = (uint64_t)job->tensor.itemsize;
    uint64_t first = c * PACK_TILES * ENDOR_WORDS, last = min64(first + PACK_TILES * ENDOR_WORDS, n / 64);
    if (last > first) emit_words(job, &job->lists[c], first, last - first, job->src + 64 * first * itemsize, 0, counts);
    if (c + 1 == job->chunks && n % 64) {
        uint64_t word = n / 64;
        emit_last(job, &job->lists[c], word, n % 64, job->src + 64 * word * itemsize, counts);
    }
}

/* A chunk's stored elements are gathered behind the ones handed over. As soon as the chunk's begin is known, whole words
 * are split while they are in L1. */
static void emit_sparse(exp_job *job, uint64_t c, exp_counts *counts) {
    const endor_tensor *t = &job->tensor;
    handover *begin = &job->begins[c], *end = begin + 1;
    const uint64_t itemsize = (uint64_t)t->itemsize, first = c * PACK_TILES;
    const uint64_t stop = min64(first + PACK_TILES, tiles_of(t->numel));
    const int ls = log2_itemsize(t->itemsize);
    uint8_t *tile_offsets = (uint8_t *)t->tile_offsets;
    ENDOR_ALIGNED uint8_t tmp[ENDOR_TILE * 4], stage[(PACK_TILES * ENDOR_TILE + 64) * 4 + ENDOR_SLACK];
    uint8_t *held = stage + 64 * itemsize, *from = NULL; /* end of what is gathered, begin of what is not yet split */
    uint64_t rank = UNKNOWN, word = 0, count = 0;
    for (uint64_t tile = first; tile < stop; tile++) {
        const void *src = tile_of(job->src, t->numel, tile, itemsize, tmp);
        uint8_t *bitmap = (uint8_t *)t->bitmap + tile * (ENDOR_TILE / 8);
        job->ops->scan[ls](src, bitmap);
        uint64_t found = job->ops->compress[ls](bitmap, src, held);
        held += found * itemsize;
        count += found;
        store32(tile_offsets + 4 * (tile + 1), (uint32_t)count);
        if (rank == UNKNOWN) {
            while ((rank = atomic_load_explicit(&begin->rank, memory_order_acquire)) == UNKNOWN && tile + 1 == stop) {
                sched_yield();
            }
            if (rank == UNKNOWN) continue;
            word = rank / 64;
            from = stage + (64 - rank % 64) * itemsize;
            memcpy(from, begin->elements, rank % 64 * itemsize);
        }
        uint64_t words = (uint64_t)(held - from) / itemsize / 64;
        uint8_t *rest = from + 64 * words * itemsize;
        if (tile + 1 == stop) {
            memcpy(end->elements, rest, (size_t)(held - rest));
            atomic_store_explicit(&end->rank, rank + count, memory_order_release);
        }
        emit_words(job, &job->lists[c], word, words, from, 1, counts);
        word += words;
        from = rest;
    }
    if (stop == tiles_of(t->numel) && held > from) {
        emit_last(job, &job->lists[c], word, (uint64_t)(held - from) / itemsize, from, counts);
    }
    for (uint64_t tile = first; tile < stop; tile++) {
        uint8_t *offset = tile_offsets + 4 * (tile + 1);
        store32(offset, load32(offset) + (uint32_t)rank);
    }
}

static void emit_chunks(void *context) {
    exp_job *job = context;
    const endor_stream *s = &job->stream;
    exp_counts counts = {{0}, {0}, 0};
    /* a chunk that is not finished would leave those behind it waiting, whatever the status */
    for (uint64_t c; (c = atomic_fetch_add(&job->next, 1)) < job->chunks;) {
        if (job->tensor.bitmap) emit_sparse(job, c, &counts);
        else emit_dense(job, c, &counts);
    }
    if (!job->counting) return;
    for (int j = 0; j < s->k; j++) { /* from codes that have all bits of a set to codes that are the set */
        for (int m = 0; m < 1 << s->k; m++) {
            if (!(m >> j & 1)) counts.sets[m] -= counts.sets[m | 1 << j];
        }
    }
    const uint32_t field = (1u << s->exponent_bits) - 1;
    uint64_t outside = 0;
    for (int i = 0; i < 256; i++) outside += counts.outside[i];
    counts.sets[0] -= outside; /* those outside have code 0 */
    for (uint32_t m = 0; m < 1u << s->k; m++) counts.outside[(s->base + m) & field] += counts.sets[m];
    for (int i = 0; i < 256; i++) {
        if (counts.outside[i]) atomic_fetch_add(&job->histogram[i], counts.outside[i]);
    }
    atomic_fetch_add(&job->zeros, counts.zeros);
}

/* Stored elements before patch group `group`. */
static uint64_t group_start(const endor_tensor *t, uint64_t group) {
    uint64_t tile = min64(group * ENDOR_GROUP, tiles_of(t->numel));
    return t->tile_offsets ? load32(t->tile_offsets + 4 * tile) : min64(tile * ENDOR_TILE, t->numel);
}

ENDOR_API void endor_exp_free(exp_job *job) {
    if (!job) return;
    for (uint64_t c = 0; job->lists && c < job->chunks; c++) free(job->lists[c].items);
    free(job->lists);
    free(job->begins);
    free(job);
}

/* Fill the arrays of `tensor` (numel, window and pointers set), patches apart, from the dense elements at src, in one
 * read: bitmap and tile_offsets too, unless they are NULL. `tensor->nnz` is the number of elements that the other arrays
 * have room for, which decides where their planes begin. When histogram is not NULL it receives, as from endor_scan, the
 * exponents of the elements with a bit set; the window must then have at most ENDOR_TALLIED bits and, without a bitmap,
 * not contain exponent 0. Returns what endor_exp_finish and endor_exp_free take, NULL without memory. */
ENDOR_API exp_job *endor_exp_start(int kernel, const endor_tensor *tensor, const void *src, uint64_t *histogram,
                                   uint64_t *nnz, int threads) {
    exp_job *job = calloc(1, sizeof *job);
    if (!job) return NULL;
    job->ops = endor_ops_of(kernel);
    job->tensor = *tensor;
    job->src = src;
    job->counting = histogram != NULL;
    job->chunks = (tiles_of(tensor->numel) + PACK_TILES - 1) / PACK_TILES;
    endor_stream_of(tensor, &job->stream);
    for (int i = 0; i < 256; i++) atomic_init(&job->histogram[i], 0);
    atomic_init(&job->next, 0);
    atomic_init(&job->zeros, 0);
    atomic_init(&job->status, ENDOR_OK);
    job->lists = calloc(job->chunks + 1, sizeof *job->lists);
    if (tensor->bitmap) {
        job->begins = malloc((job->chunks + 1) * sizeof *job->begins);
        for (uint64_t c = 0; job->begins && c <= job->chunks; c++) atomic_init(&job->begins[c].rank, c ? UNKNOWN : 0);
        store32((uint8_t *)tensor->tile_offsets, 0);
    }
    if (!job->ops || !job->lists || (tensor->bitmap && !job->begins)) {
        endor_exp_free(job);
        return NULL;
    }
    endor_parallel(threads, 4 * tensor->numel * (uint64_t)tensor->itemsize, emit_chunks, job);
    if (atomic_load(&job->status) != ENDOR_OK) {
        endor_exp_free(job);
        return NULL;
    }
    job->stored = tensor->bitmap ? atomic_load(&job->begins[job->chunks].rank) : tensor->numel;
    *nnz = tensor->bitmap ? job->stored : tensor->numel - atomic_load(&job->zeros);
    if (histogram) {
        for (int i = 0; i < 256; i++) histogram[i] = atomic_load(&job->histogram[i]);
        histogram[0] -= atomic_load(&job->zeros);
    }
    return job;
}

/* Fill the patch arrays of `t`, the tensor that endor_exp_start packed, from its tile_offsets: nothing else of it is used. */
ENDOR_API int endor_exp_finish(const exp_job *job, const endor_tensor *t) {
    uint64_t groups = (tiles_of(t->numel) + ENDOR_GROUP - 1) / ENDOR_GROUP, group = 0, at = 0;
    uint8_t *offsets = (uint8_t *)t->patch_offsets, *ranks = (uint8_t *)t->patch_ranks;
    uint8_t *exponents = (uint8_t *)t->patch_exponents;
    if (job->stored != t->nnz) return ENDOR_CORRUPT; /* the source changed since it was scanned */
    for (uint64_t c = 0; c < job->chunks; c++) {
        for (size_t i = 0; i < job->lists[c].count; i++, at++) {
            if (at == t->patches) return ENDOR_CORRUPT;
            uint64_t rank = job->lists[c].items[i] >> 8;
            while (group_start(t, group + 1) <= rank) store32(offsets + 4 * ++group, (uint32_t)at);
            uint16_t relative = (uint16_t)(rank - group_start(t, group));
            memcpy(ranks + 2 * at, &relative, 2);
            exponents[at] = (uint8_t)job->lists[c].items[i];
        }
    }
    if (at != t->patches) return ENDOR_CORRUPT;
    if (!at) return ENDOR_OK;
    while (group < groups) store32(offsets + 4 * ++group, (uint32_t)at);
    store32(offsets, 0);
    return ENDOR_OK;
}
