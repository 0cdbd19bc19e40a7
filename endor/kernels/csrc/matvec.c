/* out[b, r] = sum over c of W[r, c] * x[b, c], in float, W packed, straight from the packed arrays.
 *
 * Two ways, the same for any number of threads (a row's sum has one order):
 *   rows   a bitmap (AVX2: or none), cols a multiple of 64, an instruction set that has it: weights are placed in registers and
 *          multiplied there, several runs of rows in lockstep, which share the loads of x. A run finds its first stored
 *          element by its tile's offset and at most 15 popcounts, and carries its place on. Raw values, and bf16 in
 *          an exp stream where patches are rare, are taken from where they are; else, and near the end of the arrays,
 *          the stored elements of a span of weights are first brought into L1.
 *   tiles  everything else: a tile is decoded into L1, and each piece of it that lies in one row is multiplied.
 *          Threads own runs of rows; a tile that two threads share is decoded by both. Codec int: the same by
 *          pieces of 1024 weights, and by chunks.
 */
#include "int.h"

#include <stdatomic.h>
#include <stdlib.h>

typedef struct {
    const endor_ops *ops;
    const endor_tensor *tensor;
    const endor_int_reader *integer; /* codec int: instead of tensor */
    endor_stream stream;
    endor_operand x;
    endor_operand arranged; /* x for `exp_rows`; NULL where they do not apply */
    uint64_t first, rows, cols, chunk; /* rows [first, first + rows) */
    const uint32_t *chosen;            /* NULL, or `count` rows, rising: these alone */
    uint64_t count;                    /* of rows that are multiplied */
    int by_rows; /* not by tiles */
    float *out;  /* (batch, rows), moved back by `first`: row r of the weight is at out[r] */
    atomic_uint_fast64_t next;
    atomic_int status;
} product_job;

/* Patches are applied word by word where there is at most one in so many stored elements. */
#define RARE 256
#define AHEAD 4096 /* stored elements, and weights */

static float total_of(const float *lanes) {
    float sum[8];
    for (int i = 0; i < 8; i++) sum[i] = lanes[i] + lanes[i + 8];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

static int product_of_tiles(product_job *job, uint64_t row, uint64_t end_row) {
    ENDOR_ALIGNED uint8_t weights[ENDOR_TILE * 4 + ENDOR_SLACK];
    ENDOR_ALIGNED float acc[ENDOR_MAX_BATCH * 16] = {0};
    uint64_t flat = row * job->cols, end = end_row * job->cols, column = 0, itemsize = (uint64_t)job->tensor->itemsize;
    memset(weights + ENDOR_TILE * itemsize, 0, ENDOR_SLACK);
    const endor_tensor *t = job->tensor;
    endor_patches cursor = endor_patches_at(t, flat / ENDOR_TILE, endor_rank_of_tile(t, flat / ENDOR_TILE));
    while (flat < end) {
        uint64_t tile = flat / ENDOR_TILE, tile_end = min64((tile + 1) * ENDOR_TILE, end);
        int status = endor_decode_tile(job->ops, t, &job->stream, &cursor, tile, weights);
        if (status != ENDOR_OK) return status;
        while (flat < tile_end) {
            uint64_t len = min64(job->cols - column, tile_end - flat);
            job->ops->dot(weights + (flat % ENDOR_TILE) * itemsize, &job->x, column, len, acc);
            flat += len;
            column += len;
            if (column < job->cols) break;
            for (int b = 0; b < job->x.batch; b++) job->out[(uint64_t)b * job->rows + row] = total_of(acc + 16 * b);
            memset(acc, 0, sizeof acc);
            column = 0;
            row++;
        }
    }
    return ENDOR_OK;
}

static int product_of_pieces(product_job *job, uint64_t row, uint64_t end_row) {
    ENDOR_ALIGNED uint8_t weights[ENDOR_PIECE * 4 + ENDOR_SLACK];
    ENDOR_ALIGNED float acc[ENDOR_MAX_BATCH * 16] = {0};
    const endor_int_reader *r = job->integer;
    endor_int_cursor cursor;
    uint64_t flat = row * job->cols, end = end_row * job->cols, column = 0;
    uint64_t itemsize = (uint64_t)endor_int_itemsize(r->kind);
    memset(weights + ENDOR_PIECE * itemsize, 0, ENDOR_SLACK);
    endor_int_seek(r, &cursor, flat / ENDOR_CHUNK);
    while (flat < end) {
        if (cursor.row == ENDOR_ROWS) endor_int_seek(r, &cursor, cursor.chunk + 1);
        uint64_t rows = min64(ENDOR_PIECE_ROWS, endor_int_rows(r->t, cursor.chunk) - cursor.row);
        uint64_t begin = cursor.chunk * ENDOR_CHUNK + cursor.row * ENDOR_LANES, stop = begin + rows * ENDOR_LANES;
        int status = endor_int_piece(r, &cursor, rows, stop > flat ? weights : NULL);
        if (status != ENDOR_OK) return status;
        for (stop = min64(stop, end); flat < stop;) {
            uint64_t len = min64(job->cols - column, stop - flat);
            job->ops->dot(weights + (flat - begin) * itemsize, &job->x, column, len, acc);
            flat += len;
            column += len;
            if (column < job->cols) break;
            for (int b = 0; b < job->x.batch; b++) job->out[(uint64_t)b * job->rows + row] = total_of(acc + 16 * b);
            memset(acc, 0, sizeof acc);
            column = 0;
            row++;
        }
    }
    return ENDOR_OK;
}

#define SPAN (2 * ENDOR_TILE) /* weights that are decoded at a time: four runs of them, and x, fit L1 */
#define SPAN_BYTES (4 * (SPAN + 64) + ENDOR_SLACK)

/* A run of rows, and where its next stored elements are brought. */
typedef struct {
    uint64_t flat; /* the next weight */
    uint64_t rank; /* its stored element, or the next one */
    uint8_t *buffer;
} source;

static void start(const product_job *job, uint64_t row, endor_run *run, source *from) {
    const endor_tensor *t = job->tensor;
    uint64_t flat = row * job->cols, tile = flat / ENDOR_TILE, rank = t->bitmap ? endor_rank_of_tile(t, tile) : flat;
    for (uint64_t w = tile * ENDOR_WORDS; t->bitmap && w < flat / 64; w++) {
        rank += (uint64_t)__builtin_popcountll(load64(t->bitmap + 8 * w));
    }
    from->flat = flat;
    from->rank = run->rank = min64(rank, t->nnz);
    run->patches = endor_patches_at(t, tile, from->rank);
    run->bitmap = t->bitmap ? t->bitmap + flat / 8 : NULL;
    run->values = t->values ? t->values + from->rank * (uint64_t)t->itemsize : NULL;
    run->out = job->out + row;
}

/* Fetch what the run needs some spans later, if it goes on as it does now. A decoder of any elements fetches its own. */
static void look_ahead(const product_job *job, const source *from, uint64_t weights, uint64_t count) {
    const endor_stream *s = &job->stream;
    uint64_t rank = from->rank + AHEAD;
    if (job->tensor->bitmap) endor_prefetch(job->tensor->bitmap + (from->flat + AHEAD) / 8, weights / 8);
    if (job->ops->stream_from) return;
    for (int j = 0; j < s->bit_planes; j++) endor_prefetch(s->planes + (uint64_t)j * s->plane_stride + rank / 8, count / 8);
    for (int j = 0; j < s->byte_planes; j++) endor_prefetch(s->bytes + (uint64_t)j * s->byte_stride + rank, count);
}

/* Fetch what rows chosen[at] to chosen[end - 1] need: rows follow in no order that the hardware could see. */
static void fetch_chosen(const product_job *job, uint64_t at, uint64_t end) {
    for (; at < end; at++) {
        uint64_t flat = job->chosen[at] * job->cols;
        endor_fetch(job->tensor, &job->stream, flat, flat + job->cols);
    }
}

/* Bring the stored elements of the next `weights` weights into the buffer. */
static void fill(const product_job *job, source *from, endor_run *run, uint64_t weights) {
    const endor_tensor *t = job->tensor;
    uint64_t itemsize = (uint64_t)t->itemsize;
    run->bitmap = t->bitmap ? t->bitmap + from->flat / 8 : NULL;
    uint64_t count = t->bitmap ? job->ops->popcount(run->bitmap, weights / 64) : weights;
    uint64_t last = min64(from->rank + count, t->nnz);
    from->flat += weights;
    run->values = from->buffer;
    if (t->codec == ENDOR_EXP) {
        look_ahead(job, from, weights, count);
        run->values = endor_stream_run(job->ops, t, &job->stream, from->rank, last, from->buffer);
        if (t->patches) {
            endor_patch(t, &run->patches, tiles_of(from->flat), from->rank, last, (uint8_t *)run->values);
        }
    } else {
        memcpy(from->buffer, t->values + from->rank * itemsize, (last - from->rank) * itemsize);
    }
    from->rank = last;
}

/* The next `count` rows of each run, a span at a time. */
static void product_of_spans(const product_job *job, endor_run *runs, source *from, int n_runs, uint64_t count) {
    uint64_t most = job->tensor->bitmap ? SPAN : SPAN / 2, rows = most / job->cols;
    endor_span span = {.out_stride = job->rows};
    for (uint64_t row = 0; row < count; row += span.rows) {
        span.rows = rows ? min64(rows, count - row) : 1;
        for (span.column = 0; span.column < job->cols; span.column += span.columns) {
            span.columns = min64(job->cols - span.column, most);
            span.begins = span.column == 0;
            span.finishes = span.column + span.columns == job->cols;
            for (int r = 0; r < n_runs; r++) fill(job, from + r, runs + r, span.rows * span.columns);
            job->ops->rows(runs, n_runs, &span, &job->x);
        }
    }
}

/* Those of the next `count` rows of each run that can be read where they are. Returns how many. */
static uint64_t product_in_place(const product_job *job, endor_run *runs, source *from, int n_runs, uint64_t count) {
    const endor_tensor *t = job->tensor;
    endor_span span = {count, 0, job->cols, 1, 1, NULL, job->rows};
    uint64_t done = 0;
    if (job->arranged.x) {
        done = job->ops->exp_rows(runs, n_runs, &span, &job->arranged, t, &job->stream);
    } else if (t->codec != ENDOR_EXP) {
        span.end = t->values + t->nnz * (uint64_t)t->itemsize;
        done = job->ops->rows(runs, n_runs, &span, &job->x);
        for (int i = 0; i < n_runs; i++) runs[i].rank = (uint64_t)(runs[i].values - t->values) / (uint64_t)t->itemsize;
    }
    for (int i = 0; i < n_runs; i++) {
        from[i].flat += done * job->cols;
        from[i].rank = runs[i].rank;
    }
    return done;
}

/* `each` rows from firsts[i] on, for n_runs of these. Whether a row is read in place rests on where it is alone. */
static void product_of_runs(const product_job *job, const uint64_t *firsts, int n_runs, uint64_t each) {
    ENDOR_ALIGNED uint8_t buffers[ENDOR_MAX_RUNS][SPAN_BYTES];
    ENDOR_ALIGNED float sums[ENDOR_MAX_RUNS][ENDOR_SUMS];
    endor_run runs[ENDOR_MAX_RUNS];
    source from[ENDOR_MAX_RUNS];
    for (int i = 0; i < n_runs; i++) {
        runs[i].sums = sums[i];
        from[i].buffer = buffers[i];
        start(job, firsts[i], runs + i, from + i);
    }
    uint64_t done = product_in_place(job, runs, from, n_runs, each);
    for (int i = 0; i < n_runs && done < each && (job->arranged.x || job->tensor->codec != ENDOR_EXP); i++) {
        uint64_t more = product_in_place(job, runs + i, from + i, 1, each - done);
        product_of_spans(job, runs + i, from + i, 1, each - done - more);
        if (i == n_runs - 1) return;
    }
    product_of_spans(job, runs, from, n_runs, each - done);
}

static int runs_of(const product_job *job) {
    endor_way way = job->arranged.x ? ENDOR_EXP_IN_PLACE : ENDOR_IN_PLACE;
    if (!job->arranged.x && job->tensor->codec == ENDOR_EXP) way = ENDOR_BUFFERED;
    return job->ops->row_runs(&job->x, way);
}

/* Several runs of rows in lockstep share the loads of x, which streaming the values drives out of L1. */
static void product_of_rows(const product_job *job, uint64_t row, uint64_t end_row) {
    int n_runs = runs_of(job);
    uint64_t each = (end_row - row) / (uint64_t)n_runs, firsts[ENDOR_MAX_RUNS];
    for (int i = 0; i < n_runs; i++, row += each) firsts[i] = row;
    if (each) product_of_runs(job, firsts, n_runs, each);
    if (row < end_row) product_of_runs(job, &row, 1, end_row - row);
}

/* Rows chosen[at] to chosen[end - 1], which lie anywhere: as many in lockstep, one row a run. The same sums, since the sum
 * of a row does not depend on those beside it. */
static int product_of_chosen(product_job *job, uint64_t at, uint64_t end) {
    int n_runs = job->by_rows ? runs_of(job) : 1;
    for (uint64_t rows[ENDOR_MAX_RUNS]; at < end; at += (uint64_t)n_runs) {
        if (end - at < (uint64_t)n_runs) n_runs = 1;
        for (int i = 0; i < n_runs; i++) rows[i] = job->chosen[at + (uint64_t)i];
        fetch_chosen(job, at + (uint64_t)n_runs, min64(at + 2 * (uint64_t)n_runs, end));
        if (job->by_rows) {
            product_of_runs(job, rows, n_runs, 1);
            continue;
        }
        int status = product_of_tiles(job, rows[0], rows[0] + 1);
        if (status != ENDOR_OK) return status;
    }
    return ENDOR_OK;
}

static void product_chunks(void *context) {
    product_job *job = context;
    for (;;) {
        uint64_t row = atomic_fetch_add_explicit(&job->next, job->chunk, memory_order_relaxed);
        if (row >= job->count || atomic_load_explicit(&job->status, memory_order_relaxed)) return;
        uint64_t end = job->first + min64(row + job->chunk, job->count);
        row += job->first;
        int status = ENDOR_OK;
        if (job->chosen) status = product_of_chosen(job, row, end);
        else if (job->integer) status = product_of_pieces(job, row, end);
        else if (job->by_rows) product_of_rows(job, row, end);
        else status = product_of_tiles(job, row, end);
        if (status != ENDOR_OK) atomic_store(&job->status, status);
    }
}

/* All rows, with the weight that the job names. */
static int multiply(product_job *job, int reorder, int in_place, const void *x, int x_kind, uint64_t batch,
                    float *out, int threads) {
    job->x.stride = (job->cols + 31) / 32 * 32;
    uint8_t *operand = endor_operand_of(job->ops, &job->x, job->cols, x, x_kind, batch, reorder);
    uint8_t *arranged = in_place ? endor_operand_of(job->ops, &job->x, job->cols, x, x_kind, batch, 1) : NULL;
    if (!operand || (in_place && !arranged)) {
        free(operand);
        free(arranged);
        return ENDOR_NO_MEMORY;
    }
    /* a share of codec int begins by passing over what lies before it in a chunk: few shares */
    uint64_t shares = (job->integer ? 1 : 8) * (uint64_t)(threads > 0 ? threads : 1);
    if (!job->chosen) job->count = job->rows;
    job->chunk = job->integer ? (job->count + shares - 1) / shares : job->count / shares;
    if (job->chunk < 1) job->chunk = 1;
    atomic_init(&job->status, ENDOR_OK);
    for (uint64_t b = 0; b < batch && atomic_load(&job->status) == ENDOR_OK; b += ENDOR_MAX_BATCH) {
        job->x.batch = (int)min64(ENDOR_MAX_BATCH, batch - b);
        uint64_t offset = b * job->x.stride * (job->x.bf16_pairs ? 2 : 4);
        job->x.x = operand + offset;
        job->arranged = job->x;
        job->arranged.x = in_place ? arranged + offset : NULL;
        job->out = (float *)((uintptr_t)(out + b * job->rows) - job->first * sizeof *out);
        atomic_init(&job->next, 0);
        endor_parallel(threads, 2 * job->count * job->cols, product_chunks, job);
    }
    free(operand);
    free(arranged);
    return atomic_load(&job->status);
}

static int outside(uint64_t numel, uint64_t first, uint64_t rows, uint64_t cols) {
    return cols && (first > numel / cols || rows > numel / cols - first);
}

/* The rows that the job names, of a tensor that is not of codec int. */
static int multiply_tensor(product_job *job, int weight_kind, const void *x, int x_kind, uint64_t batch, float *out,
                           int threads) {
    const endor_tensor *tensor = job->tensor;
    if (!job->rows || !batch) return ENDOR_OK;
    if (!job->cols) {
        memset(out, 0, job->rows * batch * sizeof *out);
        return ENDOR_OK;
    }
    if (tensor->codec == ENDOR_EXP) endor_stream_of(tensor, &job->stream);
    job->x.weight = weight_kind;
    job->x.bf16_pairs = job->ops->bf16_pairs && weight_kind == ENDOR_X_BF16 && x_kind == ENDOR_X_BF16;
    int whole = job->cols % 64 == 0;
    int in_place = job->ops->exp_rows && tensor->codec == ENDOR_EXP && weight_kind == ENDOR_X_BF16 && tensor->bitmap &&
                   whole && tensor->patches <= tensor->nnz / RARE && tensor->nnz / 13 <= tensor->numel / 16;
    job->by_rows = job->ops->rows && (tensor->bitmap || job->ops->rows_without_bitmap) && whole;
    int reorder = job->by_rows && !tensor->bitmap && weight_kind == ENDOR_X_BF16;
    return multiply(job, reorder, in_place, x, x_kind, batch, out, threads);
}

/* Rows [first, first + rows) alone: x: (batch, cols), contiguous, of kind x_kind; out: float (batch, rows).
 * weight_kind says how W's bits are read. */
ENDOR_API int endor_matvec_rows(int kernel, const endor_tensor *tensor, int weight_kind, uint64_t first, uint64_t rows,
                                uint64_t cols, const void *x, int x_kind, uint64_t batch, float *out, int threads) {
    product_job job = {.ops = endor_ops_of(kernel), .tensor = tensor, .first = first, .rows = rows, .cols = cols};
    if (!job.ops || outside(tensor->numel, first, rows, cols)) return ENDOR_UNSUPPORTED;
    return multiply_tensor(&job, weight_kind, x, x_kind, batch, out, threads);
}

/* `count` rows alone, in rising order; out: float (batch, rows), of which nothing else is written. */
ENDOR_API int endor_matvec_chosen(int kernel, const endor_tensor *tensor, int weight_kind, uint64_t rows, uint64_t cols,
                                  const uint32_t *chosen, uint64_t count, const void *x, int x_kind, uint64_t batch,
                                  float *out, int threads) {
    product_job job = {.ops = endor_ops_of(kernel), .tensor = tensor, .rows = rows, .cols = cols, .chosen = chosen,
                       .count = count};
    if (!job.ops || outside(tensor->numel, 0, rows, cols)) return ENDOR_UNSUPPORTED;
    if (count && chosen[count - 1] >= rows) return ENDOR_UNSUPPORTED;
    if (!count || !cols) return ENDOR_OK;
    return multiply_tensor(&job, weight_kind, x, x_kind, batch, out, threads);
}

/* All rows. */
ENDOR_API int endor_matvec(int kernel, const endor_tensor *tensor, int weight_kind, uint64_t rows, uint64_t cols,
                           const void *x, int x_kind, uint64_t batch, float *out, int threads) {
    return endor_matvec_rows(kernel, tensor, weight_kind, 0, rows, cols, x, x_kind, batch, out, threads);
}

/* The same for codec int. */
ENDOR_API int endor_int_matvec_rows(int kernel, const endor_int *tensor, uint64_t first, uint64_t rows, uint64_t cols,
                                    const void *x, int x_kind, uint64_t batch, float *out, int threads) {
    endor_int_reader reader;
    product_job job = {.ops = endor_ops_of(kernel), .integer = &reader, .first = first, .rows = rows, .cols = cols};
    if (!job.ops || outside(tensor->numel, first, rows, cols)) return ENDOR_UNSUPPORTED;
    if (!rows || !batch) return ENDOR_OK;
    if (!cols) {
        memset(out, 0, rows * batch * sizeof *out);
        return ENDOR_OK;
    }
    job.x.weight = tensor->value_kind; /* ENDOR_BF16 is ENDOR_X_BF16, and so on */
    job.x.bf16_pairs = job.ops->bf16_pairs && tensor->value_kind == ENDOR_BF16 && x_kind == ENDOR_X_BF16;
    int status = endor_int_open(&reader, kernel, tensor, tensor->value_kind);
    if (status == ENDOR_OK) status = multiply(&job, 0, 0, x, x_kind, batch, out, threads);
    endor_int_close(&reader);
    return status;
}

ENDOR_API int endor_int_matvec(int kernel, const endor_int *tensor, uint64_t rows, uint64_t cols, const void *x,
                               int x_kind, uint64_t batch, float *out, int threads) {
    return endor_int_matvec_rows(kernel, tensor, 0, rows, cols, x, x_kind, batch, out, threads);
}
