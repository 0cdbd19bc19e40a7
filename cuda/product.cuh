// y = W x for up to 8 columns x: what products from the packed forms share. 16-bit weights, fp32 sums.
//
// One m16n8k16 tensor-core product holds 256 weights. With 8 columns of x they are 16 rows by 16 columns of W.
// With fewer, the 8 columns of B are COLUMNS columns of x times CHUNKS = 8 / COLUMNS neighbouring parts of 16 of
// W's columns, and the rows of A are 2 * COLUMNS rows of W times as many parts:
//
//            A (16 x 16)                      B (16 x 8)               C (16 x 8), one column of x
//   row r   | cols   0..15  |       | x[0..15] | x[16..31] | ... |     | * . . . |
//           | cols  16..31  |                                          | . * . . |   only where the
//           |      ...      |   x     column j = x[16j..16j+15]    =   | . . * . |   parts agree
//   row r+1 | cols   0..15  |                                          | * . . . |   is wanted
//           |      ...      |                                          | . * . . |
//
// So each weight passes the tensor cores once, whatever the batch, and x is one 8-byte load a lane for 256
// weights. The k slots may be permuted alike in A and B: lane L owns columns 4(L % 4) .. 4(L % 4) + 3 of its part on both
// sides, and weights are read in storage order (no second layout on disk for products). Before sm_80 the same
// loop multiplies in fp32.
//
// A warp walks segments of ROWS rows: 4096 weights, 128 bitmap words, 4 a lane. The neighbouring LANES lanes hold
// the words of one row, so the sums that rank them are over LANES lanes, two words at a time (16 bits each).
// How a segment's values come to shared memory is the codec's (`Staging`). Each lane leaves its words and the places
// of their first values in shared memory; one 64-bit load brings a step's lanes both. Four weights of a lane:
// their values are consecutive, so 3 aligned 32-bit shared loads hold them, and a 16-entry table turns the 4
// bitmap bits into byte-permute selectors. No predicate, no branch.
//
// The warps of a block share out the segments of the same rows. Order of the sums, for each y: the tensor core's of
// 16 products; steps and segments of a warp by column, for each part of its own; parts, then warps, from zero.
// It depends on the shape, COLUMNS, ROWS and warps: not on the codec, nor on timing.
#pragma once

// ENDOR_COLUMNS: columns of x at most, 1, 2, 4 or 8. ENDOR_ROWS: rows of a warp, 4 to 32, a multiple of 2 * COLUMNS.
// ENDOR_HALF: 1 for fp16 weights and x, 0 for bf16. ENDOR_FLOAT_OUT: y is fp32 instead of x's type.
// ENDOR_BITMAP: 0 where every weight is stored.
constexpr int COLUMNS = ENDOR_COLUMNS, ROWS = ENDOR_ROWS;
constexpr int CHUNKS = 8 / COLUMNS, TILE_ROWS = 2 * COLUMNS, TILES = ROWS / TILE_ROWS;
constexpr u32 SEGMENT = 4096 / ROWS, LANES = SEGMENT / 32, TOGETHER = 32 / LANES;  // rows of one word a lane
constexpr u32 STEP = 16 * CHUNKS, HALVES = STEP < 32 ? 2 : 1;                       // steps of one word
constexpr u32 PLACES = 8 * LANES + 8;  // bytes of a row's places: neighbouring rows lie in other banks
constexpr int WORDS_A_LANE = 4;
static_assert(ROWS % TILE_ROWS == 0 && ROWS >= 4 && ROWS <= 32, "4096 weights, 4 words a lane");

#if ENDOR_FLOAT_OUT
typedef float Output;
#else
typedef u16 Output;
#endif

struct Product {
  u64 tile_offsets;     // u32[n_tiles + 1]; 0 without a bitmap
  u64 bitmap;           // u32[n_tiles * 32]; 0 without a bitmap
  u64 values;           // raw: u16[nnz], 16-byte aligned; exp: u8[B][nnz], 8-byte aligned
  u64 x;                // u16[batch][cols], 16-byte aligned
  u64 y;                // Output[batch][rows]
  u64 planes;           // exp: as in Tensor, like the next three
  u64 patch_offsets;
  u64 patch_ranks;
  u64 patch_exponents;
  u64 plane_nbytes;
  u64 patches;
  u32 nnz;
  u32 rows;
  u32 cols;             // multiple of 32
  u32 batch;            // 1 .. COLUMNS
  u32 capacity;         // most stored elements in SEGMENT columns of one row: sizes the shared slots
  u32 base;             // exp: first exponent of the window
};
static_assert(sizeof(Product) == ENDOR_PRODUCT_BYTES, "must match endor.kernels.gpu_product.PRODUCT");

#ifndef ENDOR_EMULATED
#if __CUDA_ARCH__ >= 800
#define ENDOR_TENSOR_CORES 1
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if ENDOR_HALF
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
               "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
#define ENDOR_TENSOR_CORES 0
#endif

__device__ __forceinline__ float widen(u32 bits) {
#if ENDOR_HALF
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(static_cast<u16>(bits)));
  return f;
#else
  return __uint_as_float(bits << 16);
#endif
}

__device__ __forceinline__ u16 narrow(float f) {
  u16 bits;
#if ENDOR_HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
  u32 u = __float_as_uint(f);
  // NaN first: rounding could carry its payload into infinity.
  bits = static_cast<u16>(f != f ? (u >> 16) | 0x40u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
#endif
  return bits;
}
#endif

__device__ __forceinline__ void store(float* y, float sum) { *y = sum; }
__device__ __forceinline__ void store(u16* y, float sum) { *y = narrow(sum); }

__device__ __forceinline__ u32 least(u32 a, u32 b) { return a < b ? a : b; }

// What a warp knows of its rows. Lane L's word i lies in row i * TOGETHER + L / LANES, word L % LANES of the segment.
struct Rows {
  const Product& p;
  u32 first, lane, sub, end;  // first row; word of a row; segments of this warp end there
  const u32* bits;            // this lane's word of the first row, segment 0

  __device__ __forceinline__ Rows(const Product& product, u32 row, u32 in_warp, u32 last)
      : p(product), first(row), lane(in_warp), sub(in_warp % LANES), end(last) {
    bits = pointer<u32>(p.bitmap) + (static_cast<u64>(row_of(0)) * p.cols >> 5) + sub;
  }
  __device__ __forceinline__ u32 in_block(int i) const { return i * TOGETHER + lane / LANES; }
  __device__ __forceinline__ u32 row_of(int i) const { return first + in_block(i); }
  __device__ __forceinline__ u64 flat(int i, u32 segment) const {
    return static_cast<u64>(row_of(i)) * p.cols + static_cast<u64>(segment) * SEGMENT;
  }

  __device__ __forceinline__ u32 word(int i, u32 segment) const {
    const u32 column = segment * LANES + sub;
    if (segment >= end || column >= p.cols >> 5 || row_of(i) >= p.rows) return 0;
#if ENDOR_BITMAP
    return __ldg(bits + (static_cast<u64>(i) * TOGETHER * (p.cols >> 5) + segment * LANES));
#else
    return FULL_WARP;
#endif
  }

  // Rank of the first stored element at or after the row's part of `segment`.
  __device__ __forceinline__ u32 rank(int i, u32 segment) const {
    const u64 at = flat(i, segment);
#if ENDOR_BITMAP
    u32 before = 0, start = 0;
    if (row_of(i) < p.rows && segment < end) {
      start = __ldg(pointer<u32>(p.tile_offsets) + at / TILE);
      for (u32 k = sub; k < (static_cast<u32>(at >> 5) & 31); k += LANES)
        before += __popc(__ldg(pointer<u32>(p.bitmap) + at / TILE * 32 + k));
    }
    if (p.cols % TILE || SEGMENT % TILE)
#pragma unroll
      for (u32 step = 1; step < LANES; step <<= 1) before += __shfl_xor_sync(FULL_WARP, before, step);
    return start + before;
#else
    return static_cast<u32>(at);
#endif
  }
};

// The words of a segment and where their values lie.
struct Held {
  u32 word[WORDS_A_LANE];
  u32 before[WORDS_A_LANE / 2];  // stored elements of the row's part below each word, two of 16 bits
  u32 first[WORDS_A_LANE];       // where the row's first value is, as `kept`

  // Rank the words; `count` becomes the stored elements of each word's row in the segment.
  __device__ __forceinline__ void rank(u32 lane, u32 (&count)[WORDS_A_LANE]) {
#pragma unroll
    for (int i = 0; i < WORDS_A_LANE; i += 2) {
      const u32 own = __popc(word[i]) | __popc(word[i + 1]) << 16;
      u32 sum = own;
#pragma unroll
      for (u32 step = 1; step < LANES; step <<= 1) {
        const u32 below = __shfl_up_sync(FULL_WARP, sum, step);
        if (lane % LANES >= step) sum += below;
      }
      before[i / 2] = sum - own;
      const u32 both = __shfl_sync(FULL_WARP, sum, lane | (LANES - 1));
      count[i] = both & 0xffffu, count[i + 1] = both >> 16;
    }
  }

  // Where the first value of word i is.
  __device__ __forceinline__ u32 place(int i) const {
    const u32 below = i & 1 ? before[i / 2] >> 16 : before[i / 2] & 0xffffu;
    return first[i] + 2 * below;
  }
};

// Selectors that spread consecutive 16-bit values over the set bits of `nibble`: x = selector of columns
// 0 and 1 | selector of columns 2 and 3 << 16, y = which halves of columns 2 and 3 are stored at all.
// Column 0 and 1 take a zero byte (index 4) where their bit is clear.
__device__ __forceinline__ uint2 selectors(u32 nibble) {
  u32 taken = 0, x = 0, y = 0;
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    u32 pick = i < 2 ? 0x44u : 0u;
    if (nibble >> i & 1u) {
      pick = (2 * taken) | (2 * taken + 1) << 4;
      if (i >= 2) y |= 0xffffu << (16 * (i - 2));
      taken++;
    }
    x |= pick << (8 * i);
  }
  uint2 v;
  v.x = x, v.y = y;
  return v;
}

// Four neighbouring columns of one row as two registers of two.
//
//   at      address of the first stored one of them, even
//   entry   their bits, times the 8 bytes of an entry of `table`
__device__ __forceinline__ void gather(Staged table, u32 at, u32 entry, u32& low, u32& high) {
  const Staged from = staged(at & ~3u);
  const uint2 pick = fetch8(table + entry);
  const u32 odd = at * 8, w0 = fetch4(from), w1 = fetch4<4>(from), w2 = fetch4<8>(from);
  const u32 v01 = __funnelshift_r(w0, w1, odd), v23 = __funnelshift_r(w1, w2, odd);  // modulo 32: 0 or 16 bits
  low = permute(v01, 0, pick.x);
  high = permute(v01, v23, pick.x >> 16) & pick.y;
}

// The whole product. `Staging` brings a segment's values into the warp's slots, ROWS of `slot` bytes, BUFFERS times:
//
//   Staging(rows, begin, slots, slot)   what can be loaded before the first segment
//   issue(segment, held)                words, ranks and places of `segment`, and its values or their copies
//   arrive()                            the copies of that segment are there, after the next __syncwarp
//
// block    1 to 8 warps, which share out the segments of the rows
// shared   128 + warps * (BUFFERS * ROWS * slot + ROWS * PLACES + 32 * ROWS + Staging::EXTRA) bytes
template <typename Staging>
__device__ __forceinline__ void multiply_rows(const Product& p, u8* shared) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const u32 row0 = blockIdx.x * ROWS;
  const u32 slot = (2 * least(p.capacity, SEGMENT) + 32 + 15) / 16 * 16;
  constexpr u32 PARTIAL = 8 * ROWS;  // floats of a warp: rows, columns, parts
  uint2* table = reinterpret_cast<uint2*>(shared);
  float* partial = reinterpret_cast<float*>(shared + 128);
  u8* own = shared + 128 + 4 * PARTIAL * warps + warp * (ROWS * PLACES + Staging::EXTRA);
  u8* places = own + Staging::EXTRA;
  u8* slots = shared + 128 + warps * (4 * PARTIAL + ROWS * PLACES + Staging::EXTRA) +
              warp * Staging::BUFFERS * ROWS * slot;
  if (threadIdx.x < 16) table[threadIdx.x] = selectors(threadIdx.x);
  __syncthreads();

#if ENDOR_TENSOR_CORES
  constexpr int SUMS = 4;
#else
  constexpr int SUMS = 2 * COLUMNS;
#endif
  float sum[TILES][SUMS];
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int k = 0; k < SUMS; k++) sum[i][k] = 0.f;

  // This lane's part of A and B.
  const u32 group = lane >> 2, part = group % CHUNKS, row = group / CHUNKS, quad = 4 * (lane & 3);
  const u32 segments = (p.cols + SEGMENT - 1) / SEGMENT, share = (segments + warps - 1) / warps;
  const u32 begin = warp * share, end = least(begin + share, segments);
  if (begin < end) {
    const u32 offset = part * 16 + quad, bit = offset & 31;
    const Staged look = staged_address(table), to_places = staged_address(places);
    const Staged held_at = to_places + row * PLACES + (offset >> 5) * 8;
    const Staged put_at = to_places + lane / LANES * PLACES + 8 * (lane % LANES);
#if ENDOR_TENSOR_CORES
    const u32 x_part = group / COLUMNS, x_column = group % COLUMNS;  // column `group` of B
    const bool has_x = COLUMNS == 1 || x_column < p.batch;
    const u16* x = pointer<u16>(p.x) + static_cast<u64>(has_x ? x_column : 0) * p.cols + x_part * 16 + quad;
    const u32 x_offset = x_part * 16 + quad;
#endif
    Staging staging(Rows(p, row0, lane, end), begin, slots, slot, own);
    for (u32 segment = begin; segment < end; segment++) {
      Held held;
      staging.issue(segment, held);
#pragma unroll
      for (int i = 0; i < WORDS_A_LANE; i++)
        stage8(put_at + i * TOGETHER * PLACES, held.word[i], held.place(i));
      staging.arrive();
      __syncwarp();
      const u32 column = segment * SEGMENT, left = p.cols - column;
      const u32 words = (least(left, SEGMENT) + STEP - 1) / (STEP * HALVES);
#pragma unroll 2
      for (u32 j = 0; j < words; j++) {
#pragma unroll
        for (u32 half = 0; half < HALVES; half++) {
          const u32 step = (j * HALVES + half) * STEP, from = bit + half * STEP;
          const u32 below = (1u << from) - 1u, turn = (from + 29) & 31;
#if ENDOR_TENSOR_CORES
          u32 b[2] = {0, 0};
          if (has_x && (STEP <= 32 || step + x_offset < left)) {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(x + column + step));
            b[0] = v.x, b[1] = v.y;
          }
#else
          uint2 b[COLUMNS];
#pragma unroll
          for (int q = 0; q < COLUMNS; q++) {
            b[q].x = b[q].y = 0;
            if (q < static_cast<int>(p.batch) && (STEP <= 32 || step + offset < left))
              b[q] = __ldg(pointer<uint2>(p.x + 2 * (static_cast<u64>(q) * p.cols + column + step + offset)));
          }
#endif
          uint2 now[TILES * 2];
#pragma unroll
          for (int i = 0; i < TILES * 2; i++)
            now[i] = fetch8(held_at + i * COLUMNS * PLACES + j * (STEP * HALVES / 4));
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            u32 a[4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const uint2 one = now[2 * tile + h];
              const u32 at = one.y + 2 * __popc(one.x & below);
              const u32 entry = __funnelshift_r(one.x, one.x, turn) & 0x78u;
              gather(look, at, entry, a[h], a[2 + h]);
            }
#if ENDOR_TENSOR_CORES
            multiply(sum[tile], a, b);
#else
#pragma unroll
            for (int q = 0; q < COLUMNS; q++)
#pragma unroll
              for (int h = 0; h < 2; h++)
                sum[tile][h * COLUMNS + q] += widen(a[h] & 0xffffu) * widen(b[q].x & 0xffffu) +
                                              widen(a[h] >> 16) * widen(b[q].x >> 16) +
                                              widen(a[2 + h] & 0xffffu) * widen(b[q].y & 0xffffu) +
                                              widen(a[2 + h] >> 16) * widen(b[q].y >> 16);
#endif
          }
        }
      }
      __syncwarp();  // all lanes have read what the next round overwrites
    }
  }

  float* mine = partial + warp * PARTIAL;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float* to = mine + (tile * TILE_ROWS + h * COLUMNS + row) * 8;
#if ENDOR_TENSOR_CORES
      // C[group + 8h][n] lies in lane (group, n / 2), register 2h + n % 2; n is a part and a column of x.
#pragma unroll
      for (u32 e = 0; e < 2; e++) {
        const u32 n = 2 * (lane & 3) + e;
        if (n / COLUMNS == part) to[n % COLUMNS * CHUNKS + part] = sum[tile][2 * h + e];
      }
#else
#pragma unroll
      for (int q = 0; q < COLUMNS; q++) {
        float v = sum[tile][h * COLUMNS + q];
        v += __shfl_xor_sync(FULL_WARP, v, 1);
        v += __shfl_xor_sync(FULL_WARP, v, 2);
        if ((lane & 3) == 0) to[q * CHUNKS + part] = v;
      }
#endif
    }
  __syncthreads();
  for (u32 i = threadIdx.x; i < ROWS * COLUMNS; i += blockDim.x) {
    const u32 at = row0 + i / COLUMNS, q = i % COLUMNS;
    float total = 0.f;
    for (u32 w = 0; w < warps; w++)
#pragma unroll
      for (u32 c = 0; c < CHUNKS; c++) total += partial[w * PARTIAL + i * CHUNKS + c];
    if (at < p.rows && q < p.batch)
      store(reinterpret_cast<Output*>(p.y) + static_cast<u64>(q) * p.rows + at, total);
  }
}
