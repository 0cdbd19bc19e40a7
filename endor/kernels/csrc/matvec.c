/* out[b, r] = sum over c of W[r, c] * x[b, c], in float, W packed, straight from the packed arrays.
 *
 * Two ways, the same for any number of threads (a row's sum has one order):
 *   rows   raw, cols a multiple of 64, an instruction set that has it: weights are placed in registers and multiplied
 *          there. A run of rows finds its first value by its tile's offset and at most 15 popcounts, and carries the
 *          pointer from row to row.
 *   tiles  everything else: a tile is decoded into L1, and each piece of it that lies in one row is multiplied.
 *          Threads own runs of rows; a tile that two threads share is decoded by both.
 */
#include "endor.h"

#include <stdatomic.h>
#include <stdlib.h>

typedef struct {
    const endor_ops *ops;
    const endor_tensor *tensor;
    endor_stream stream;
    endor_operand x;
    uint64_t rows, cols, chunk;
    float *out; /* (batch, rows) */
    atomic_uint_fast64_t next;
    atomic_int status;
} product_job;

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
    while (flat < end) {
        uint64_t tile = flat / ENDOR_TILE, tile_end = min64((tile + 1) * ENDOR_TILE, end);
        int status = endor_decode_tile(job->ops, job->tensor, &job->stream, tile, weights, 0);
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

static endor_run run_at(const product_job *job, uint64_t row) {
    const endor_tensor *t = job->tensor;
    uint64_t flat = row * job->cols, tile = flat / ENDOR_TILE, rank = load32(t->tile_offsets + 4 * tile);
    for (uint64_t w = tile * ENDOR_WORDS; w < flat / 64; w++) {
        rank += (uint64_t)__builtin_popcountll(load64(t->bitmap + 8 * w));
    }
    endor_run run = {t->bitmap + flat / 8, t->values + min64(rank, t->nnz) * (uint64_t)t->itemsize, job->out + row};
    return run;
}

/* Rows from `row` on, which `run` has reached. */
static int product_of_run(product_job *job, endor_run *run, uint64_t row, uint64_t end_row) {
    const uint8_t *end = job->tensor->values + job->tensor->nnz * (uint64_t)job->tensor->itemsize;
    row += job->ops->rows(run, 1, end_row - row, job->cols, end, &job->x, job->rows);
    return row < end_row ? product_of_tiles(job, row, end_row) : ENDOR_OK;
}

/* Several runs of rows in lockstep share the loads of x, which streaming the values drives out of L1. */
static int product_of_rows(product_job *job, uint64_t row, uint64_t end_row) {
    const uint8_t *end = job->tensor->values + job->tensor->nnz * (uint64_t)job->tensor->itemsize;
    int n_runs = job->ops->row_runs(&job->x), status = ENDOR_OK;
    uint64_t each = (end_row - row) / (uint64_t)n_runs;
    endor_run runs[ENDOR_MAX_RUNS + 1];
    for (int i = 0; i < n_runs; i++) runs[i] = run_at(job, row + (uint64_t)i * each);
    uint64_t done = each ? job->ops->rows(runs, n_runs, each, job->cols, end, &job->x, job->rows) : 0;
    for (int i = 0; i < n_runs && status == ENDOR_OK; i++) {
        if (done < each) status = product_of_run(job, &runs[i], row + (uint64_t)i * each + done, row + (uint64_t)(i + 1) * each);
    }
    row += (uint64_t)n_runs * each;
    if (row == end_row || status != ENDOR_OK) return status;
    runs[n_runs] = run_at(job, row);
    return product_of_run(job, &runs[n_runs], row, end_row);
}

static void product_chunks(void *context) {
    product_job *job = context;
    int direct = job->ops->rows && job->tensor->codec == ENDOR_RAW && job->cols % 64 == 0;
    for (;;) {
        uint64_t row = atomic_fetch_add_explicit(&job->next, job->chunk, memory_order_relaxed);
        if (row >= job->rows || atomic_load_explicit(&job->status, memory_order_relaxed)) return;
        uint64_t end = min64(row + job->chunk, job->rows);
        int status = direct ? product_of_rows(job, row, end) : product_of_tiles(job, row, end);
        if (status != ENDOR_OK) atomic_store(&job->status, status);
    }
}

static void to_float(const uint8_t *x, int kind, uint64_t count, float *out) {
    if (kind == ENDOR_X_F32) {
        memcpy(out, x, count * 4);
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint32_t bits = load16(x + 2 * i);
        if (kind == ENDOR_X_F16) {
            out[i] = endor_half(bits);
        } else {
            bits <<= 16;
            memcpy(out + i, &bits, 4);
        }
    }
}

/* x in the form the kernel multiplies, each row on a cache line: its loads never straddle two. */
static void *align_operand(product_job *job, const uint8_t *x, int x_kind, uint64_t batch) {
    uint64_t size = job->x.bf16_pairs ? 2 : 4, in_size = x_kind == ENDOR_X_F32 ? 4 : 2;
    job->x.stride = (job->cols + 31) / 32 * 32;
    uint8_t *rows = aligned_alloc(64, batch * job->x.stride * size);
    for (uint64_t b = 0; rows && b < batch; b++) {
        uint8_t *row = rows + b * job->x.stride * size;
        const uint8_t *in = x + b * job->cols * in_size;
        if (job->x.bf16_pairs) memcpy(row, in, job->cols * size);
        else to_float(in, x_kind, job->cols, (float *)row);
    }
    return rows;
}

/* x: (batch, cols), contiguous, of kind x_kind; out: float (batch, rows). weight_kind says how W's bits are read. */
ENDOR_API int endor_matvec(int kernel, const endor_tensor *tensor, int weight_kind, uint64_t rows, uint64_t cols,
                           const void *x, int x_kind, uint64_t batch, float *out, int threads) {
    product_job job = {.ops = endor_ops_of(kernel), .tensor = tensor, .rows = rows, .cols = cols};
    if (!job.ops || (cols && rows > tensor->numel / cols)) return ENDOR_UNSUPPORTED;
    if (!rows || !batch) return ENDOR_OK;
    if (!cols) {
        memset(out, 0, rows * batch * sizeof *out);
        return ENDOR_OK;
    }
    if (tensor->codec == ENDOR_EXP) endor_stream_of(tensor, &job.stream);
    job.x.weight = weight_kind;
    job.x.bf16_pairs = job.ops->bf16_pairs && weight_kind == ENDOR_X_BF16 && x_kind == ENDOR_X_BF16;
    uint8_t *operand = align_operand(&job, x, x_kind, batch);
    if (!operand) return ENDOR_NO_MEMORY;
    uint64_t share = rows / (8 * (uint64_t)(threads > 0 ? threads : 1));
    job.chunk = share < 1 ? 1 : share;
    if (tensor->numel < 32 * ENDOR_TILE) threads = 1;
    atomic_init(&job.status, ENDOR_OK);
    for (uint64_t b = 0; b < batch && atomic_load(&job.status) == ENDOR_OK; b += ENDOR_MAX_BATCH) {
        job.x.batch = (int)min64(ENDOR_MAX_BATCH, batch - b);
        job.x.x = operand + b * job.x.stride * (job.x.bf16_pairs ? 2 : 4);
        job.out = out + b * rows;
        atomic_init(&job.next, 0);
        endor_parallel(threads, product_chunks, &job);
    }
    free(operand);
    return atomic_load(&job.status);
}
