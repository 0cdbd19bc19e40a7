/* Packed arrays from dense elements, byte for byte those of the numpy reference.
 *
 * scan:      bitmap, tile offsets and exponent histogram in one read of the tensor; the caller plans from them.
 * pack_raw:  bitmap, offsets and values in one read of memory. Chunks of tiles are taken in order; a thread that
 *            knows where its chunk's values begin sends them there as it compresses; one that does not keeps them in
 *            L2 until the chunk before is done. Each then publishes its end.
 * pack_exp:  byte planes, bit planes and patches. A 64-bit word of a plane belongs to the chunk that holds the
 *            word's first element: that chunk reads on into its successors for the rest, so no word has two writers.
 */
#include "endor.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

/* Tile `tile` of src, padded with zeros past n. */
static const void *tile_of(const uint8_t *src, uint64_t n, uint64_t tile, uint64_t itemsize, uint8_t *tmp) {
    uint64_t begin = tile * ENDOR_TILE, left = n - begin;
    if (left >= ENDOR_TILE) return src + begin * itemsize;
    memcpy(tmp, src + begin * itemsize, left * itemsize);
    memset(tmp + left * itemsize, 0, (ENDOR_TILE - left) * itemsize);
    return tmp;
}

typedef struct {
    const endor_ops *ops;
    const uint8_t *src;
    uint64_t n, chunk, chunks;
    int itemsize, exponent_bits, mantissa_bits, streaming;
    uint8_t *bitmap, *tile_offsets, *values;
    atomic_uint_fast64_t next;
    atomic_uint_fast64_t *histogram; /* [256] or NULL */
    atomic_uint_fast64_t *ends;      /* [chunks + 1]: stored elements before a chunk, UNKNOWN until published */
} scan_job;

#define UNKNOWN UINT64_MAX

static uint64_t scan_tiles(scan_job *job, uint64_t tile, uint64_t end, uint32_t *hist) {
    ENDOR_ALIGNED uint8_t tmp[ENDOR_TILE * 4];
    uint64_t total = 0;
    int ls = log2_itemsize(job->itemsize);
    for (; tile < end; tile++) {
        const void *src = tile_of(job->src, job->n, tile, (uint64_t)job->itemsize, tmp);
        uint32_t count = job->ops->scan[ls](src, job->bitmap + tile * (ENDOR_TILE / 8));
        store32(job->tile_offsets + 4 * (tile + 1), count);
        total += count;
        if (hist) job->ops->histogram(src, job->itemsize, job->exponent_bits, job->mantissa_bits, hist);
    }
    return total;
}

static void scan_chunks(void *context) {
    scan_job *job = context;
    uint64_t tiles = tiles_of(job->n);
    for (;;) {
        uint64_t c = atomic_fetch_add(&job->next, 1);
        if (c >= job->chunks) return;
        uint32_t hist[4 * 256] = {0};
        scan_tiles(job, c * job->chunk, min64((c + 1) * job->chunk, tiles), hist);
        for (int i = 0; i < 256; i++) {
            uint64_t sum = (uint64_t)hist[i] + hist[256 + i] + hist[512 + i] + hist[768 + i];
            if (sum) atomic_fetch_add(&job->histogram[i], sum);
        }
    }
}

/* Write bitmap (u8[n_tiles * 128]), tile_offsets (u32[n_tiles + 1]) and the exponent histogram of the elements with a
 * bit set (u64[256]). Returns their number, or UINT64_MAX when the kernel is not available. */
ENDOR_API uint64_t endor_scan(int kernel, const void *src, uint64_t n, int itemsize, int exponent_bits,
                              int mantissa_bits, uint8_t *bitmap, uint8_t *tile_offsets, uint64_t *histogram,
                              int threads) {
    atomic_uint_fast64_t hist[256];
    uint64_t tiles = tiles_of(n), total = 0;
    scan_job job = {.ops = endor_ops_of(kernel), .src = src, .n = n, .chunk = 64, .chunks = (tiles + 63) / 64,
                    .itemsize = itemsize, .exponent_bits = exponent_bits, .mantissa_bits = mantissa_bits,
                    .bitmap = bitmap, .tile_offsets = tile_offsets, .histogram = hist};
    if (!job.ops) return UNKNOWN;
    for (int i = 0; i < 256; i++) atomic_init(&hist[i], 0);
    atomic_init(&job.next, 0);
    endor_parallel(threads, 4 * n * (uint64_t)itemsize, scan_chunks, &job);
    store32(tile_offsets, 0);
    for (uint64_t t = 1; t <= tiles; t++) {
        total += load32(tile_offsets + 4 * t);
        store32(tile_offsets + 4 * t, (uint32_t)total);
    }
    for (int i = 0; i < 256; i++) histogram[i] = atomic_load(&hist[i]);
    histogram[0] -= tiles * ENDOR_TILE - total; /* zeros and padding have exponent field 0 */
    return total;
}

#define PACK_TILES 16 /* tiles in a chunk */
#define STAGE 4096    /* bytes of values that leave L1 together */

static void put(const scan_job *job, uint8_t *dst, const uint8_t *src, uint64_t nbytes) {
    if (job->streaming) job->ops->copy_streaming(dst, src, nbytes);
    else memcpy(dst, src, nbytes);
}

static void pack_chunks(void *context) {
    scan_job *job = context;
    ENDOR_ALIGNED uint8_t tmp[ENDOR_TILE * 4], stage[PACK_TILES * ENDOR_TILE * 4 + 2 * ENDOR_SLACK];
    uint64_t tiles = tiles_of(job->n), itemsize = (uint64_t)job->itemsize, c;
    int ls = log2_itemsize(job->itemsize);
    while ((c = atomic_fetch_add(&job->next, 1)) < job->chunks) {
        uint64_t first = c * PACK_TILES, end = min64(first + PACK_TILES, tiles), held = 0, count = 0;
        uint64_t at = atomic_load_explicit(&job->ends[c], memory_order_acquire);
        uint8_t *dst = at == UNKNOWN ? NULL : job->values + at * itemsize, *run = stage + ((uintptr_t)dst & 63);
        for (uint64_t tile = first; tile < end; tile++) {
            const void *src = tile_of(job->src, job->n, tile, itemsize, tmp);
            uint8_t *bitmap = job->bitmap + tile * (ENDOR_TILE / 8);
            job->ops->scan[ls](src, bitmap);
            uint64_t found = job->ops->compress[ls](bitmap, src, run + held);
            count += found;
            held += found * itemsize;
            store32(job->tile_offsets + 4 * (tile + 1), (uint32_t)count);
            if (!dst || held < STAGE) continue;
            uint64_t whole = held - ((uintptr_t)(dst + held) & 63); /* the last line goes on with the next tile */
            put(job, dst, run, whole);
            dst += whole;
            held -= whole;
            memcpy(stage, run + whole, 64);
            run = stage;
        }
        if (!dst) {
            while ((at = atomic_load_explicit(&job->ends[c], memory_order_acquire)) == UNKNOWN) sched_yield();
            dst = job->values + at * itemsize;
        }
        atomic_store_explicit(&job->ends[c + 1], at + count, memory_order_release);
        put(job, dst, run, held);
        for (uint64_t tile = first; tile < end; tile++) {
            uint8_t *offset = job->tile_offsets + 4 * (tile + 1);
            store32(offset, load32(offset) + (uint32_t)at);
        }
    }
    if (job->streaming) job->ops->fence();
}

/* Write bitmap, tile_offsets and values (room for nnz elements, or n where nnz is not known). Returns nnz. */
ENDOR_API uint64_t endor_pack_raw(int kernel, const void *src, uint64_t n, int itemsize, uint8_t *bitmap,
                                  uint8_t *tile_offsets, uint8_t *values, int threads) {
    uint64_t chunks = (tiles_of(n) + PACK_TILES - 1) / PACK_TILES;
    scan_job job = {.ops = endor_ops_of(kernel), .src = src, .n = n, .chunks = chunks,
                    .itemsize = itemsize, .bitmap = bitmap, .tile_offsets = tile_offsets, .values = values,
                    .streaming = n * (uint64_t)itemsize > ENDOR_STREAMING};
    if (!job.ops) return UNKNOWN;
    job.ends = malloc((chunks + 1) * sizeof *job.ends);
    if (!job.ends) return UNKNOWN;
    for (uint64_t c = 0; c <= chunks; c++) atomic_init(&job.ends[c], c ? UNKNOWN : 0);
    atomic_init(&job.next, 0);
    store32(tile_offsets, 0);
    endor_parallel(threads, 4 * n * (uint64_t)itemsize, pack_chunks, &job);
    uint64_t nnz = atomic_load(&job.ends[chunks]);
    free(job.ends);
    return nnz;
}

/* Patches of one chunk, each rank << 8 | exponent. */
typedef struct {
    uint64_t *items;
    size_t count, room;
} patch_list;

typedef struct {
    const endor_ops *ops;
    const endor_tensor *tensor; /* the arrays to fill; bitmap and tile_offsets are filled already */
    const uint8_t *src;
    endor_stream stream;
    patch_list *lists;
    uint64_t chunk, chunks;
    atomic_uint_fast64_t next;
    atomic_int status;
} exp_job;

static void add_patches(exp_job *job, patch_list *list, uint64_t outside, uint64_t rank, const uint8_t *elements) {
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
    for (; outside; outside &= outside - 1) {
        unsigned i = (unsigned)__builtin_ctzll(outside);
        uint32_t x = 0;
        memcpy(&x, elements + i * (size_t)s->itemsize, (size_t)s->itemsize);
        uint32_t exponent = x >> s->mantissa_bits & ((1u << s->exponent_bits) - 1);
        list->items[list->count++] = (rank + i) << 8 | exponent;
    }
}

/* Store plane word `word` from 64 elements, of which the first `valid` exist. */
static void emit_word(exp_job *job, patch_list *list, uint64_t word, uint64_t valid, const uint8_t *elements) {
    const endor_stream *s = &job->stream;
    uint8_t partial[3][64];
    uint64_t mask = valid == 64 ? UINT64_MAX : (1ull << valid) - 1;
    endor_slots slots;
    for (int j = 0; j < s->byte_planes; j++) {
        slots.bytes[j] = valid == 64 ? (uint8_t *)s->bytes + j * s->byte_stride + 64 * word : partial[j];
    }
    uint64_t outside = job->ops->split(s, elements, &slots) & mask;
    for (int j = 0; j < s->bit_planes; j++) {
        store64((uint8_t *)s->planes + j * s->plane_stride + 8 * word, slots.planes[j] & mask);
    }
    if (valid < 64) {
        for (int j = 0; j < s->byte_planes; j++) {
            memcpy((uint8_t *)s->bytes + j * s->byte_stride + 64 * word, partial[j], valid);
        }
    }
    if (outside) add_patches(job, list, outside, 64 * word, elements);
}

static void emit_dense(exp_job *job, patch_list *list, uint64_t first, uint64_t end) {
    uint64_t n = job->tensor->numel, itemsize = (uint64_t)job->tensor->itemsize;
    uint64_t words = (min64(end * ENDOR_TILE, n) + 63) / 64;
    for (uint64_t word = first * ENDOR_WORDS; word < words; word++) {
        const uint8_t *elements = job->src + 64 * word * itemsize;
        uint64_t valid = min64(64, n - 64 * word);
        ENDOR_ALIGNED uint8_t tmp[64 * 4] = {0};
        if (valid < 64) elements = memcpy(tmp, elements, valid * itemsize);
        emit_word(job, list, word, valid, elements);
    }
}

static void emit_sparse(exp_job *job, patch_list *list, uint64_t first, uint64_t end) {
    const endor_tensor *t = job->tensor;
    uint64_t tiles = tiles_of(t->numel), itemsize = (uint64_t)t->itemsize;
    uint64_t rank = load32(t->tile_offsets + 4 * first), stop = load32(t->tile_offsets + 4 * end);
    uint64_t word = (rank + 63) / 64, last = (stop + 63) / 64; /* the words that begin in this chunk */
    uint64_t skip = 64 * word - rank, held = 0;
    int ls = log2_itemsize(t->itemsize);
    ENDOR_ALIGNED uint8_t tmp[ENDOR_TILE * 4], run[(ENDOR_TILE + 64) * 4 + ENDOR_SLACK];
    for (uint64_t tile = first; word < last && tile < tiles; tile++) {
        const void *src = tile_of(job->src, t->numel, tile, itemsize, tmp);
        held += job->ops->compress[ls](t->bitmap + tile * (ENDOR_TILE / 8), src, run + held * itemsize);
        if (skip) {
            uint64_t drop = min64(skip, held);
            memmove(run, run + drop * itemsize, (held - drop) * itemsize);
            skip -= drop;
            held -= drop;
        }
        uint64_t used = 0;
        for (; held - used >= 64 && word < last; used += 64) emit_word(job, list, word++, 64, run + used * itemsize);
        held -= used;
        if (word < last && used) memmove(run, run + used * itemsize, held * itemsize);
    }
    if (word < last && held) { /* the tensor's last word */
        memset(run + held * itemsize, 0, (64 - held) * itemsize);
        emit_word(job, list, word, held, run);
    }
}

static void emit_chunks(void *context) {
    exp_job *job = context;
    uint64_t tiles = tiles_of(job->tensor->numel);
    for (;;) {
        uint64_t c = atomic_fetch_add(&job->next, 1);
        if (c >= job->chunks || atomic_load(&job->status) != ENDOR_OK) return;
        uint64_t first = c * job->chunk, end = min64(first + job->chunk, tiles);
        if (job->tensor->bitmap) emit_sparse(job, &job->lists[c], first, end);
        else emit_dense(job, &job->lists[c], first, end);
    }
}

/* Stored elements before patch group `group`. */
static uint64_t group_start(const endor_tensor *t, uint64_t group) {
    uint64_t tile = min64(group * ENDOR_GROUP, tiles_of(t->numel));
    return t->tile_offsets ? load32(t->tile_offsets + 4 * tile) : min64(tile * ENDOR_TILE, t->numel);
}

static int merge_patches(const exp_job *job) {
    const endor_tensor *t = job->tensor;
    uint64_t groups = (tiles_of(t->numel) + ENDOR_GROUP - 1) / ENDOR_GROUP, group = 0, at = 0;
    uint8_t *offsets = (uint8_t *)t->patch_offsets, *ranks = (uint8_t *)t->patch_ranks;
    uint8_t *exponents = (uint8_t *)t->patch_exponents;
    for (uint64_t c = 0; c < job->chunks; c++) {
        for (size_t i = 0; i < job->lists[c].count; i++, at++) {
            if (at == t->patches) return ENDOR_CORRUPT; /* the source changed since it was scanned */
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

/* Fill bytes, planes and patch arrays of `tensor` (numel, nnz, patches, window and pointers set; bitmap and
 * tile_offsets filled, or NULL) from the dense elements at src. */
ENDOR_API int endor_pack_exp(int kernel, const endor_tensor *tensor, const void *src, int threads) {
    uint64_t tiles = tiles_of(tensor->numel), chunk = 64;
    exp_job job = {.ops = endor_ops_of(kernel), .tensor = tensor, .src = src, .chunk = chunk};
    if (!job.ops) return ENDOR_UNSUPPORTED;
    job.chunks = (tiles + chunk - 1) / chunk;
    endor_stream_of(tensor, &job.stream);
    atomic_init(&job.next, 0);
    atomic_init(&job.status, ENDOR_OK);
    job.lists = calloc(job.chunks ? job.chunks : 1, sizeof *job.lists);
    if (!job.lists) return ENDOR_NO_MEMORY;
    endor_parallel(threads, 4 * tensor->numel * (uint64_t)tensor->itemsize, emit_chunks, &job);
    int status = atomic_load(&job.status);
    if (status == ENDOR_OK) status = merge_patches(&job);
    for (uint64_t c = 0; c < job.chunks; c++) free(job.lists[c].items);
    free(job.lists);
    return status;
}
