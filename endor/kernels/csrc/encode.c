/* Packed arrays from dense elements, byte for byte those of the numpy reference.
 *
 * scan:     bitmap, tile offsets and exponent histogram in one read of the tensor; the caller plans from them.
 * pack_raw: bitmap, offsets and values in one read of memory. Chunks of tiles are taken in order; a thread that
 *           knows where its chunk's values begin sends them there as it compresses; one that does not keeps them in
 *           L2 until the chunk before is done. Each then publishes its end.
 */
#include "encode.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

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

#define STAGE 16384   /* bytes of values that leave L1 together */

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
