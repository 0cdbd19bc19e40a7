// y = W x for up to 8 columns x, straight from codec `raw`: 16-bit weights, fp32 sums.
//
// Diagonal MMA. One m16n8k16 tensor-core product holds 128 neighbouring columns of TWO rows of W:
//
//            A (16 x 16)                      B (16 x 8)               C (16 x 8)
//   row r   | cols   0..15  |       | x[0..15] | x[16..31] | ... |     | * . . . |
//           | cols  16..31  |                                          | . * . . |   only the
//           |      ...      |   x     column j = x[16j..16j+15]    =   | . . * . |   diagonals
//   row r+1 | cols   0..15  |                                          | * . . . |   are wanted
//           |      ...      |                                          | . * . . |
//
// The k slots may be permuted alike in A and B, so lane L owns columns 4L..4L+3 on both sides: weights
// are read in storage order (no second layout on disk for products), x is one 8-byte load per lane and
// column, and the sum is fp32 in the tensor core. Before sm_80 the same loop multiplies in fp32.
//
// A warp walks segments of 1024 columns of 2 * ROW_PAIRS rows. Values of the next segment travel to
// shared memory (cp.async) and bitmap words of the one after into registers meanwhile. The warps of a
// block share out the segments of the same rows and add up in shared memory, in a fixed order: the
// result does not depend on timing.
//
// Each lane leaves its bitmap word and the place of its first value in shared memory; one 64-bit load brings a
// step's lanes both. Four weights of a lane: their values are consecutive, so 3 aligned 32-bit shared loads hold
// them, and a 16-entry table turns the 4 bitmap bits into byte-permute selectors. No predicate, no branch.
//
// Bytes per weight at density d: 1/8 + 2d + 1/256 read: 1.13 at 0.5 where dense bf16 has 2. About 8
// instructions per weight: on an H200 the limit is issue (predicted 55-70 % of memory bandwidth), on cards
// with less bandwidth per multiprocessor it is memory.
#include "common.cuh"

// ENDOR_COLUMNS: columns of x that the registers hold, 1, 2, 4 or 8. ENDOR_ROW_PAIRS: row pairs per warp.
// ENDOR_HALF: 1 for fp16 weights and x, 0 for bf16. ENDOR_FLOAT_OUT: y is fp32 instead of x's type.
constexpr int COLUMNS = ENDOR_COLUMNS, PAIRS = ENDOR_ROW_PAIRS, ROWS = 2 * PAIRS;
constexpr u32 SEGMENT = 1024;

#if ENDOR_FLOAT_OUT
typedef float Output;
#else
typedef u16 Output;
#endif

struct Product {
  u64 tile_offsets;  // u32[n_tiles + 1]
  u64 bitmap;        // u32[n_tiles * 32]
  u64 values;        // u16[nnz], 16-byte aligned
  u64 x;             // u16[batch][cols], 16-byte aligned
  u64 y;             // Output[batch][rows]
  u64 nnz;
  u32 rows;
  u32 cols;          // multiple of 32
  u32 batch;         // 1 .. COLUMNS
  u32 segment_nnz;   // most stored elements in 1024 columns of one row: sizes the shared slots
};
static_assert(sizeof(Product) == ENDOR_PRODUCT_BYTES, "must match endor.kernels.gpu_plan.PRODUCT");

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

__device__ __forceinline__ u32 warp_sum(u32 v) {
#if defined(ENDOR_EMULATED) || __CUDA_ARCH__ >= 800
  return __reduce_add_sync(FULL_WARP, v);
#else
#pragma unroll
  for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(FULL_WARP, v, step);
  return v;
#endif
}

// Rank of the first stored element at or after weight `flat`, a multiple of 32.
__device__ __forceinline__ u64 rank_of(const Product& p, u64 flat, u32 lane) {
  const u64 tile = flat / TILE;
  const u32 words = static_cast<u32>(flat >> 5) & 31;
  u32 before = 0;
  if (words) before = lane < words ? __popc(__ldg(pointer<u32>(p.bitmap) + tile * 32 + lane)) : 0;
  return __ldg(pointer<u32>(p.tile_offsets) + tile) + (words ? warp_sum(before) : 0);
}

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

// Columns 4L..4L+3 of one row as two registers of two.
//
//   at      byte in `buffers` of the first stored one of them, even
//   entry   their bits, times the 8 bytes of an entry of `table`
__device__ __forceinline__ void gather(const u8* buffers, const u8* table, u32 at, u32 entry, u32& low,
                                       u32& high) {
  const u32* words = reinterpret_cast<const u32*>(buffers + (at & ~3u));
  const u32 odd = at * 8, w0 = words[0], w1 = words[1], w2 = words[2];  // modulo 32: 0 or 16 bits
  const u32 v01 = __funnelshift_r(w0, w1, odd), v23 = __funnelshift_r(w1, w2, odd);
  const uint2 pick = *reinterpret_cast<const uint2*>(table + entry);
  low = permute(v01, 0, pick.x);
  high = permute(v01, v23, pick.x >> 16) & pick.y;
}

// grid     ceil(rows / ROWS); block: 1 to 8 warps, which share out the segments of the rows
// shared   128 + warps * (2 * ROWS * slot + 256 * ROWS + 4 * ROWS * COLUMNS) bytes, slot = 2 * segment_nnz + 32
//          rounded up to 16
extern "C" __global__ void __launch_bounds__(256)
    product(const __grid_constant__ Product p) {
  ENDOR_SHARED(shared);
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const u32 row0 = blockIdx.x * ROWS;
  const u32 capacity = smaller(p.segment_nnz, SEGMENT), slot = (2 * capacity + 32 + 15) / 16 * 16;
  uint2* table = reinterpret_cast<uint2*>(shared);
  u8* buffers = shared + 128 + warp * 2 * ROWS * slot;
  u8* places = shared + 128 + warps * 2 * ROWS * slot + warp * ROWS * 256;
  float* partial = reinterpret_cast<float*>(shared + 128 + warps * ROWS * (2 * slot + 256));
  if (threadIdx.x < 16) table[threadIdx.x] = selectors(threadIdx.x);
  __syncthreads();

  float sum[PAIRS][COLUMNS][4];
#pragma unroll
  for (int i = 0; i < PAIRS; i++)
#pragma unroll
    for (int q = 0; q < COLUMNS; q++)
#pragma unroll
      for (int k = 0; k < 4; k++) sum[i][q][k] = 0.f;

  const u32 segments = (p.cols + SEGMENT - 1) / SEGMENT, share = (segments + warps - 1) / warps;
  const u32 begin = warp * share, end = begin + share < segments ? begin + share : segments;
  if (begin < end) {
    u64 rank[ROWS];                           // of the next element to stage
    u32 word[ROWS], word1[ROWS], word2[ROWS]; // this lane's bitmap word of this and the next segments
    u32 shift[ROWS], shift1[ROWS];
    auto load_word = [&](int i, u32 segment) -> u32 {
      const u32 row = row0 + i, left = (p.cols - segment * SEGMENT) >> 5;
      if (segment >= end || row >= p.rows || lane >= left) return 0;
      const u64 flat = static_cast<u64>(row) * p.cols + static_cast<u64>(segment) * SEGMENT;
      return __ldg(pointer<u32>(p.bitmap) + (flat >> 5) + lane);
    };
    auto stage = [&](int i, u32 bits, u8* half) -> u32 {
      u32 count = warp_sum(__popc(bits));
      const u64 left = rank[i] < p.nnz ? p.nnz - rank[i] : 0;
      if (count > left) count = static_cast<u32>(left);
      if (count > capacity) count = capacity;
      const u32 at = stage_elements<u16>(half + i * slot, p.values, rank[i], count, lane);
      rank[i] += count;
      return at;
    };
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const u64 flat = static_cast<u64>(row0 + i) * p.cols + static_cast<u64>(begin) * SEGMENT;
      rank[i] = row0 + i < p.rows ? rank_of(p, flat, lane) : 0;
      word[i] = load_word(i, begin);
      word1[i] = load_word(i, begin + 1);
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) shift[i] = stage(i, word[i], buffers);
    copy_commit();

    for (u32 segment = begin; segment < end; segment++) {
      const u32 parity = (segment - begin) & 1;
      const u32 staged = parity * ROWS * slot;
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        word2[i] = load_word(i, segment + 2);
        shift1[i] = stage(i, word1[i], buffers + (parity ^ 1) * ROWS * slot);
      }
      copy_commit();
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const u32 before = exclusive_sum(__popc(word[i]), lane) + shift[i];
        stage8(staged_address(places + 256 * i + 8 * lane), word[i], staged + i * slot + 2 * before);
      }
      copy_wait<1>();  // this segment is here, the next one may still travel
      __syncwarp();
      const u32 steps = smaller((p.cols - segment * SEGMENT + 127) >> 7, 8);
#pragma unroll 2
      for (u32 j = 0; j < steps; j++) {
        const u32 col = segment * SEGMENT + j * 128 + lane * 4;
        u32 b[COLUMNS][2];
#pragma unroll
        for (int q = 0; q < COLUMNS; q++) {
          b[q][0] = b[q][1] = 0;
          if (col < p.cols && q < p.batch) {
            const uint2 v = __ldg(pointer<uint2>(p.x + 2 * (static_cast<u64>(q) * p.cols + col)));
            b[q][0] = v.x, b[q][1] = v.y;
          }
        }
        const u32 owner = j * 4 + (lane >> 3), bit = (lane & 7) * 4;
        const u32 below = (1u << bit) - 1u, turn = (bit + 29) & 31;
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
          u32 a[4];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int i = 2 * pair + h;
            const uint2 held = *reinterpret_cast<const uint2*>(places + 256 * i + 8 * owner);
            const u32 at = held.y + 2 * __popc(held.x & below);
            const u32 entry = __funnelshift_r(held.x, held.x, turn) & 0x78u;
            gather(buffers, shared, at, entry, a[h], a[2 + h]);
          }
#pragma unroll
          for (int q = 0; q < COLUMNS; q++) {
#if ENDOR_TENSOR_CORES
            multiply(sum[pair][q], a, b[q]);
#else
#pragma unroll
            for (int h = 0; h < 2; h++)
              sum[pair][q][h] += widen(a[h] & 0xffffu) * widen(b[q][0] & 0xffffu) +
                                 widen(a[h] >> 16) * widen(b[q][0] >> 16) +
                                 widen(a[2 + h] & 0xffffu) * widen(b[q][1] & 0xffffu) +
                                 widen(a[2 + h] >> 16) * widen(b[q][1] >> 16);
#endif
          }
        }
      }
      __syncwarp();  // all lanes have read the slots that the next round overwrites
#pragma unroll
      for (int i = 0; i < ROWS; i++) word[i] = word1[i], word1[i] = word2[i], shift[i] = shift1[i];
    }
  }

#pragma unroll
  for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
    for (int q = 0; q < COLUMNS; q++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float v = sum[pair][q][h];
#if ENDOR_TENSOR_CORES
        // C[g][g] of row h lies in lane (g, g / 2), register 2h + g % 2.
        const u32 g = lane >> 2;
        v = (lane & 3) == g >> 1 ? (g & 1 ? sum[pair][q][2 * h + 1] : sum[pair][q][2 * h]) : 0.f;
#endif
#pragma unroll
        for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(FULL_WARP, v, step);
        if (lane == 0) partial[(warp * ROWS + 2 * pair + h) * COLUMNS + q] = v;
      }
  __syncthreads();
  for (u32 i = threadIdx.x; i < ROWS * COLUMNS; i += blockDim.x) {
    const u32 row = row0 + i / COLUMNS, q = i % COLUMNS;
    float total = 0.f;
    for (u32 w = 0; w < warps; w++) total += partial[w * ROWS * COLUMNS + i];
    if (row < p.rows && q < p.batch)
      store(reinterpret_cast<Output*>(p.y) + static_cast<u64>(q) * p.rows + row, total);
  }
}
