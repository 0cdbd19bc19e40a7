/* out[b, r] = sum over c of W[r, c] * x[b, c], in float, W packed, straight from the packed arrays.
 *
 * Two ways, the same for any number of threads (a row's sum has one order):
 *   rows   raw, cols a multiple of 64, an instruction set that has it: weights are placed in registers and multiplied
 *          there; each row finds its first value by its tile's offset and at most 15 popcounts.
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

/* Address of the first value of each of `rows` rows; NULL where a register-wide load could leave the array. */
static int find_rows(const endor_tensor *t, uint64_t row, int rows, uint64_t cols, const void **values) {
    for (int r = 0; r < rows; r++) {
        uint64_t flat = (row + (uint64_t)r) * cols, tile = flat / ENDOR_TILE;
        uint64_t rank = load32(t->tile_offsets + 4 * tile);
        for (uint64_t w = tile * ENDOR_WORDS; w < flat / 64; w++) {
            rank += (uint64_t)__builtin_popcountll(load64(t->bitmap + 8 * w));
        }
        if (rank > t->nnz || (t->nnz - rank) < cols + ENDOR_SLACK) return 0;
        values[r] = t->values + rank * (uint64_t)t->itemsize;
    }
    return 1;
}

static int product_of_rows(product_job *job, uint64_t row, uint64_t end_row) {
    const endor_tensor *t = job->tensor;
    while (row < end_row) {
        const void *values[4];
        int rows = (int)min64(4, end_row - row);
        if (!find_rows(t, row, rows, job->cols, values)) return product_of_tiles(job, row, end_row);
        const uint8_t *bitmap = t->bitmap + row * (job->cols / 8);
        rows = job->ops->rows(bitmap, values, rows, job->cols, &job->x, job->out + row, job->rows);
        row += (uint64_t)rows;
    }
    return ENDOR_OK;
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

static void to_float(const void *x, int kind, uint64_t count, float *out) {
    if (kind == ENDOR_X_F32) {
        memcpy(out, x, count * 4);
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint32_t bits = load16((const uint8_t *)x + 2 * i);
        if (kind == ENDOR_X_F16) {
            out[i] = endor_half(bits);
        } else {
            bits <<= 16;
            memcpy(out + i, &bits, 4);
        }
    }
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
    float *floats = NULL;
    if (!job.x.bf16_pairs) {
        floats = malloc(batch * cols * sizeof *floats);
        if (!floats) return ENDOR_NO_MEMORY;
        to_float(x, x_kind, batch * cols, floats);
    }
    job.x.stride = cols;
    uint64_t share = rows / (8 * (uint64_t)(threads > 0 ? threads : 1)), small = 32 * ENDOR_TILE / cols + 1;
    job.chunk = share > small ? small : share < 1 ? 1 : share;
    if (tensor->numel < 32 * ENDOR_TILE) threads = 1;
    atomic_init(&job.status, ENDOR_OK);
    for (uint64_t b = 0; b < batch && atomic_load(&job.status) == ENDOR_OK; b += ENDOR_MAX_BATCH) {
        job.x.batch = (int)min64(ENDOR_MAX_BATCH, batch - b);
        job.x.x = floats ? (const void *)(floats + b * cols) : (const uint8_t *)x + 2 * b * cols;
        job.out = out + b * rows;
        atomic_init(&job.next, 0);
        endor_parallel(threads, product_chunks, &job);
    }
    free(floats);
    return atomic_load(&job.status);
}
