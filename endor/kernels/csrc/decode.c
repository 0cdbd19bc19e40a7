/* Dense elements from a packed tensor: any flat range, any number of threads.
 *
 * Unit of work = a tile. Its run of stored elements is brought into registers (raw) or into a buffer in L1 (exp:
 * decode whole plane words, patch by rank, then place), and placed by the bitmap. Whole tiles go straight to `out`;
 * the two ends of the range, and tiles that streaming stores could not reach aligned, go through a tile in L1.
 * Near the end of an array, whatever a register-wide load would read past it is bounced through a copy.
 */
#include "endor.h"

#include <stdatomic.h>

void endor_stream_of(const endor_tensor *t, endor_stream *s) {
    s->bytes = t->bytes;
    s->planes = t->planes;
    s->byte_stride = t->nnz;
    s->plane_stride = (t->nnz + 63) / 64 * 8;
    s->byte_planes = t->rest_bits / 8;
    s->bit_planes = t->k + t->rest_bits % 8;
    s->itemsize = t->itemsize;
    s->exponent_bits = t->exponent_bits;
    s->mantissa_bits = t->mantissa_bits;
    s->rest_bits = t->rest_bits;
    s->k = t->k;
    s->base = (uint32_t)t->base;
    if (t->itemsize != 1) return;
    for (uint32_t w = 0; w < 256; w++) {
        uint32_t exponent = ((w >> t->rest_bits) + s->base) & ((1u << t->exponent_bits) - 1);
        uint32_t sign = t->rest_bits ? w >> t->mantissa_bits & 1 : 0;
        s->lut[w] = (uint8_t)(exponent << t->mantissa_bits | sign << 7 | (w & ((1u << t->mantissa_bits) - 1)));
    }
}

/* Decode stored elements [first, last), last at most nnz, into buf, and some before and after them; returns where the
 * first one is. Whole plane words, or what `stream_from` takes; the last of the array are decoded from a copy. */
uint8_t *endor_stream_run(const endor_ops *ops, const endor_tensor *t, const endor_stream *s, uint64_t first,
                          uint64_t last, uint8_t *buf) {
    uint64_t step = ops->stream_from ? 32 : 64, begin = first / (ops->stream_from ? 8 : 64) * (ops->stream_from ? 8 : 64);
    uint64_t n = (last - begin + step - 1) / step * step, itemsize = (uint64_t)t->itemsize;
    uint64_t whole = min64(n, (t->nnz - begin) / step * step), at = begin + whole;
    if (whole && ops->stream_from) ops->stream_from(s, begin, whole, buf);
    else if (whole) ops->stream(s, begin / 64, whole / 64, buf);
    if (whole < n) {
        uint8_t bytes[3 * 64 + ENDOR_SLACK] = {0}, planes[8 * 8] = {0};
        endor_stream tail = *s;
        for (int j = 0; j < s->byte_planes; j++) memcpy(bytes + 64 * j, s->bytes + j * s->byte_stride + at, t->nnz - at);
        for (int j = 0; j < s->bit_planes; j++) {
            memcpy(planes + 8 * j, s->planes + j * s->plane_stride + at / 8, min64(8, s->plane_stride - at / 8));
        }
        tail.bytes = bytes;
        tail.planes = planes;
        tail.byte_stride = 64;
        tail.plane_stride = 8;
        if (ops->stream_from) ops->stream_from(&tail, 0, step, buf + whole * itemsize);
        else ops->stream(&tail, 0, 1, buf + whole * itemsize);
    }
    return buf + (first - begin) * itemsize;
}

/* Fetch whole tiles around the elements [flat, end). */
void endor_fetch(const endor_tensor *t, const endor_stream *s, uint64_t flat, uint64_t end) {
    uint64_t first = flat / ENDOR_TILE, last = tiles_of(end);
    uint64_t rank = endor_rank_of_tile(t, first), stop = endor_rank_of_tile(t, last);
    if (stop < rank || stop - rank > (last - first) * ENDOR_TILE) return;
    if (t->bitmap) endor_prefetch(t->bitmap + first * (ENDOR_TILE / 8), (last - first) * (ENDOR_TILE / 8));
    if (t->codec != ENDOR_EXP) {
        endor_prefetch(t->values + rank * (uint64_t)t->itemsize, (stop - rank) * (uint64_t)t->itemsize);
        return;
    }
    for (int j = 0; j < s->byte_planes; j++) endor_prefetch(s->bytes + (uint64_t)j * s->byte_stride + rank, stop - rank);
    for (int j = 0; j < s->bit_planes; j++) {
        endor_prefetch(s->planes + (uint64_t)j * s->plane_stride + rank / 8, (stop - rank) / 8 + 1);
    }
}

/* The patches from stored element `rank` on, which tile `tile` holds. */
endor_patches endor_patches_at(const endor_tensor *t, uint64_t tile, uint64_t rank) {
    endor_patches cursor = {0};
    if (!t->patches) return cursor;
    endor_enter_group(t, &cursor, tile / ENDOR_GROUP);
    uint64_t high = cursor.end;
    while (cursor.at < high) {
        uint64_t middle = (cursor.at + high) / 2;
        if (cursor.start + load16(t->patch_ranks + 2 * middle) < rank) cursor.at = middle + 1;
        else high = middle;
    }
    return cursor;
}

#define PATCH_WHILE(FIELD)                                                                                        \
    for (; cursor->at < cursor->end; cursor->at++) {                                                              \
        uint64_t rank = cursor->start + load16(t->patch_ranks + 2 * cursor->at);                                  \
        uint32_t exponent = (uint32_t)t->patch_exponents[cursor->at] << t->mantissa_bits & mask;                  \
        if (rank >= last) break;                                                                                  \
        if (rank < first) continue;                                                                               \
        FIELD x, *at = (FIELD *)elements + (rank - first);                                                        \
        memcpy(&x, at, sizeof x);                                                                                 \
        x = (FIELD)((x & ~mask) | exponent);                                                                      \
        memcpy(at, &x, sizeof x);                                                                                 \
    }

/* Put true exponents into stored elements [first, last), which lie at `elements`, are those of tiles before tile_end,
 * and come next after those that the cursor has passed. */
void endor_patch(const endor_tensor *t, endor_patches *cursor, uint64_t tile_end, uint64_t first, uint64_t last,
                 uint8_t *elements) {
    const uint32_t mask = ((1u << t->exponent_bits) - 1) << t->mantissa_bits;
    for (;;) {
        if (t->itemsize == 1) {
            PATCH_WHILE(uint8_t)
        } else if (t->itemsize == 2) {
            PATCH_WHILE(uint16_t)
        } else {
            PATCH_WHILE(uint32_t)
        }
        if ((cursor->group + 1) * ENDOR_GROUP >= tile_end) return;
        endor_enter_group(t, cursor, cursor->group + 1);
    }
}

/* The stored elements of a tile, where they can be read a register at a time. */
typedef struct {
    const uint8_t *values;
    uint64_t count;
} run_of_tile;

/* Bring a tile's stored elements into buf, of ENDOR_BUFFER elements, or find them where they are. */
static int bring(const endor_ops *ops, const endor_tensor *t, const endor_stream *s, endor_patches *cursor,
                 uint64_t tile, uint8_t *buf, run_of_tile *run) {
    uint64_t itemsize = (uint64_t)t->itemsize, first = endor_rank_of_tile(t, tile), last = endor_rank_of_tile(t, tile + 1);
    if (t->tile_offsets) __builtin_prefetch(t->tile_offsets + 4 * tile + 256); /* too rare for the hardware to see */
    if (last < first || last - first > ENDOR_TILE) return ENDOR_CORRUPT;
    run->values = buf;
    run->count = last - first;
    if (t->codec == ENDOR_EXP) {
        uint8_t *values = endor_stream_run(ops, t, s, first, last, buf);
        if (t->patches) endor_patch(t, cursor, tile + 1, first, last, values);
        run->values = values;
        return ENDOR_OK;
    }
    const uint8_t *source = t->values + first * itemsize;
    uint64_t left = (t->nnz - first) * itemsize;
    if (left >= ENDOR_TILE * itemsize + ENDOR_SLACK) {
        run->values = source;
    } else {
        memcpy(buf, source, left);
        memset(buf + left, 0, ENDOR_TILE * itemsize + ENDOR_SLACK - left);
    }
    return ENDOR_OK;
}

/* Write the 1024 elements of a tile to out; what lies past numel in the last tile is unspecified. */
static int place(const endor_ops *ops, const endor_tensor *t, uint64_t tile, const run_of_tile *run, void *out,
                 int streaming) {
    if (t->bitmap) {
        const uint8_t *bitmap = t->bitmap + tile * (ENDOR_TILE / 8);
        int size = log2_itemsize(t->itemsize), far = t->codec != ENDOR_EXP && ops->expand_far[size];
        uint32_t used = (far ? ops->expand_far : ops->expand)[size](bitmap, run->values, out, streaming);
        return used == run->count ? ENDOR_OK : ENDOR_CORRUPT;
    }
    if (streaming) ops->copy_streaming(out, run->values, run->count * (uint64_t)t->itemsize);
    else memcpy(out, run->values, run->count * (uint64_t)t->itemsize);
    return ENDOR_OK;
}

int endor_decode_tile(const endor_ops *ops, const endor_tensor *t, const endor_stream *s, endor_patches *cursor,
                      uint64_t tile, void *out) {
    ENDOR_ALIGNED uint8_t buf[ENDOR_BUFFER * 4];
    run_of_tile run;
    int status = bring(ops, t, s, cursor, tile, buf, &run);
    return status == ENDOR_OK ? place(ops, t, tile, &run, out, 0) : status;
}

typedef struct {
    const endor_ops *ops;
    const endor_tensor *tensor;
    endor_stream stream;
    uint8_t *out;
    uint64_t start, stop, end_tile, chunk;
    int streaming;
    atomic_uint_fast64_t next;
    atomic_int status;
} decode_job;

static int place_part(decode_job *job, uint64_t tile, const run_of_tile *run) {
    const endor_ops *ops = job->ops;
    uint64_t itemsize = (uint64_t)job->tensor->itemsize, begin = tile * ENDOR_TILE, end = begin + ENDOR_TILE;
    uint64_t low = begin > job->start ? begin : job->start, high = min64(end, job->stop);
    uint8_t *dst = job->out + (low - job->start) * itemsize;
    uint64_t unaligned = (uintptr_t)dst & ((ops->streaming_bytes ? ops->streaming_bytes : 64) - 1);
    if (high - low == ENDOR_TILE && !(job->streaming && unaligned)) {
        return place(ops, job->tensor, tile, run, dst, job->streaming);
    }
    ENDOR_ALIGNED uint8_t tmp[ENDOR_TILE * 4];
    int status = place(ops, job->tensor, tile, run, tmp, 0);
    if (status != ENDOR_OK) return status;
    const uint8_t *src = tmp + (low - begin) * itemsize;
    if (job->streaming) ops->copy_streaming(dst, src, (high - low) * itemsize);
    else memcpy(dst, src, (high - low) * itemsize);
    return ENDOR_OK;
}

/* A tile is brought before the one in front of it is placed: what was just stored in buf would still be on its way to L1,
 * behind the streaming stores of that tile, and loads that straddle two such stores wait for it. */
static int decode_tiles(decode_job *job, uint64_t tile, uint64_t end) {
    ENDOR_ALIGNED uint8_t buf[2][ENDOR_BUFFER * 4];
    const endor_tensor *t = job->tensor;
    endor_patches cursor = endor_patches_at(t, tile, endor_rank_of_tile(t, tile));
    run_of_tile run[2];
    int status = bring(job->ops, t, &job->stream, &cursor, tile, buf[tile & 1], &run[tile & 1]);
    for (; tile < end && status == ENDOR_OK; tile++) {
        uint64_t next = tile + 1;
        if (next < end) status = bring(job->ops, t, &job->stream, &cursor, next, buf[next & 1], &run[next & 1]);
        if (status == ENDOR_OK) status = place_part(job, tile, &run[tile & 1]);
    }
    return status;
}

static void decode_chunks(void *context) {
    decode_job *job = context;
    for (;;) {
        uint64_t tile = atomic_fetch_add_explicit(&job->next, job->chunk, memory_order_relaxed);
        if (tile >= job->end_tile || atomic_load_explicit(&job->status, memory_order_relaxed)) break;
        int status = decode_tiles(job, tile, min64(tile + job->chunk, job->end_tile));
        if (status != ENDOR_OK) atomic_store(&job->status, status);
    }
    if (job->streaming) job->ops->fence();
}

/* Elements [start, stop) to out. Returns ENDOR_CORRUPT where the arrays contradict each other. */
ENDOR_API int endor_decode(int kernel, const endor_tensor *tensor, void *out, uint64_t start, uint64_t stop,
                           int threads, int streaming) {
    decode_job job = {.ops = endor_ops_of(kernel), .tensor = tensor, .out = out, .start = start, .stop = stop};
    if (!job.ops || stop > tensor->numel || start > stop) return ENDOR_UNSUPPORTED;
    if (start == stop) return ENDOR_OK;
    if (tensor->codec == ENDOR_EXP) endor_stream_of(tensor, &job.stream);
    uint64_t first = start / ENDOR_TILE;
    job.end_tile = tiles_of(stop);
    job.streaming = streaming;
    uint64_t share = (job.end_tile - first) / (8 * (uint64_t)(threads > 0 ? threads : 1));
    job.chunk = share < 1 ? 1 : min64(share, 64);
    atomic_init(&job.next, first);
    atomic_init(&job.status, ENDOR_OK);
    endor_parallel(threads, 2 * (stop - start) * (uint64_t)tensor->itemsize, decode_chunks, &job);
    return atomic_load(&job.status);
}
