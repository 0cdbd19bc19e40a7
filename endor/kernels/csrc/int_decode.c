/* Dense elements, or codes, of codec `int`: any flat range, any number of threads.
 *
 * Unit of work = a chunk, decoded from its start, 1024 elements at a time: symbols into L1, from there codes, times
 * steps, to dense elements. Patches are put over the elements of each piece.
 */
#include "int.h"

#include <stdatomic.h>
#include <stdlib.h>

#define LOOK 80 /* bytes from the first word of a row that its decoding may read */

static float step_at(const endor_int_reader *r, uint64_t index) {
    const uint8_t *steps = r->t->steps;
    uint32_t bits;
    float value;
    if (r->t->step_kind == ENDOR_F16) return endor_half(load16(steps + 2 * index)) * r->scale[0] * r->scale[1];
    bits = r->t->step_kind == ENDOR_BF16 ? (uint32_t)load16(steps + 2 * index) << 16 : load32(steps + 4 * index);
    memcpy(&value, &bits, 4);
    return value;
}

static float power_of_two(int exponent) {
    uint32_t bits = (uint32_t)(127 + exponent) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

const endor_int_ops *endor_int_ops_of(int kernel) {
    if (!endor_ops_of(kernel)) return NULL;
    if (kernel == ENDOR_AVX512) return endor_int_avx512_ops();
    if (kernel == ENDOR_AVX2) return endor_int_avx2_ops();
    return endor_int_scalar_ops(); /* NEON has no way of its own yet */
}

int endor_int_open(endor_int_reader *r, int kernel, const endor_int *t, int kind) {
    r->ops = endor_ops_of(kernel);
    r->in = endor_int_ops_of(kernel);
    r->t = t;
    r->kind = kind;
    r->columns = NULL;
    if (!r->in || t->shift < 0 || t->shift > 8 || t->symbols < 1 || t->symbols > 256 || !t->cols) return ENDOR_UNSUPPORTED;
    if (t->levels && (t->shift || t->base || t->patches)) return ENDOR_UNSUPPORTED;
    if (t->step_exponent < -160 || t->step_exponent > 160) return ENDOR_UNSUPPORTED;
    r->scale[0] = power_of_two(t->step_exponent / 2);
    r->scale[1] = power_of_two(t->step_exponent - t->step_exponent / 2);
    uint32_t at = 0;
    for (int s = 0; s < t->symbols; s++) {
        uint32_t frequency = load16(t->frequencies + 2 * s);
        if (frequency >= ENDOR_SCALE || at + frequency > ENDOR_SCALE) return ENDOR_CORRUPT;
        for (uint32_t i = 0; i < frequency; i++) r->table[at + i] = (uint32_t)s | i << 8 | frequency << 20;
        at += frequency;
    }
    if (at != ENDOR_SCALE) return ENDOR_CORRUPT;
    memset(r->levels, 0, sizeof r->levels);
    if (t->levels) memcpy(r->levels, t->levels, (size_t)t->symbols * sizeof(float));
    if (kind != ENDOR_CODES && t->block_cols == 1 && t->block_rows >= t->numel / t->cols) {
        r->columns = malloc((t->cols + ENDOR_PIECE) * sizeof(float));
        if (!r->columns) return ENDOR_NO_MEMORY;
        for (uint64_t i = 0; i < t->cols; i++) r->columns[i] = step_at(r, i);
        for (uint64_t i = 0; i < ENDOR_PIECE; i++) r->columns[t->cols + i] = r->columns[i];
    }
    return ENDOR_OK;
}

void endor_int_close(endor_int_reader *r) { free(r->columns); }

/* The steps of elements [flat, flat + n), the last row's again past numel. */
static const float *steps_of(const endor_int_reader *r, uint64_t flat, uint64_t n, float *buffer) {
    const endor_int *t = r->t;
    uint64_t row = flat / t->cols, col = flat % t->cols, last = (t->numel - 1) / t->cols;
    if (r->columns) return r->columns + col;
    for (uint64_t i = 0; i < n;) {
        uint64_t first = min64(row, last) / t->block_rows * t->step_cols;
        uint64_t end = min64(t->cols - col, n - i) + col;
        while (col < end) {
            uint64_t stop = min64((col / t->block_cols + 1) * t->block_cols, end);
            float step = step_at(r, first + col / t->block_cols);
            for (; col < stop; col++) buffer[i++] = step;
        }
        col = 0;
        row++;
    }
    return buffer;
}

void endor_int_seek(const endor_int_reader *r, endor_int_cursor *c, uint64_t chunk) {
    const endor_int *t = r->t;
    memcpy(c->states, t->states + chunk * sizeof c->states, sizeof c->states);
    c->chunk = chunk;
    c->row = 0;
    c->word = min64(load32(t->chunk_offsets + 4 * chunk), t->n_words);
    c->patch = c->last_patch = 0;
    if (t->patches) {
        c->patch = min64(load32(t->patch_offsets + 4 * chunk), t->patches);
        c->last_patch = min64(load32(t->patch_offsets + 4 * chunk + 4), t->patches);
    }
}

/* Returns whether there were words enough. */
static int symbols_of(const endor_int_reader *r, endor_int_cursor *c, uint64_t rows, uint8_t *symbols) {
    const endor_int *t = r->t;
    const uint8_t *at = t->words + 2 * c->word, *end = t->words + 2 * t->n_words;
    while (rows && end - at >= LOOK) {
        uint64_t safe = min64(((uint64_t)(end - at) - LOOK) / (2 * ENDOR_LANES) + 1, rows);
        at = r->in->rows(r->table, c->states, at, safe, symbols);
        symbols += ENDOR_LANES * safe;
        rows -= safe;
    }
    uint64_t left = (uint64_t)(end - at), used = 0;
    if (rows) { /* fewer than LOOK bytes are left: zeros follow them */
        uint8_t tail[2 * LOOK + ENDOR_SLACK] = {0};
        memcpy(tail, at, left);
        for (; rows && used <= left; rows--, symbols += ENDOR_LANES) {
            used = (uint64_t)(r->in->rows(r->table, c->states, tail + used, 1, symbols) - tail);
        }
        memset(symbols, 0, ENDOR_LANES * rows);
    }
    c->word = (uint64_t)(at - t->words) / 2 + used / 2;
    return used <= left;
}

static void patch(const endor_int_reader *r, endor_int_cursor *c, uint64_t n, const float *steps, void *out) {
    uint64_t first = c->row * ENDOR_LANES;
    for (; c->patch < c->last_patch; c->patch++) {
        uint64_t rank = load16(r->t->patch_ranks + 2 * c->patch);
        if (rank >= first + n) return;
        if (rank < first || !out) continue;
        int32_t code = (int32_t)load32(r->t->patch_codes + 4 * c->patch);
        uint64_t i = rank - first;
        if (r->kind == ENDOR_CODES) {
            memcpy((uint8_t *)out + 4 * i, &code, 4);
            continue;
        }
        float value = (float)code * steps[i];
        uint16_t bits = r->kind == ENDOR_BF16 ? endor_to_bf16(value) : endor_to_half(value);
        if (r->kind == ENDOR_F32) memcpy((uint8_t *)out + 4 * i, &value, 4);
        else memcpy((uint8_t *)out + 2 * i, &bits, 2);
    }
}

int endor_int_piece(const endor_int_reader *r, endor_int_cursor *c, uint64_t rows, void *out) {
    ENDOR_ALIGNED uint8_t symbols[ENDOR_PIECE], low[ENDOR_PIECE], bits[ENDOR_PIECE + 8];
    ENDOR_ALIGNED float buffer[ENDOR_PIECE];
    const endor_int *t = r->t;
    uint64_t n = rows * ENDOR_LANES, flat = c->chunk * ENDOR_CHUNK + c->row * ENDOR_LANES;
    int enough = symbols_of(r, c, rows, symbols);
    if (out) {
        const float *steps = r->kind == ENDOR_CODES ? NULL : steps_of(r, flat, n, buffer);
        const float *levels = t->levels && r->kind != ENDOR_CODES ? r->levels : NULL;
        endor_values v = {symbols, t->shift ? low : NULL, steps, levels, t->base, t->shift, r->kind};
        if (t->shift) {
            memcpy(bits, t->low_bits + flat / 8 * (uint64_t)t->shift, n / 8 * (uint64_t)t->shift);
            r->in->low(bits, t->shift, n, low);
        }
        r->in->values(&v, n, out);
        patch(r, c, n, steps, out);
    } else {
        patch(r, c, n, NULL, NULL);
    }
    c->row += rows;
    if (!enough) return ENDOR_CORRUPT;
    if (c->row < endor_int_rows(t, c->chunk)) return ENDOR_OK;
    uint32_t wrong = c->word != load32(t->chunk_offsets + 4 * c->chunk + 4);
    for (int i = 0; i < ENDOR_LANES; i++) wrong |= c->states[i] ^ ENDOR_LOWEST;
    return wrong ? ENDOR_CORRUPT : ENDOR_OK;
}

typedef struct {
    endor_int_reader reader;
    uint8_t *out;
    uint64_t start, stop, end_chunk;
    int streaming;
    atomic_uint_fast64_t next;
    atomic_int status;
} int_job;

static int decode_chunk(int_job *job, uint64_t chunk) {
    ENDOR_ALIGNED uint8_t tmp[ENDOR_PIECE * 4];
    endor_int_cursor cursor;
    uint64_t itemsize = (uint64_t)endor_int_itemsize(job->reader.kind), all = endor_int_rows(job->reader.t, chunk);
    endor_int_seek(&job->reader, &cursor, chunk);
    while (cursor.row < all) {
        uint64_t rows = min64(ENDOR_PIECE_ROWS, all - cursor.row);
        uint64_t begin = chunk * ENDOR_CHUNK + cursor.row * ENDOR_LANES, end = begin + rows * ENDOR_LANES;
        uint64_t low = begin > job->start ? begin : job->start, high = min64(end, job->stop);
        if (begin >= job->stop) return ENDOR_OK;
        int wanted = high > low;
        uint8_t *dst = job->out + (low - job->start) * itemsize;
        int direct = wanted && low == begin && high == end && !job->streaming;
        int status = endor_int_piece(&job->reader, &cursor, rows, direct ? dst : wanted ? tmp : NULL);
        if (status != ENDOR_OK) return status;
        if (!wanted || direct) continue;
        const uint8_t *src = tmp + (low - begin) * itemsize;
        if (job->streaming) job->reader.ops->copy_streaming(dst, src, (high - low) * itemsize);
        else memcpy(dst, src, (high - low) * itemsize);
    }
    return ENDOR_OK;
}

static void decode_chunks(void *context) {
    int_job *job = context;
    while (atomic_load_explicit(&job->status, memory_order_relaxed) == ENDOR_OK) {
        uint64_t chunk = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (chunk >= job->end_chunk) break;
        int status = decode_chunk(job, chunk);
        if (status != ENDOR_OK) atomic_store(&job->status, status);
    }
    if (job->streaming) job->reader.ops->fence();
}

/* Elements [start, stop) to out, of the tensor's type, or int32 codes. Returns ENDOR_CORRUPT where a chunk's coders do
 * not end as they began. */
ENDOR_API int endor_int_decode(int kernel, const endor_int *tensor, void *out, uint64_t start, uint64_t stop,
                               int codes, int threads, int streaming) {
    if (stop > tensor->numel || start > stop) return ENDOR_UNSUPPORTED;
    if (start == stop) return ENDOR_OK;
    int_job job = {.out = out, .start = start, .stop = stop, .streaming = streaming};
    job.end_chunk = (stop + ENDOR_CHUNK - 1) / ENDOR_CHUNK;
    atomic_init(&job.next, start / ENDOR_CHUNK);
    atomic_init(&job.status, endor_int_open(&job.reader, kernel, tensor, codes ? ENDOR_CODES : tensor->value_kind));
    if (atomic_load(&job.status) == ENDOR_OK) endor_parallel(threads, 8 * (stop - start), decode_chunks, &job);
    endor_int_close(&job.reader);
    return atomic_load(&job.status);
}
