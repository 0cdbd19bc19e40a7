/* AVX2 products: of elements in memory, and of values placed by their bitmap. */
#include "endor.h"

#if defined(__x86_64__)
#include "avx2.h"

#define PREFETCH 2048 /* bytes of values ahead */

INLINE TARGET __m256 floats_of(const uint8_t *w, uint64_t i, int kind) {
    if (kind == ENDOR_X_F32) return _mm256_loadu_ps((const float *)(w + 4 * i));
    __m128i x = load128(w + 2 * i);
    if (kind == ENDOR_X_F16) return _mm256_cvtph_ps(x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

INLINE TARGET void dot_of(const uint8_t *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc, int kind) {
    uint64_t whole = len / 16 * 16, itemsize = kind == ENDOR_X_F32 ? 4 : 2;
    for (int b0 = 0; b0 < x->batch; b0 += 4) { /* eight sums fit the registers */
        int batch = x->batch - b0 < 4 ? x->batch - b0 : 4;
        const float *row[4];
        __m256 sum[4][2];
        for (int b = 0; b < 4; b++) {
            int at = b0 + (b < batch ? b : 0);
            row[b] = (const float *)x->x + (uint64_t)at * x->stride + column;
            sum[b][0] = _mm256_loadu_ps(acc + 16 * at);
            sum[b][1] = _mm256_loadu_ps(acc + 16 * at + 8);
        }
        if (batch == 1) {
            for (uint64_t i = 0; i < whole; i += 16) {
                sum[0][0] = _mm256_fmadd_ps(floats_of(w, i, kind), _mm256_loadu_ps(row[0] + i), sum[0][0]);
                sum[0][1] = _mm256_fmadd_ps(floats_of(w, i + 8, kind), _mm256_loadu_ps(row[0] + i + 8), sum[0][1]);
            }
        } else {
            for (uint64_t i = 0; i < whole; i += 16) {
                __m256 w0 = floats_of(w, i, kind), w1 = floats_of(w, i + 8, kind);
                for (int b = 0; b < 4; b++) {
                    sum[b][0] = _mm256_fmadd_ps(w0, _mm256_loadu_ps(row[b] + i), sum[b][0]);
                    sum[b][1] = _mm256_fmadd_ps(w1, _mm256_loadu_ps(row[b] + i + 8), sum[b][1]);
                }
            }
        }
        for (int b = 0; b < batch; b++) {
            _mm256_storeu_ps(acc + 16 * (b0 + b), sum[b][0]);
            _mm256_storeu_ps(acc + 16 * (b0 + b) + 8, sum[b][1]);
        }
    }
    if (whole < len) endor_scalar_ops()->dot(w + whole * itemsize, x, column + whole, len - whole, acc);
}

TARGET void endor_avx2_dot(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc) {
    if (x->weight == ENDOR_X_BF16) dot_of(w, x, column, len, acc, ENDOR_X_BF16);
    else if (x->weight == ENDOR_X_F16) dot_of(w, x, column, len, acc, ENDOR_X_F16);
    else dot_of(w, x, column, len, acc, ENDOR_X_F32);
}

/* Bytes of an entry of the controls, as a shift. */
INLINE int entry_shift(int kind) { return kind == ENDOR_X_BF16 ? 5 : kind == ENDOR_X_F16 ? 4 : 3; }

/* Eight weights as floats. */
INLINE TARGET __m256 place(const uint8_t *v, uint64_t entry, int kind) {
    if (kind == ENDOR_X_F32) return _mm256_castsi256_ps(placed32(v, entry));
    if (kind == ENDOR_X_F16) return _mm256_cvtph_ps(_mm_shuffle_epi8(load128(v), place16(entry)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(v)), place_bf16(entry)));
}

INLINE TARGET float total(__m256 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

/* As many runs as keep all sums, and what a run carries along, in registers, and sums of a row, which must not depend on
 * the number of runs. Of values that a buffer in L1 brings two: a third one's buffer costs more there than it shares. */
#define RUNS(batch) ((batch) == 1 ? 3 : (batch) <= 4 ? 2 : 1)
#define BUFFERED_RUNS(batch) ((batch) <= 4 ? 2 : 1)
#define SUMS(batch) ((batch) == 1 ? 2 : 1)

typedef struct {
    const uint8_t *values[ENDOR_MAX_RUNS], *bitmap[ENDOR_MAX_RUNS];
    __m256 sum[ENDOR_MAX_RUNS][ENDOR_MAX_BATCH][2];
} lanes;

INLINE TARGET void begin_row(lanes *l, const endor_run *runs, const endor_span *span, int n_runs, int batch) {
    for (int r = 0; r < n_runs; r++) {
        for (int b = 0; b < batch; b++) {
            for (int i = 0; i < SUMS(batch); i++) {
                l->sum[r][b][i] = span->begins ? _mm256_setzero_ps() : _mm256_load_ps(runs[r].sums + 32 * b + 8 * i);
            }
        }
    }
}

INLINE TARGET void end_row(const lanes *l, endor_run *runs, const endor_span *span, const endor_operand *x, uint64_t row,
                           int n_runs, int batch) {
    for (int r = 0; r < n_runs; r++) {
        for (int b = 0; b < batch; b++) {
            if (span->finishes && b >= x->batch) break;
            if (span->finishes) {
                __m256 all = SUMS(batch) == 2 ? _mm256_add_ps(l->sum[r][b][0], l->sum[r][b][1]) : l->sum[r][b][0];
                runs[r].out[(uint64_t)b * span->out_stride + row] = total(all);
            } else {
                for (int i = 0; i < SUMS(batch); i++) _mm256_store_ps(runs[r].sums + 32 * b + 8 * i, l->sum[r][b][i]);
            }
        }
    }
}

/* 64 columns of all runs, the bits of which are at `byte` of the bitmap. */
INLINE TARGET void step(lanes *l, const float *xs, uint64_t stride, uint64_t byte, int kind, int n_runs, int batch,
                        int placed, int direct) {
    const uint64_t itemsize = kind == ENDOR_X_F32 ? 4 : 2;
    uint64_t word[ENDOR_MAX_RUNS], used[ENDOR_MAX_RUNS] = {0};
    for (int r = 0; r < n_runs; r++) {
        if (placed) word[r] = load64(l->bitmap[r] + byte);
        if (direct) _mm_prefetch((const char *)l->values[r] + PREFETCH, _MM_HINT_T0);
    }
    __m256i pair[ENDOR_MAX_RUNS];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m256 w[ENDOR_MAX_RUNS];
        for (int r = 0; r < n_runs; r++) {
            if (placed) {
                uint64_t m = entry(word[r], i, entry_shift(kind));
                w[r] = place(l->values[r] + itemsize * used[r], m, kind);
                used[r] += count(m);
            } else if (kind == ENDOR_X_BF16) { /* x is arranged: each second weight is the upper half of a float already */
                if (i % 2 == 0) pair[r] = load256(l->values[r] + 16 * i);
                __m256i half = i % 2 ? _mm256_and_si256(pair[r], _mm256_set1_epi32((int)0xffff0000))
                                     : _mm256_slli_epi32(pair[r], 16);
                w[r] = _mm256_castsi256_ps(half);
            } else {
                w[r] = floats_of(l->values[r], 8 * (uint64_t)i, kind);
            }
        }
        for (int b = 0; b < batch; b++) {
            __m256 at = _mm256_load_ps(xs + (uint64_t)b * stride + 8 * i);
            if (n_runs > 1) __asm__("" : "+x"(at)); /* else each run's fmadd loads it again, and loads are the bound */
            for (int r = 0; r < n_runs; r++) {
                l->sum[r][b][i % SUMS(batch)] = _mm256_fmadd_ps(w[r], at, l->sum[r][b][i % SUMS(batch)]);
            }
        }
    }
    for (int r = 0; r < n_runs; r++) l->values[r] += itemsize * (placed ? used[r] : 64);
}

INLINE TARGET uint64_t rows_of(endor_run *runs, const endor_span *span, const endor_operand *x, int kind, int n_runs,
                               int batch, int placed) {
    const uint64_t itemsize = kind == ENDOR_X_F32 ? 4 : 2, stride = x->stride, columns = span->columns;
    const float *xs = (const float *)x->x + span->column;
    lanes l;
    uint64_t row = 0;
    for (int r = 0; r < n_runs; r++) l.values[r] = runs[r].values, l.bitmap[r] = runs[r].bitmap;
    for (; row < span->rows; row++) {
        if (span->end) {
            int past = 0;
            for (int r = 0; r < n_runs; r++) past |= (uint64_t)(span->end - l.values[r]) < itemsize * columns + ENDOR_SLACK;
            if (past) break;
        }
        begin_row(&l, runs, span, n_runs, batch);
        if (span->end) {
            for (uint64_t k = 0; k < columns; k += 64) step(&l, xs + k, stride, k / 8, kind, n_runs, batch, placed, 1);
        } else {
            for (uint64_t k = 0; k < columns; k += 64) step(&l, xs + k, stride, k / 8, kind, n_runs, batch, placed, 0);
        }
        for (int r = 0; r < n_runs && placed; r++) l.bitmap[r] += columns / 8;
        end_row(&l, runs, span, x, row, n_runs, batch);
    }
    for (int r = 0; r < n_runs; r++) {
        runs[r].values = l.values[r], runs[r].bitmap = l.bitmap[r];
        if (span->finishes) runs[r].out += row;
    }
    return row;
}

/* Compiled for some batches; the others run as the next larger one, on rows of zeros, whose sums nobody stores. */
#define BATCHES(CALL)                                                                                             \
    switch (x->batch) {                                                                                           \
    case 1: CALL(1);                                                                                              \
    case 2: CALL(2);                                                                                              \
    case 3:                                                                                                       \
    case 4: CALL(4);                                                                                              \
    default: CALL(8);                                                                                             \
    }

#define ROWS(KIND)                                                                                                \
    static TARGET uint64_t rows_##KIND(endor_run *runs, int n_runs, const endor_span *span,                       \
                                       const endor_operand *x) {                                                  \
        if (runs->bitmap) {                                                                                       \
            if (n_runs == 1) BATCHES(ONE_PLACED_##KIND)                                                           \
            if (span->end) BATCHES(PLACED_##KIND) else BATCHES(BUFFERED_##KIND)                                   \
        }                                                                                                         \
        if (n_runs == 1) BATCHES(ONE_##KIND)                                                                      \
        if (span->end) BATCHES(ALL_##KIND) else BATCHES(ALL_BUFFERED_##KIND)                                      \
    }
#define ONE_PLACED_BF16(B) return rows_of(runs, span, x, ENDOR_X_BF16, 1, B, 1)
#define ONE_PLACED_F16(B) return rows_of(runs, span, x, ENDOR_X_F16, 1, B, 1)
#define ONE_PLACED_F32(B) return rows_of(runs, span, x, ENDOR_X_F32, 1, B, 1)
#define PLACED_BF16(B) return rows_of(runs, span, x, ENDOR_X_BF16, RUNS(B), B, 1)
#define PLACED_F16(B) return rows_of(runs, span, x, ENDOR_X_F16, RUNS(B), B, 1)
#define PLACED_F32(B) return rows_of(runs, span, x, ENDOR_X_F32, RUNS(B), B, 1)
#define BUFFERED_BF16(B) return rows_of(runs, span, x, ENDOR_X_BF16, BUFFERED_RUNS(B), B, 1)
#define BUFFERED_F16(B) return rows_of(runs, span, x, ENDOR_X_F16, BUFFERED_RUNS(B), B, 1)
#define BUFFERED_F32(B) return rows_of(runs, span, x, ENDOR_X_F32, BUFFERED_RUNS(B), B, 1)
#define ONE_BF16(B) return rows_of(runs, span, x, ENDOR_X_BF16, 1, B, 0)
#define ONE_F16(B) return rows_of(runs, span, x, ENDOR_X_F16, 1, B, 0)
#define ONE_F32(B) return rows_of(runs, span, x, ENDOR_X_F32, 1, B, 0)
#define ALL_BF16(B) return rows_of(runs, span, x, ENDOR_X_BF16, RUNS(B), B, 0)
#define ALL_F16(B) return rows_of(runs, span, x, ENDOR_X_F16, RUNS(B), B, 0)
#define ALL_F32(B) return rows_of(runs, span, x, ENDOR_X_F32, RUNS(B), B, 0)
#define ALL_BUFFERED_BF16(B) return rows_of(runs, span, x, ENDOR_X_BF16, BUFFERED_RUNS(B), B, 0)
#define ALL_BUFFERED_F16(B) return rows_of(runs, span, x, ENDOR_X_F16, BUFFERED_RUNS(B), B, 0)
#define ALL_BUFFERED_F32(B) return rows_of(runs, span, x, ENDOR_X_F32, BUFFERED_RUNS(B), B, 0)
ROWS(BF16)
ROWS(F16)
ROWS(F32)

uint64_t endor_avx2_rows(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x) {
    if (x->weight == ENDOR_X_BF16) return rows_BF16(runs, n_runs, span, x);
    if (x->weight == ENDOR_X_F16) return rows_F16(runs, n_runs, span, x);
    return rows_F32(runs, n_runs, span, x);
}

int endor_avx2_row_runs(const endor_operand *x, endor_way way) {
    return way == ENDOR_BUFFERED ? BUFFERED_RUNS(x->batch) : RUNS(x->batch);
}

/* Sixteen columns at a time, those of even number first: the order of `step` for bf16 without a bitmap. */
void endor_avx2_arrange(void *x, uint64_t cols, int itemsize) {
    (void)itemsize;
    for (float *at = x; cols >= 16; at += 16, cols -= 16) {
        float old[16];
        memcpy(old, at, sizeof old);
        for (int i = 0; i < 16; i++) at[i] = old[2 * (i & 7) + (i >> 3)];
    }
}

TARGET uint64_t endor_avx2_popcount(const uint8_t *bitmap, uint64_t words) {
    uint64_t a = 0, b = 0, c = 0, d = 0, i = 0;
    for (; i + 4 <= words; i += 4) {
        a += count(load64(bitmap + 8 * i)), b += count(load64(bitmap + 8 * i + 8));
        c += count(load64(bitmap + 8 * i + 16)), d += count(load64(bitmap + 8 * i + 24));
    }
    for (; i < words; i++) a += count(load64(bitmap + 8 * i));
    return a + b + c + d;
}

#endif
