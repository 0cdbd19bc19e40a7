/* out[b, c] = sum over active i of h[b, i] * T[i, c], in float, T packed (raw, exp): the product with a weight that is
 * stored transposed, a row of T being what one neuron adds. Rows that are not active are not read.
 *
 *   T     row 0 | row 1 | row 2 | ...      active: 1, 4, 6, ...      threads own columns, so each sum has one order,
 *               ^^^^^^^^^                                            that of the rows, whatever the number of threads
 *
 * A tile that holds a piece of an active row is decoded into L1; the pieces in it are added to out, which stays in L1 or
 * L2. Reads per active row: the bitmap and the stored elements of its tiles. */
#include "bundles.h"

#include <stdatomic.h>

typedef struct {
    const endor_ops *ops;
    endor_axpy axpy;
    const endor_tensor *tensor;   /* the matrix, */
    const endor_bundles *bundles; /* or its bundles */
    endor_stream stream;
    int kind; /* of the elements, ENDOR_X_* */
    uint64_t cols, share;
    const uint32_t *active;
    uint64_t n_active;
    const float *h; /* (batch, n_active) */
    uint64_t batch;
    float *out; /* (batch, cols) */
    atomic_uint_fast64_t next;
    atomic_int status;
} neuron_job;

/* Where a row lies. */
typedef struct {
    const endor_tensor *tensor; /* what it is a row of: the matrix, or `bundle` */
    endor_tensor bundle;
    endor_stream stream;
    uint64_t first; /* its first element in there */
} row_place;

static int find_row(const neuron_job *job, uint64_t a, row_place *place) {
    const uint64_t row = job->active[a];
    if (!job->bundles) {
        place->tensor = job->tensor;
        place->first = row * job->cols;
        return ENDOR_OK;
    }
    const uint64_t together = job->bundles->bundle_rows;
    int status = endor_bundle_at(job->bundles, row / together, &place->bundle);
    place->tensor = &place->bundle;
    place->first = row % together * job->cols;
    place->stream.bytes = place->bundle.bytes;
    place->stream.planes = place->bundle.planes;
    place->stream.byte_stride = place->bundle.nnz;
    place->stream.plane_stride = (place->bundle.nnz + 63) / 64 * 8;
    return status;
}

/* The head of the bundle that a row is in: what lies behind it cannot be found without it. */
static void fetch_head(const neuron_job *job, uint64_t a) {
    if (!job->bundles || a >= job->n_active) return;
    uint64_t at = load32(job->bundles->offsets + 4 * (job->active[a] / job->bundles->bundle_rows));
    if (at < job->bundles->units) __builtin_prefetch(job->bundles->data + at * BUNDLE_UNIT, 0, 2);
}

/* Columns [begin, end) of all sums. */
static int add_columns(neuron_job *job, uint64_t begin, uint64_t end) {
    ENDOR_ALIGNED uint8_t weights[ENDOR_TILE * 4 + ENDOR_SLACK];
    row_place places[2] = {{.stream = job->stream}, {.stream = job->stream}};
    uint64_t size = job->kind == ENDOR_X_F32 ? 4 : 2;
    memset(weights + ENDOR_TILE * size, 0, ENDOR_SLACK);
    for (uint64_t b = 0; b < job->batch; b++) memset(job->out + b * job->cols + begin, 0, (end - begin) * sizeof(float));
    int status = job->n_active ? find_row(job, 0, &places[0]) : ENDOR_OK;
    for (uint64_t a = 0; a < job->n_active && status == ENDOR_OK; a++) {
        const row_place *place = &places[a & 1];
        fetch_head(job, a + 3);
        if (a + 1 < job->n_active) {
            status = find_row(job, a + 1, &places[(a + 1) & 1]);
            if (status == ENDOR_OK) { /* rows follow in no order that the hardware could see */
                const row_place *next = &places[(a + 1) & 1];
                endor_fetch(next->tensor, &next->stream, next->first + begin, next->first + end);
            }
        }
        const endor_tensor *t = place->tensor;
        uint64_t flat = place->first + begin, stop = place->first + end;
        while (flat < stop && status == ENDOR_OK) {
            uint64_t tile = flat / ENDOR_TILE, len = min64((tile + 1) * ENDOR_TILE, stop) - flat;
            endor_patches cursor = endor_patches_at(t, tile, endor_rank_of_tile(t, tile));
            status = endor_decode_tile(job->ops, t, &place->stream, &cursor, tile, weights);
            if (status != ENDOR_OK) return status;
            for (uint64_t b = 0; b < job->batch; b++) {
                float h = job->h[b * job->n_active + a];
                if (h == 0) continue;
                job->axpy(weights + flat % ENDOR_TILE * size, job->kind, len, h,
                          job->out + b * job->cols + (flat - place->first));
            }
            flat += len;
        }
    }
    return status;
}

static void add_shares(void *context) {
    neuron_job *job = context;
    for (;;) {
        uint64_t begin = atomic_fetch_add_explicit(&job->next, job->share, memory_order_relaxed);
        if (begin >= job->cols || atomic_load_explicit(&job->status, memory_order_relaxed)) return;
        int status = add_columns(job, begin, min64(begin + job->share, job->cols));
        if (status != ENDOR_OK) atomic_store(&job->status, status);
    }
}

static int multiply(neuron_job *job, int threads) {
    if (!job->cols || !job->batch) return ENDOR_OK;
    /* whole tiles where rows are some: a tile that two shares hold is decoded twice */
    uint64_t each = (job->cols + (uint64_t)(threads > 0 ? threads : 1) - 1) / (uint64_t)(threads > 0 ? threads : 1);
    uint64_t unit = job->cols % ENDOR_TILE ? 64 : ENDOR_TILE;
    job->share = (each + unit - 1) / unit * unit;
    atomic_init(&job->next, 0);
    atomic_init(&job->status, ENDOR_OK);
    endor_parallel(threads, 2 * job->n_active * job->cols, add_shares, job);
    return atomic_load(&job->status);
}

/* h: float (batch, n_active), the inputs of the active rows, which are in rising order; out: float (batch, cols). */
ENDOR_API int endor_neurons(int kernel, const endor_tensor *tensor, int kind, uint64_t rows, uint64_t cols,
                            const uint32_t *active, uint64_t n_active, const float *h, uint64_t batch, float *out,
                            int threads) {
    neuron_job job = {.ops = endor_ops_of(kernel), .axpy = endor_axpy_of(kernel), .tensor = tensor, .kind = kind,
                      .cols = cols, .active = active, .n_active = n_active, .h = h, .batch = batch, .out = out};
    if (!job.ops || (cols && rows > tensor->numel / cols)) return ENDOR_UNSUPPORTED;
    if (n_active && active[n_active - 1] >= rows) return ENDOR_UNSUPPORTED;
    if (tensor->codec == ENDOR_EXP) endor_stream_of(tensor, &job.stream);
    return multiply(&job, threads);
}

/* The same, of a matrix in bundles. */
ENDOR_API int endor_bundles_neurons(int kernel, const endor_bundles *bundles, int kind, const uint32_t *active,
                                    uint64_t n_active, const float *h, uint64_t batch, float *out, int threads) {
    neuron_job job = {.ops = endor_ops_of(kernel), .axpy = endor_axpy_of(kernel), .bundles = bundles, .kind = kind,
                      .cols = bundles->cols, .active = active, .n_active = n_active, .h = h, .batch = batch, .out = out};
    if (!job.ops || (n_active && active[n_active - 1] >= bundles->rows)) return ENDOR_UNSUPPORTED;
    if (bundles->form.codec == ENDOR_EXP) endor_stream_of(&bundles->form, &job.stream);
    return multiply(&job, threads);
}

typedef struct {
    const uint8_t *in;
    uint8_t *out;
    uint64_t rows, cols, first, last;
    int size;
    atomic_uint_fast64_t next;
} turn_job;

#define SIDE 32 /* elements: a square of them, read and written, fits L1 */

#define TURN(TYPE)                                                                                                 \
    for (uint64_t r0 = 0; r0 < job->rows; r0 += SIDE) {                                                            \
        uint64_t r1 = min64(r0 + SIDE, job->rows);                                                                 \
        for (uint64_t c = c0; c < c1; c++) {                                                                       \
            TYPE *to = (TYPE *)job->out + (c - job->first) * job->rows;                                            \
            for (uint64_t r = r0; r < r1; r++) to[r] = ((const TYPE *)job->in)[r * job->cols + c];                 \
        }                                                                                                          \
    }

static void turn_squares(void *context) {
    turn_job *job = context;
    for (;;) {
        uint64_t c0 = job->first + atomic_fetch_add_explicit(&job->next, SIDE, memory_order_relaxed);
        if (c0 >= job->last) return;
        uint64_t c1 = min64(c0 + SIDE, job->last);
        if (job->size == 1) { TURN(uint8_t) }
        else if (job->size == 2) { TURN(uint16_t) }
        else { TURN(uint32_t) }
    }
}

/* Columns [first, last) of in (rows, cols) as rows of out (last - first, rows); both aligned to their elements. */
ENDOR_API void endor_turn(const void *in, void *out, uint64_t rows, uint64_t cols, uint64_t first, uint64_t last, int size,
                          int threads) {
    turn_job job = {.in = in, .out = out, .rows = rows, .cols = cols, .first = first, .last = last, .size = size};
    atomic_init(&job.next, 0);
    endor_parallel(threads, 2 * rows * (last - first) * (uint64_t)size, turn_squares, &job);
}
