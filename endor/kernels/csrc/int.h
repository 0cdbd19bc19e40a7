/* Codec `int`: integer codes times steps, the codes in interleaved rANS.
 *
 * A chunk is 32768 codes, coded by 32 lanes that share one stream of 16-bit words: lane i codes elements i, i + 32, ...
 * A row is one element of each lane. After a row, the lanes whose state fell below 2^16 take the next words, in order.
 *
 *   chunk     |<- row 0: 32 ->|<- row 1 ->| ... |<- row 1023 ->|
 *   words     |w w w|w w w w w|w w| ...                           as many a row as lanes that need one
 *
 * Memory safety does not rest on the content of the arrays: offsets are clamped, a row that could read past the last
 * word reads from a copy with zeros behind it, the table is built from frequencies that were summed before.
 */
#ifndef ENDOR_INT_H
#define ENDOR_INT_H

#include "endor.h"

#define ENDOR_LANES 32
#define ENDOR_ROWS 1024                            /* of a chunk */
#define ENDOR_CHUNK (ENDOR_LANES * ENDOR_ROWS)
#define ENDOR_SCALE 4096                           /* the frequencies' sum */
#define ENDOR_LOWEST (1u << 16)                    /* least state */
#define ENDOR_PIECE 1024                           /* elements that are brought into L1 at a time: whole rows */
#define ENDOR_PIECE_ROWS (ENDOR_PIECE / ENDOR_LANES)

enum { ENDOR_BF16 = 0, ENDOR_F16 = 1, ENDOR_F32 = 2, ENDOR_CODES = 3 };

/* One tensor. Mirrored field by field in native.py. Pointers need no alignment. */
typedef struct {
    uint64_t numel;
    uint64_t cols;
    uint64_t n_words;
    uint64_t patches;
    uint64_t block_rows, block_cols; /* elements that share a step */
    uint64_t step_cols;              /* steps of a row of blocks */
    const uint8_t *steps;            /* (step_rows, step_cols) of step_kind */
    const uint8_t *frequencies;      /* u16[symbols] */
    const uint8_t *levels;           /* float[symbols]: what symbols stand for; NULL where they stand for codes */
    const uint8_t *chunk_offsets;    /* u32[n_chunks + 1], in words */
    const uint8_t *states;           /* u32[n_chunks][32] */
    const uint8_t *words;            /* u16[n_words] */
    const uint8_t *low_bits;         /* u8[4 * shift * ceil(numel / 32)], NULL without shift */
    const uint8_t *patch_offsets;    /* u32[n_chunks + 1], NULL without patches */
    const uint8_t *patch_ranks;      /* u16[patches] */
    const uint8_t *patch_codes;      /* i32[patches] */
    int32_t symbols;
    int32_t base;
    int32_t shift;
    int32_t step_kind;     /* ENDOR_BF16, ENDOR_F16, ENDOR_F32 */
    int32_t step_exponent; /* steps are what is stored times 2 to this */
    int32_t value_kind;    /* of the dense elements */
} endor_int;

/* Codes of a piece to dense elements, or to int32. */
typedef struct {
    const uint8_t *symbols; /* u8[n] */
    const uint8_t *low;     /* u8[n], or NULL */
    const float *steps;     /* float[n]; not read for ENDOR_CODES */
    const float *levels;    /* float[256], or NULL; not read for ENDOR_CODES */
    int32_t base;
    int32_t shift;
    int32_t kind;
} endor_values;

/* One instruction set. */
typedef struct {
    /* Decode `rows` rows: 32 symbols each to `symbols`; the states move on. Reads up to 80 bytes from where the words of
     * the last row begin. Returns where the next words are. Table entry: symbol | bias << 8 | frequency << 20. */
    const uint8_t *(*rows)(const uint32_t *table, uint32_t *states, const uint8_t *words, uint64_t rows,
                           uint8_t *symbols);
    /* The low bits of n elements, a multiple of 32; reads up to 7 bytes past them. */
    void (*low)(const uint8_t *bits, int shift, uint64_t n, uint8_t *low);
    /* n elements, a multiple of 32. */
    void (*values)(const endor_values *v, uint64_t n, void *out);
    /* Code `rows` rows of 32 symbols, the last one first: the words go in front of `at`, the states move on. Writes up to
     * as many words in front of `at` as there are symbols. Returns the first word. Table entry, of a symbol: frequency |
     * start << 16. */
    uint16_t *(*code)(const uint32_t *table, uint32_t *states, const uint8_t *symbols, uint64_t rows, uint16_t *at);
} endor_int_ops;

/* Those of a kernel that this CPU has; NULL of others. */
const endor_int_ops *endor_int_ops_of(int kernel);

const endor_int_ops *endor_int_scalar_ops(void);
const endor_int_ops *endor_int_avx2_ops(void);   /* NULL where it was not compiled */
const endor_int_ops *endor_int_avx512_ops(void);
void endor_int_avx2_low(const uint8_t *bits, int shift, uint64_t n, uint8_t *low);
uint16_t *endor_int_avx2_code(const uint32_t *table, uint32_t *states, const uint8_t *symbols, uint64_t rows,
                              uint16_t *at);

/* What all threads of a call read. */
typedef struct {
    const endor_ops *ops;
    const endor_int_ops *in;
    const endor_int *t;
    float *columns; /* the steps of cols + ENDOR_PIECE columns, from column 0 on and around; NULL where rows differ */
    float levels[256];
    float scale[2]; /* float16 steps are multiplied by both: their product may be subnormal, the step is not */
    int kind;       /* ENDOR_CODES, or the tensor's value_kind */
    uint32_t table[ENDOR_SCALE];
} endor_int_reader;

/* A walk through a chunk. */
typedef struct {
    uint32_t states[ENDOR_LANES] ENDOR_ALIGNED;
    uint64_t chunk, row;
    uint64_t word;     /* the next one */
    uint64_t patch, last_patch;
} endor_int_cursor;

int endor_int_open(endor_int_reader *r, int kernel, const endor_int *t, int kind);
void endor_int_close(endor_int_reader *r);
void endor_int_seek(const endor_int_reader *r, endor_int_cursor *c, uint64_t chunk);
/* Decode the next `rows` rows (at most ENDOR_PIECE_ROWS) to out, whole rows even past numel; NULL: pass over them.
 * Returns ENDOR_CORRUPT when the chunk ends here and its coders do not. */
int endor_int_piece(const endor_int_reader *r, endor_int_cursor *c, uint64_t rows, void *out);

ENDOR_INLINE uint64_t endor_int_rows(const endor_int *t, uint64_t chunk) { /* rows of a chunk */
    return min64((t->numel - chunk * ENDOR_CHUNK + ENDOR_LANES - 1) / ENDOR_LANES, ENDOR_ROWS);
}
ENDOR_INLINE int endor_int_itemsize(int kind) { return kind >= ENDOR_F32 ? 4 : 2; }

/* binary32, not NaN, to bfloat16 and to binary16: nearest, ties to even. */
ENDOR_INLINE uint16_t endor_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
ENDOR_INLINE uint16_t endor_to_half(float value) {
    uint32_t bits, sign, magnitude;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
    if (magnitude >= 0x38800000) {
        magnitude -= 112u << 23;
        return (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13);
    }
    if (magnitude < 0x33000000) return (uint16_t)sign; /* below half of the least subnormal */
    uint32_t drop = 126 - (magnitude >> 23), whole = (magnitude & 0x7fffff) | 0x800000;
    uint32_t kept = whole >> drop, rest = whole & ((1u << drop) - 1), half = 1u << (drop - 1);
    return (uint16_t)(sign | (kept + (rest > half || (rest == half && (kept & 1)))));
}

#endif
