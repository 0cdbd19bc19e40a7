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

/* A row whose weights are added, and what of it comes next. */
typedef struct {
    row_place place;
    endor_patches patches;
    ENDOR_ALIGNED uint8_t buffer[ENDOR_BUFFER * 4];
} row_walk;

/* Bring columns [at, at + len), which one tile holds where there is a bitmap, into the buffer; say where they are. */
static int bring(const neuron_job *job, row_walk *row, uint64_t at, uint64_t len, const uint8_t **weights) {
    const endor_tensor *t = row->place.tensor;
    const uint64_t flat = row->place.first + at, tile = flat / ENDOR_TILE;
    if (t->bitmap || t->codec != ENDOR_EXP) {
        *weights = row->buffer + flat % ENDOR_TILE * (uint64_t)t->itemsize;
        return endor_decode_tile(job->ops, t, &row->place.stream, &row->patches, tile, row->buffer);
    }
    uint8_t *values = endor_stream_run(job->ops, t, &row->place.stream, flat, flat + len, row->buffer);
    if (t->patches) endor_patch(t, &row->patches, tiles_of(flat + len), flat, flat + len, values);
    *weights = values;
    return ENDOR_OK;
}

/* Add columns [begin, end) of `n` rows, job->active[a] and those behind it, to all sums, and fetch those of the next:
 * rows follow in no order that the hardware could see. */
static int add_rows(const neuron_job *job, uint64_t a, row_walk *rows, int n, const row_walk *next, int n_next,
                    uint64_t begin, uint64_t end) {
    for (int i = 0; i < n; i++) {
        const row_place *place = &rows[i].place;
        const uint64_t tile = (place->first + begin) / ENDOR_TILE;
        const uint64_t rank = place->tensor->bitmap ? endor_rank_of_tile(place->tensor, tile) : place->first + begin;
        rows[i].patches = endor_patches_at(place->tensor, tile, rank);
    }
    for (uint64_t at = begin, len; at < end; at += len) {
        const uint8_t *weights[ENDOR_AXPY_ROWS];
        len = min64(ENDOR_TILE, end - at);
        if (rows[0].place.tensor->bitmap) len = min64(len, ENDOR_TILE - (rows[0].place.first + at) % ENDOR_TILE);
        for (int i = 0; i < n; i++) {
            const row_place *coming = &next[i].place;
            if (i < n_next) endor_fetch(coming->tensor, &coming->stream, coming->first + at, coming->first + at + len);
            int status = bring(job, &rows[i], at, len, &weights[i]);
            if (status != ENDOR_OK) return status;
        }
        for (uint64_t b = 0; b < job->batch; b++) {
            const uint8_t *used[ENDOR_AXPY_ROWS];
            float h[ENDOR_AXPY_ROWS];
            int count = 0;
            for (int i = 0; i < n; i++) { /* 0 times infinity is no 0 */
                used[count] = weights[i];
                h[count] = job->h[b * job->n_active + a + (uint64_t)i];
                count += h[count] != 0;
            }
            if (count) job->axpy(used, job->kind, len, h, count, job->out + b * job->cols + at);
        }
    }
    return ENDOR_OK;
}

/* How many rows have their tiles in the same columns, so that pieces of them can be added together. */
static int rows_together(const neuron_job *job, uint64_t begin) {
    int bitmap = job->bundles ? job->bundles->bitmap : job->tensor->bitmap != NULL;
    int alike = job->cols % ENDOR_TILE == 0 || (job->bundles && job->bundles->bundle_rows == 1);
    return !bitmap || (alike && begin % ENDOR_TILE == 0) ? ENDOR_AXPY_ROWS : 1;
}

/* Find `together` rows from job->active[a] on; `n`: how many they are. */
static int find_rows(const neuron_job *job, uint64_t a, row_walk *rows, int together, int *n) {
    *n = (int)min64((uint64_t)together, job->n_active - a);
    for (int i = 0; i < *n; i++) {
        int status = find_row(job, a + (uint64_t)i, &rows[i].place);
        if (status != ENDOR_OK) return status;
        fetch_head(job, a + (uint64_t)(i + together));
    }
    return ENDOR_OK;
}

/* Columns [begin, end) of all sums. */
static int add_columns(neuron_job *job, uint64_t begin, uint64_t end) {
    row_walk sets[2][ENDOR_AXPY_ROWS];
    const int together = rows_together(job, begin);
    const uint64_t tile_bytes = ENDOR_TILE * (uint64_t)(job->kind == ENDOR_X_F32 ? 4 : 2);
    for (int i = 0; i < 2 * ENDOR_AXPY_ROWS; i++) {
        row_walk *row = &sets[i / ENDOR_AXPY_ROWS][i % ENDOR_AXPY_ROWS];
        row->place.stream = job->stream;
        memset(row->buffer + tile_bytes, 0, ENDOR_SLACK);
    }
    for (uint64_t b = 0; b < job->batch; b++) memset(job->out + b * job->cols + begin, 0, (end - begin) * sizeof(float));
    int n, n_next, set = 0, status = find_rows(job, 0, sets[0], together, &n);
    for (uint64_t a = 0; n && status == ENDOR_OK; a += (uint64_t)n, n = n_next, set ^= 1) {
        status = find_rows(job, a + (uint64_t)n, sets[set ^ 1], together, &n_next);
        if (status == ENDOR_OK) status = add_rows(job, a, sets[set], n, sets[set ^ 1], n_next, begin, end);
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

#define ACTIVE(TYPE)                                                                                                   \
    for (uint64_t i = 0; i < cols; i += 8) { /* mostly eight zeros */                                                  \
        const uint64_t n = min64(8, cols - i);                                                                         \
        TYPE seen[8] = {0}, any = 0;                                                                                   \
        for (uint64_t b = 0; b < batch; b++) {                                                                         \
            TYPE row[8] = {0};                                                                                         \
            if (n == 8) memcpy(row, (const TYPE *)x + b * cols + i, sizeof row);                                       \
            else memcpy(row, (const TYPE *)x + b * cols + i, n * sizeof *row);                                         \
            for (int j = 0; j < 8; j++) seen[j] |= row[j];                                                             \
        }                                                                                                              \
        for (int j = 0; j < 8; j++) any |= seen[j];                                                                    \
        if (!(TYPE)(any << 1)) continue;                                                                               \
        for (uint64_t j = 0; j < n; j++) {                                                                             \
            active[count] = (uint32_t)(i + j);                                                                         \
            count += (TYPE)(seen[j] << 1) != 0;                                                                        \
        }                                                                                                              \
    }

/* Write the columns of x (batch, cols), bits of floats, that hold any number but 0 to active, which has room for cols + 1
 * of them; return how many. */
ENDOR_API uint64_t endor_active(const void *x, uint64_t batch, uint64_t cols, int itemsize, uint32_t *active) {
    uint64_t count = 0;
    if (!batch) return 0;
    if (itemsize == 2) { ACTIVE(uint16_t) }
    else { ACTIVE(uint32_t) }
    return count;
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
