// Codec `int` to dense: 32 range-ANS coders of a chunk share one stream of words; codes times steps.
//
//   chunk   32768 elements: row 0 is elements 0..31, one of each lane, row 1 the next 32, ...
//   words   |w w w|w w w w|w w| ...   after each row the lanes whose state fell below 2^16 take one
//                                     each, in the order of lanes: a ballot and a popcount say which
//
//   table   u32[4096]: symbol (8 bits) | slot - start (12) | frequency (12), for the block's tensor
//   ring    1024 words of the warp's own, filled by 16-byte copies 64 to 96 vectors ahead
//
// A warp decodes a chunk; the warps of a block share the table, so a block has chunks of one tensor. One
// row is a chain of two shared loads and a ballot, about 100 cycles: what hides it is other warps, so a
// launch takes all tensors of a record. The words pass through shared memory because a row begins at
// any word, and because a load from global memory would lie in that chain.
//
// Bytes per weight: the stored ones (3.5 bits a weight: 0.44) read, 2 or 4 written; a step is read from L1.
#include "common.cuh"

static_assert(ENDOR_LANES == 32, "a warp decodes a chunk");
constexpr u32 CHUNK = ENDOR_CHUNK, SLOTS = ENDOR_SCALE, SLOT_BITS = ENDOR_SCALE_BITS;
constexpr u32 LOWEST = ENDOR_LOWEST;
static_assert(SLOTS == 1u << SLOT_BITS && SLOT_BITS == 12, "an entry of the table has 12 bits for each");

constexpr u32 SYMBOLS = 256;
constexpr u32 RING = 1024, RING_VECTORS = RING / 8;
// Rows between two looks at the ring: they take at most 256 words, 32 vectors.
constexpr u32 ROWS = 8;
constexpr u32 AHEAD = RING_VECTORS - 32;
static_assert(4 * SLOTS % (2 * RING) == 0, "rings lie at multiples of their size");

// ENDOR_LOW_BITS: 1 where codes have low bits beside their symbols.
// ENDOR_LEVELS: 1 where symbols stand for levels instead of codes.
// ENDOR_VALUE and ENDOR_STEP: type of the elements and of the stored steps, 0 bf16, 1 fp16, 2 fp32.
#if ENDOR_VALUE == 2
typedef u32 Element;
#else
typedef u16 Element;
#endif
#if ENDOR_STEP == 2
typedef u32 Stored;
#else
typedef u16 Stored;
#endif

// One packed tensor. Addresses are device addresses, `words` a multiple of 16.
struct IntTensor {
  u64 out;              // dense destination, numel elements
  u64 steps;            // Stored[ceil(rows / block_rows)][step_cols]
  u64 frequencies;      // u16[symbols], sum 4096
  u64 levels;           // float[symbols]; 0 where ENDOR_LEVELS is not set
  u64 chunk_offsets;    // u32[n_chunks + 1]: words before each chunk
  u64 states;           // u32[n_chunks][32]
  u64 words;            // u16[n_words]
  u64 low_bits;         // `shift` bits of each element; 0 where shift = 0
  u64 patch_offsets;    // u32[n_chunks + 1]; 0 without patches
  u64 patch_ranks;      // u16[patches]
  u64 patch_codes;      // s32[patches]
  u64 numel;
  u64 n_words;
  u64 patches;
  u64 first_block;      // blocks of the tensors before this one in the batch
  u32 cols;             // below 2^31
  u32 step_cols;        // 1: one step for all columns
  u32 block_rows;       // rows that share a step; any number above 2^31 where all rows do
  u32 block_cols;       // columns that share a step
  u32 symbols;          // 2 .. 256
  u32 shift;            // 0 .. 8
  int base;             // code of symbol 0, before the shift
  float scale;          // steps are stored * scale * scale_too: two powers of 2, since one may not
  float scale_too;      // be a float (1 where ENDOR_FAR_STEPS is not set)
  u32 unused;
};
static_assert(sizeof(IntTensor) == ENDOR_INT_TENSOR_BYTES, "must match endor.kernels.gpu_int.TENSOR");

struct IntBatch {
  u32 count;
  u32 unused;
  IntTensor tensors[ENDOR_MAX_TENSORS];
};

#ifndef ENDOR_EMULATED
__device__ __forceinline__ float half_to_float(u16 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
// A number whose origin the compiler forgets: what every weight needs stays in a register, where the
// compiler would rather read the kernel's argument again for each weight.
__device__ __forceinline__ u32 keep(u32 value) {
  u32 kept;
  asm volatile("mov.u32 %0, %1;" : "=r"(kept) : "r"(value));
  return kept;
}
__device__ __forceinline__ u64 keep(u64 value) {
  u64 kept;
  asm volatile("mov.u64 %0, %1;" : "=l"(kept) : "l"(value));
  return kept;
}
__device__ __forceinline__ u16 float_to_half(float f) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
__device__ __forceinline__ u16 float_to_bf16(float f) {
#if __CUDA_ARCH__ >= 800
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
#else
  const u32 u = __float_as_uint(f);  // never NaN: a code is finite, a step too
  return static_cast<u16>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
#endif
}
#endif

__device__ __forceinline__ Element element(float value) {
#if ENDOR_VALUE == 0
  return float_to_bf16(value);
#elif ENDOR_VALUE == 1
  return float_to_half(value);
#else
  return __float_as_uint(value);
#endif
}

// What turns a symbol into an element.
struct Values {
  u64 steps, low_bits, levels;
  u32 cols, step_cols, block_rows, block_cols, shift, base;
  float scale, scale_too;
  float first;  // `base`, as the codes of symbols without low bits count from it

  __device__ __forceinline__ explicit Values(const IntTensor& t)
      : steps(keep(t.steps)), low_bits(t.low_bits), levels(t.levels), cols(keep(t.cols)), step_cols(t.step_cols),
        block_rows(t.block_rows), block_cols(t.block_cols), shift(t.shift),
        base(keep(static_cast<u32>(t.base))),
        scale(__uint_as_float(keep(__float_as_uint(t.scale)))), scale_too(t.scale_too),
        first(__uint_as_float(keep(__float_as_uint(static_cast<float>(t.base))))) {}

  __device__ __forceinline__ float step(u64 index) const {
    const Stored bits = __ldg(pointer<Stored>(steps) + index);
#if ENDOR_STEP == 0
    return __uint_as_float(static_cast<u32>(bits) << 16);
#elif ENDOR_STEP == 1
    const float near = half_to_float(bits) * scale;
    return ENDOR_FAR_STEPS ? near * scale_too : near;
#else
    return __uint_as_float(bits);
#endif
  }
};

// Where an element stands among the steps. `next` moves on by 32 elements.
//
// ENDOR_COLUMN_STEPS: one step a column, at least 32 columns.
struct Place {
  u32 col;
#if !ENDOR_COLUMN_STEPS
  u32 within, block;  // col within its block of columns; the block
  u32 row;            // row within its block of rows
  u64 first;          // index of the first step of the block of rows
#endif

  __device__ __forceinline__ void at(const Values& v, u64 i) {
    const u64 r = i / v.cols;
    col = static_cast<u32>(i - r * v.cols);
#if !ENDOR_COLUMN_STEPS
    columns(v);
    const u64 above = r / v.block_rows;
    row = static_cast<u32>(r - above * v.block_rows);
    first = above * v.step_cols;
#endif
  }
  __device__ __forceinline__ u64 index() const {
#if ENDOR_COLUMN_STEPS
    return col;
#else
    return first + block;
#endif
  }
  __device__ __forceinline__ void next(const Values& v) {
    col += 32;
#if ENDOR_COLUMN_STEPS
    if (col >= v.cols) col -= v.cols;
#else
    within += 32;
    if (col >= v.cols) {
      do {
        col -= v.cols;
        if (++row == v.block_rows) row = 0, first += v.step_cols;
      } while (col >= v.cols);
      columns(v);
    } else if (within >= v.block_cols) {
      if (v.block_cols >= 32)
        within -= v.block_cols, block++;
      else
        columns(v);
    }
#endif
  }
#if !ENDOR_COLUMN_STEPS
  __device__ __forceinline__ void columns(const Values& v) {
    block = col / v.block_cols;
    within = col - block * v.block_cols;
  }
#endif
};

// The decoder's table in shared memory, by all threads of the block. `start` is room for 257 numbers.
__device__ __forceinline__ void build_table(const IntTensor& t, u32* table, u32* start) {
  const u32 lane = threadIdx.x & 31;
  if (threadIdx.x < 32) {
    u32 before = 0;
    for (u32 symbol = lane; symbol < SYMBOLS; symbol += 32) {
      const u32 count = symbol < t.symbols ? __ldg(pointer<u16>(t.frequencies) + symbol) : 0;
      const u32 at = before + exclusive_sum(count, lane);
      store_element(start + symbol, at);
      before = __shfl_sync(FULL_WARP, at + count, 31);
    }
    if (lane == 0) store_element(start + SYMBOLS, before);
  }
  __syncthreads();
  for (u32 slot = threadIdx.x; slot < SLOTS; slot += blockDim.x) {
    u32 symbol = 0;  // the last one that starts at or before the slot
#pragma unroll
    for (u32 half = SYMBOLS / 2; half; half >>= 1)
      if (start[symbol + half] <= slot) symbol += half;
    const u32 first = start[symbol], frequency = start[symbol + 1] - first;
    store_element(table + slot, frequency << 20 | ((slot - first) & (SLOTS - 1)) << 8 | symbol);
  }
  __syncthreads();
}

// The decoders of one chunk: one lane's state, and the words that the lanes share.
struct Decoder {
  const u8* shared;
  u32 ring;      // its offset in shared memory, a multiple of its size
  u32 x;
  u32 position;  // of the next word, in bytes from the 16-byte vector of the chunk's first one
  u32 below;     // lanes below this one

  __device__ __forceinline__ u32 symbol() {
    const u32 entry = *reinterpret_cast<const u32*>(shared + (x << 2 & 4 * (SLOTS - 1)));
    x = (entry >> 20) * (x >> SLOT_BITS) + (entry >> 8 & (SLOTS - 1));
    const bool takes = x < LOWEST;
    const u32 takers = __ballot_sync(FULL_WARP, takes);
    if (takes) {
      const u32 at = ((position + 2 * __popc(takers & below)) & (2 * RING - 1)) | ring;
      x = x << 16 | *reinterpret_cast<const u16*>(shared + at);
    }
    position += 2 * __popc(takers);
    return entry & 255u;
  }
};

// `shift` low bits of the element of this lane in row `row` of the tensor (32 elements).
__device__ __forceinline__ u32 low_bits(const Values& v, u64 row, u32 lane) {
  const u32* words = pointer<u32>(v.low_bits) + row * v.shift;
  const u32 bit = lane * v.shift, at = bit >> 5;
  const u32 low = __ldg(words + at), high = __ldg(words + (at + 1 < v.shift ? at + 1 : at));
  return __funnelshift_r(low, high, bit & 31) & ((1u << v.shift) - 1u);
}

__device__ __forceinline__ Element value_of(const Values& v, u32 symbol, u64 row, u32 lane,
                                            const Place& place) {
#if ENDOR_LEVELS
  return element(__uint_as_float(__ldg(pointer<u32>(v.levels) + symbol)) * v.step(place.index()));
#endif
#if ENDOR_LOW_BITS
  const u32 code = (v.base + symbol) << v.shift | low_bits(v, row, lane);
  const float number = static_cast<float>(static_cast<int>(code));
#else
  const float number = v.first + static_cast<float>(symbol);  // exact: both and their sum are below 2^24
#endif
  return element(number * v.step(place.index()));
}

// Elements whose codes no word gives.
__device__ __forceinline__ void patch(const IntTensor& t, const Values& v, u64 chunk, u32 count,
                                      u32 lane) {
  const u32* offsets = pointer<u32>(t.patch_offsets) + chunk;
  const u32 end = smaller(__ldg(offsets + 1), t.patches);
  for (u64 i = static_cast<u64>(__ldg(offsets)) + lane; i < end; i += 32) {
    const u32 rank = __ldg(pointer<u16>(t.patch_ranks) + i);
    if (rank >= count) continue;
    const int code = static_cast<int>(__ldg(pointer<u32>(t.patch_codes) + i));
    Place place;
    place.at(v, chunk * CHUNK + rank);
    store_element(reinterpret_cast<Element*>(t.out) + chunk * CHUNK + rank,
                  element(static_cast<float>(code) * v.step(place.index())));
  }
}

// batch    tensors of one value and step type, none of them empty
// grid     the sum over the tensors of ceil(n_chunks / warps per block); blocks of whole warps, at least 1
// shared   4 * SLOTS bytes, 2 * RING bytes per warp, 1040 bytes (257 starts)
extern "C" __global__ void __launch_bounds__(256)
    expand_int(const __grid_constant__ IntBatch batch) {
  ENDOR_SHARED(shared);
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  u32 which = 0;
  while (which + 1 < batch.count && blockIdx.x >= batch.tensors[which + 1].first_block) which++;
  const IntTensor& t = batch.tensors[which];
  u32* table = reinterpret_cast<u32*>(shared);
  build_table(t, table, table + SLOTS + warps * (2 * RING / 4));

  const u64 chunk = (blockIdx.x - t.first_block) * warps + warp, first = chunk * CHUNK;
  if (first >= t.numel) return;  // a whole warp leaves
  const u32 count = smaller(t.numel - first, CHUNK);
  const u32 ring = 4 * SLOTS + warp * 2 * RING;
  u64 begin = __ldg(pointer<u32>(t.chunk_offsets) + chunk);
  u64 end = __ldg(pointer<u32>(t.chunk_offsets) + chunk + 1);
  if (end > t.n_words) end = t.n_words;
  if (begin > end) begin = end;
  const u64 origin = begin & ~static_cast<u64>(7);
  const u8* source = pointer<u8>(t.words) + 2 * origin;
  const u32 vectors = (smaller(end - origin, 32 * CHUNK) + 7) >> 3;

  Decoder decoder;
  decoder.shared = shared;
  decoder.ring = ring;
  decoder.x = __ldg(pointer<u32>(t.states) + chunk * 32 + lane);
  decoder.position = 2 * static_cast<u32>(begin - origin);
  decoder.below = (1u << lane) - 1u;
  u32 issued = 0;
  auto fill = [&]() {
    for (; issued < (decoder.position >> 4) + AHEAD; issued += 32) {
      const u32 vector = issued + lane;
      if (vector < vectors) copy16(shared + ring + 16 * (vector & (RING_VECTORS - 1)), source + 16 * vector);
    }
    copy_commit();
  };
  fill();

  const Values values(t);
  Place place;
  place.at(values, first + lane);
  Element* out = reinterpret_cast<Element*>(t.out) + first + lane;
  const u64 first_row = first / 32;
  const u32 rows = (count + 31) >> 5, whole = count / (32 * ROWS) * ROWS;
  for (u32 row = 0; row < rows; row += ROWS) {
    __syncwarp();  // all lanes have read the words that are overwritten now
    fill();
    copy_wait<1>();  // what these rows take came with an earlier group
    __syncwarp();
    if (row < whole) {
#pragma unroll
      for (u32 r = 0; r < ROWS; r++) {
        const u32 symbol = decoder.symbol();
        store_element(out + 32 * r, value_of(values, symbol, first_row + row + r, lane, place));
        place.next(values);
      }
    } else {
      for (u32 r = 0; r < ROWS && row + r < rows; r++) {
        const u32 symbol = decoder.symbol();
        if (32 * (row + r) + lane < count)
          store_element(out + 32 * r, value_of(values, symbol, first_row + row + r, lane, place));
        place.next(values);
      }
    }
    out += 32 * ROWS;
  }
  if (t.patch_offsets) {
    __syncwarp();  // orders the warp's own stores before the patches
    patch(t, values, chunk, count, lane);
  }
}
