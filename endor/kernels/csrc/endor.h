/* Shared declarations of the CPU kernels.
 *
 * A tensor of n weights is cut into tiles of 1024. A tile owns 16 bitmap words of 64 bits (LSB first: bit i of
 * word w = weight 64*w + i is stored) and the run [tile_offsets[t], tile_offsets[t+1]) of stored elements.
 *
 *   weights   |<----- tile 0: 1024 ----->|<----- tile 1 ----->| ...
 *   bitmap    |w0 w1 ... w15             |w16 ...             | ...
 *   stored    |e0 e1 ... e(o1-1)    |e(o1) ...          | ...        o = tile_offsets
 *   planes    |<- word 0: 64 bits ->|<- word 1 ->| ...               64 stored elements a word, not tile aligned
 *
 * Memory safety does not rest on the content of the arrays: reads are clamped to nnz elements and, near an array's
 * end, go through a copy on the stack; writes are driven by the tile index alone. Content that contradicts itself
 * (popcounts against offsets) gives wrong weights and the return value ENDOR_CORRUPT.
 */
#ifndef ENDOR_H
#define ENDOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Endor's arrays are little endian; this machine uses the numpy path"
#endif

#define ENDOR_TILE 1024
#define ENDOR_WORDS 16                /* bitmap words in a tile */
#define ENDOR_GROUP 8                 /* tiles in a patch group */
#define ENDOR_SLACK 64                /* bytes a kernel may read or write past the elements it was asked for */
#define ENDOR_STREAMING (16u << 20)   /* bytes of a tensor from which packing stores past the caches */
#define ENDOR_MAX_BATCH 8             /* rows of x in one pass of a product */
#define ENDOR_BUFFER (ENDOR_TILE + 2 * 64) /* elements: a tile's run, widened to whole plane words, and slack */

enum { ENDOR_OK = 0, ENDOR_CORRUPT = 1, ENDOR_NO_MEMORY = 2, ENDOR_UNSUPPORTED = 3 };
enum { ENDOR_DENSE = 0, ENDOR_RAW = 1, ENDOR_EXP = 2 };
enum { ENDOR_SCALAR = 0, ENDOR_AVX2 = 1, ENDOR_AVX512 = 2, ENDOR_NEON = 3, ENDOR_KERNELS = 4 };
enum { ENDOR_X_BF16 = 0, ENDOR_X_F16 = 1, ENDOR_X_F32 = 2 };

#define ENDOR_API __attribute__((visibility("default")))
#define ENDOR_ALIGNED __attribute__((aligned(64)))
#define ENDOR_INLINE static inline __attribute__((always_inline, unused))

/* One packed tensor. Mirrored field by field in native.py. Pointers need no alignment. */
typedef struct {
    uint64_t numel;
    uint64_t nnz;
    uint64_t patches;
    const uint8_t *tile_offsets;    /* u32[n_tiles + 1], NULL without bitmap */
    const uint8_t *bitmap;          /* u8[n_tiles * 128], NULL without bitmap */
    const uint8_t *values;          /* raw, dense: element[nnz] */
    const uint8_t *bytes;           /* exp: u8[rest_bits / 8][nnz] */
    const uint8_t *planes;          /* exp: u8[P][8 * ceil(nnz / 64)] */
    const uint8_t *patch_offsets;   /* u32[n_groups + 1] or NULL */
    const uint8_t *patch_ranks;     /* u16[patches] */
    const uint8_t *patch_exponents; /* u8[patches] */
    int32_t codec;
    int32_t itemsize;
    int32_t exponent_bits;
    int32_t mantissa_bits;
    int32_t rest_bits;
    int32_t k;
    int32_t base;
    int32_t reserved;
} endor_tensor;

/* The exp stream of stored elements: w = code << rest_bits | rest, cut into byte planes and bit planes. */
typedef struct {
    const uint8_t *bytes;  /* byte plane j at bytes + j * byte_stride */
    const uint8_t *planes; /* bit plane j at planes + j * plane_stride */
    uint64_t byte_stride;
    uint64_t plane_stride;
    int byte_planes;
    int bit_planes;
    int itemsize;
    int exponent_bits;
    int mantissa_bits;
    int rest_bits;
    int k;
    uint32_t base;
    uint8_t lut[256]; /* one-byte elements: w -> element */
} endor_stream;

/* Where `split` puts 64 elements. */
typedef struct {
    uint8_t *bytes[3];
    uint64_t planes[8];
} endor_slots;

/* Vector operand of a product, converted once a call. */
typedef struct {
    const void *x;     /* (batch, stride) bf16 when bf16_pairs, else float */
    uint64_t stride;   /* elements from one row of x to the next */
    int batch;         /* 1..ENDOR_MAX_BATCH */
    int bf16_pairs;    /* use vdpbf16ps */
    int weight;        /* ENDOR_X_*: how weight bits are read */
} endor_operand;

/* A walk through the patches in the order of ranks. */
typedef struct {
    uint64_t group;   /* the group of tiles it is in */
    uint64_t start;   /* first rank of the group */
    uint64_t at, end; /* patches of the group that are left */
} endor_patches;

/* Consecutive rows of a weight: where the bits and the stored elements of the next ones begin. */
typedef struct {
    const uint8_t *bitmap;
    const uint8_t *values; /* raw elements */
    uint64_t rank;         /* exp: of the next stored element */
    endor_patches patches; /* exp: those that come */
    uint64_t next_patch;   /* exp: rank of the first of them */
    float *out;  /* the next row's sum for the first row of x */
    float *sums; /* ENDOR_SUMS floats: a row that is not finished */
} endor_run;

/* What part of the next rows is multiplied: `rows` whole ones, or `columns` of one. */
typedef struct {
    uint64_t rows;
    uint64_t column, columns; /* multiples of 64 */
    int begins, finishes;     /* whether the columns are a row's first, and its last */
    const uint8_t *end;       /* of the memory that `values` may be read from; NULL: a buffer in L1, and no end */
    uint64_t out_stride;      /* floats from the sum for one row of x to that for the next */
} endor_span;

#define ENDOR_MAX_RUNS 4
#define ENDOR_SUMS (ENDOR_MAX_BATCH * 2 * 16)

/* Where the stored elements of runs lie: raw ones in memory, those of an exp stream in its planes, or in a buffer in L1. */
typedef enum { ENDOR_IN_PLACE, ENDOR_EXP_IN_PLACE, ENDOR_BUFFERED } endor_way;

/* One instruction set. Index of the arrays: log2(itemsize). */
typedef struct {
    const char *name;
    /* Expand one tile. `values` is readable ENDOR_SLACK bytes past the run; `out` holds 1024 elements and, when
     * streaming, is aligned to `streaming_bytes`. Returns the elements used. */
    uint32_t (*expand[3])(const uint8_t *bitmap, const void *values, void *out, int streaming);
    /* the same for values that come from memory, not from L1, where another way is faster; else NULL */
    uint32_t (*expand_far[3])(const uint8_t *bitmap, const void *values, void *out, int streaming);
    /* Decode stored elements [64 * word, 64 * (word + words)) into buf (64-byte aligned, 64 * words elements). */
    void (*stream)(const endor_stream *s, uint64_t word, uint64_t words, void *buf);
    /* Instead of `stream`: stored elements [first, first + n), from a multiple of 8 on, n being one of 32. */
    void (*stream_from)(const endor_stream *s, uint64_t first, uint64_t n, void *buf);
    /* Bitmap of one tile; returns its popcount. */
    uint32_t (*scan[3])(const void *src, uint8_t *bitmap);
    /* Stored elements of one tile to dst, which has ENDOR_SLACK bytes to spare. Returns their number. */
    uint32_t (*compress[3])(const uint8_t *bitmap, const void *src, void *dst);
    /* Add the exponent fields of one whole tile, zeros included, to hist (4 tables of 256, summed by the caller). */
    void (*histogram)(const void *src, int itemsize, int exponent_bits, int mantissa_bits, uint32_t *hist);
    /* 64 elements to planes; returns the mask of elements outside the exponent window. */
    uint64_t (*split)(const endor_stream *s, const void *src, endor_slots *slots);
    /* Optional: the same for `words` whole words from `word` on, into the arrays of s. outside[i]: the mask of word
     * word + i. counts, unless NULL: see endor_tally. cached: src is, so that nothing need be fetched ahead. */
    void (*split_words)(const endor_stream *s, const void *src, int cached, uint64_t word, uint64_t words,
                        uint64_t *outside, uint64_t *counts);
    /* memcpy, past the caches where the destination allows it. */
    void (*copy_streaming)(void *dst, const void *src, size_t nbytes);
    uint64_t (*read)(const void *src, size_t nbytes);
    void (*fence)(void);
    uint64_t streaming_bytes; /* 64 where 0 */
    /* acc[b * 16 + lane] += w[0:len] . x[b, column : column + len]; may read ENDOR_SLACK bytes past w, never past x. */
    void (*dot)(const void *w, const endor_operand *x, uint64_t column, uint64_t len, float *acc);
    /* Optional: products of the next rows of each of n_runs runs in lockstep, n_runs being 1 or row_runs(x, way). Reads
     * up to ENDOR_SLACK bytes past the values used. Stops early at a row whose values could reach past `end`. Returns
     * the rows done in each run, and moves the runs on by as many. */
    uint64_t (*rows)(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x);
    int (*row_runs)(const endor_operand *x, endor_way way);
    /* Whether `rows` also multiplies runs that have no bitmap, every weight being stored; bf16, by x in the order that
     * `arrange` gives it. */
    int rows_without_bitmap;
    /* Optional: the same for bf16 weights in an exp stream, n_runs being 1 or row_runs(x, ENDOR_EXP_IN_PLACE),
     * with x in the order that `arrange` gives it. Stops early at a row whose stored elements could reach past the arrays. */
    uint64_t (*exp_rows)(endor_run *runs, int n_runs, const endor_span *span, const endor_operand *x,
                         const endor_tensor *t, const endor_stream *s);
    void (*arrange)(void *x, uint64_t cols, int itemsize); /* a row of x, in place */
    uint64_t (*popcount)(const uint8_t *bitmap, uint64_t words);
    int bf16_pairs; /* has vdpbf16ps */
} endor_ops;

#define ENDOR_AXPY_ROWS 4

/* out[0:len] += h[i] * w[i][0:len] for i = 0 to n - 1, at most ENDOR_AXPY_ROWS, in that order; each w[i], of kind ENDOR_X_*,
 * is readable ENDOR_SLACK bytes past its end. */
typedef void (*endor_axpy)(const uint8_t *const *w, int kind, uint64_t len, const float *h, int n, float *out);
endor_axpy endor_axpy_of(int kernel);

const endor_ops *endor_scalar_ops(void);
const endor_ops *endor_avx2_ops(void);
const endor_ops *endor_avx512_ops(void);
const endor_ops *endor_neon_ops(void);
const endor_ops *endor_ops_of(int kernel); /* NULL when this CPU lacks it */

/* Runs fn(context) on up to `threads` threads, the caller's included, and returns when all have left it. fn takes its
 * work from a counter in the context, so it is right with any number of them. `nbytes` says how much work it is, as
 * bytes read or written: little is not shared, and what would be done before a thread is awake wakes none. */
void endor_parallel(int threads, uint64_t nbytes, void (*fn)(void *), void *context);

/* operand.c: x (batch, cols) in the form that kernels multiply, each row on a cache line, so that its loads never straddle
 * two; to be freed. Batches of less than three are multiplied as they are, others as the next size that was compiled, on
 * rows of zeros. */
uint8_t *endor_operand_of(const endor_ops *ops, const endor_operand *form, uint64_t cols, const uint8_t *x, int x_kind,
                          uint64_t batch, int arranged);

/* decode.c, used by the product as well */
void endor_stream_of(const endor_tensor *t, endor_stream *s);
uint8_t *endor_stream_run(const endor_ops *ops, const endor_tensor *t, const endor_stream *s, uint64_t first,
                          uint64_t last, uint8_t *buf);
void endor_fetch(const endor_tensor *t, const endor_stream *s, uint64_t flat, uint64_t end);
endor_patches endor_patches_at(const endor_tensor *t, uint64_t tile, uint64_t rank);
void endor_patch(const endor_tensor *t, endor_patches *cursor, uint64_t tile_end, uint64_t first, uint64_t last,
                 uint8_t *elements);
int endor_decode_tile(const endor_ops *ops, const endor_tensor *t, const endor_stream *s, endor_patches *cursor,
                      uint64_t tile, void *out);

ENDOR_INLINE uint64_t load64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }
ENDOR_INLINE uint32_t load32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
ENDOR_INLINE uint16_t load16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return v; }
ENDOR_INLINE void store64(uint8_t *p, uint64_t v) { memcpy(p, &v, 8); }
ENDOR_INLINE void store32(uint8_t *p, uint32_t v) { memcpy(p, &v, 4); }

ENDOR_INLINE uint64_t min64(uint64_t a, uint64_t b) { return a < b ? a : b; }
ENDOR_INLINE int log2_itemsize(int itemsize) { return itemsize == 4 ? 2 : itemsize - 1; }
ENDOR_INLINE uint64_t tiles_of(uint64_t n) { return (n + ENDOR_TILE - 1) / ENDOR_TILE; }

/* Into the second cache. */
ENDOR_INLINE void endor_prefetch(const uint8_t *at, uint64_t nbytes) {
    for (uint64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

/* The stored elements before a tile. */
ENDOR_INLINE uint64_t endor_rank_of_tile(const endor_tensor *t, uint64_t tile) {
    uint64_t rank = t->tile_offsets ? load32(t->tile_offsets + 4 * tile) : tile * ENDOR_TILE;
    return min64(rank, t->nnz);
}

ENDOR_INLINE void endor_enter_group(const endor_tensor *t, endor_patches *patches, uint64_t group) {
    patches->group = group;
    patches->start = endor_rank_of_tile(t, group * ENDOR_GROUP);
    patches->at = min64(load32(t->patch_offsets + 4 * group), t->patches);
    patches->end = min64(load32(t->patch_offsets + 4 * group + 4), t->patches);
}

#define ENDOR_TALLIED 4 /* code bits up to which codes are counted from their planes */

/* Count the codes of 64 stored elements from their k <= ENDOR_TALLIED planes: adds to counts[m], for each set m of bits,
 * how many codes have all of them. Seven population counts for eight codes, where comparing takes 32 instructions. */
ENDOR_INLINE void endor_tally(const uint64_t *planes, int k, uint64_t *counts) {
    uint64_t all[1 << ENDOR_TALLIED];
    all[0] = UINT64_MAX;
    for (int j = 0; j < k; j++) {
        for (int m = 0; m < 1 << j; m++) {
            all[m | 1 << j] = all[m] & planes[j];
            counts[m | 1 << j] += (uint64_t)__builtin_popcountll(all[m | 1 << j]);
        }
    }
}

/* Rank of the next patch; UINT64_MAX after the last. */
ENDOR_INLINE uint64_t endor_next_patch(const endor_tensor *t, endor_patches *patches) {
    if (!t->patches) return UINT64_MAX;
    while (patches->at >= patches->end) {
        if (patches->group + 1 >= (tiles_of(t->numel) + ENDOR_GROUP - 1) / ENDOR_GROUP) return UINT64_MAX;
        endor_enter_group(t, patches, patches->group + 1);
    }
    return patches->start + load16(t->patch_ranks + 2 * patches->at);
}

/* binary16 to binary32; exact, NaN payloads kept. */
ENDOR_INLINE float endor_half(uint32_t h) {
    uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu, bits;
    float value;
    if (magnitude >= 0x7c00u) {
        bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
        bits = sign | ((magnitude << 13) + (112u << 23));
    } else {
        value = (float)magnitude * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    memcpy(&value, &bits, 4);
    return value;
}

#endif
