// What the kernels share: the argument layout, staging, and the expansion of one tile.
//
// A tile is 1024 weights in flat row-major order; one warp owns one tile. Lane L holds bitmap word L
// (weights 32L .. 32L+31, bit i = weight 32L+i, 1 = stored). The stored elements of the tile lie in
// shared memory in bitmap order, so weight w of the tile is
//
//     bit set  ->  staged[shift + popcount of all bitmap bits below w]
//     bit clear ->  0
//
// Constants come from Python (`endor.kernels.gpu_build`) by -D, so that the format has one source.
// Sizes and addresses are 64-bit: a tensor may hold 2^40 weights.
//
// Safe for any content: offsets are clamped to the array and to the tile before they are used, and a
// staged slot is large enough for 1024 elements whatever the offsets and the bitmap say. Wrong bytes
// give wrong weights, never an access outside the arrays (plus the 128 bytes that follow them).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if !defined(ENDOR_TILE) || !defined(ENDOR_GROUP) || !defined(ENDOR_MAX_TENSORS)
#error "compile through endor.kernels.gpu_build, which defines the format's constants"
#endif

#ifndef ENDOR_EMULATED
// Dynamic shared memory of the block, 16-byte aligned.
#define ENDOR_SHARED(name) extern __shared__ __align__(16) u8 name[]
#endif

static_assert(ENDOR_TILE == 1024, "one warp decodes 32 bitmap words");
static_assert(ENDOR_GROUP == 8 * ENDOR_TILE, "patch groups are 8 tiles");

constexpr u32 TILE = ENDOR_TILE;
constexpr u32 GROUP_TILES = ENDOR_GROUP / ENDOR_TILE;
constexpr u32 FULL_WARP = 0xffffffffu;
// Bytes that staging may add to the 1024 elements of a tile: the distance to the alignment below the
// first one and above the last one.
constexpr u32 STAGING_SLACK = 32;

// One packed tensor. Addresses are device addresses, `out` a multiple of 16, all others of 8.
struct Tensor {
  u64 out;              // dense destination, numel elements
  u64 tile_offsets;     // u32[n_tiles + 1]: stored elements before each tile; 0 without a bitmap
  u64 bitmap;           // u32[n_tiles * 32]; 0 without a bitmap
  u64 values;           // raw: nnz elements; exp: u8[B][nnz] byte planes; 0 where B = 0
  u64 planes;           // exp: u8[P][plane_nbytes] bit planes
  u64 patch_offsets;    // exp: u32[n_groups + 1]; 0 without patches
  u64 patch_ranks;      // exp: u16[patches]
  u64 patch_exponents;  // exp: u8[patches]
  u64 numel;
  u64 nnz;
  u64 plane_nbytes;
  u64 first_unit;       // units (tiles; in `exp`, groups of 8) of the tensors before this one in the batch
  u64 patches;
  u32 n_planes;         // P
  u32 base;             // first exponent of the window
};
static_assert(sizeof(Tensor) == ENDOR_TENSOR_BYTES, "must match endor.kernels.gpu_build.TENSOR");

// All tensors of one launch, passed by value: no device copy to keep alive, and a captured graph
// holds its own.
struct Batch {
  u64 n_units;
  u32 count;
  u32 unused;
  Tensor tensors[ENDOR_MAX_TENSORS];
};

template <typename T>
__device__ __forceinline__ const T* pointer(u64 address) {
  return reinterpret_cast<const T*>(address);
}

__device__ __forceinline__ u32 smaller(u64 a, u64 b) { return static_cast<u32>(a < b ? a : b); }

// The tensor that owns unit `unit` of the batch; `unit` becomes an index inside it.
__device__ __forceinline__ const Tensor& find_tensor(const Batch& batch, u64& unit) {
  u32 i = 0;
  while (i + 1 < batch.count && unit >= batch.tensors[i + 1].first_unit) i++;
  unit -= batch.tensors[i].first_unit;
  return batch.tensors[i];
}

// Ranks [first, first + count) of the stored elements of a tile, clamped to what can be true.
struct Range {
  u64 first;
  u32 count;
};

__device__ __forceinline__ Range stored_range(const Tensor& t, u64 tile) {
  const u32* offsets = pointer<u32>(t.tile_offsets) + tile;
  u64 begin = __ldg(offsets), end = __ldg(offsets + 1);
  if (end > t.nnz) end = t.nnz;
  if (begin > end) begin = end;
  return Range{begin, smaller(end - begin, TILE)};
}

// Sum of `count` over the lanes below this one.
__device__ __forceinline__ u32 exclusive_sum(u32 count, u32 lane) {
  u32 sum = count;
#pragma unroll
  for (u32 step = 1; step < 32; step <<= 1) {
    u32 below = __shfl_up_sync(FULL_WARP, sum, step);
    if (lane >= step) sum += below;
  }
  return sum - count;
}

#ifndef ENDOR_EMULATED
// 16 bytes from global to shared memory. From sm_80 on the bytes travel beside the registers and are
// there after copy_wait; `cg` keeps streamed weights out of L1, and the 128-byte hint lets L2 fetch
// whole lines for a warp whose lanes read neighbouring vectors.
__device__ __forceinline__ void copy16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(global)
               : "memory");
#else
  *static_cast<uint4*>(shared) = __ldg(static_cast<const uint4*>(global));
#endif
}

// The hardware's own permute, where bit 3 of a selector repeats the byte's sign; __byte_perm masks it away.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// Shared memory by its 32-bit address. Through a generic pointer the compiler works out the shared
// window again for every predicated load, three times the instructions of the whole expansion; the
// opaque move keeps it from doing so here.
typedef u32 Staged;
__device__ __forceinline__ Staged staged_address(const void* shared) {
  u32 address = static_cast<u32>(__cvta_generic_to_shared(shared)), opaque;
  asm volatile("mov.u32 %0, %1;" : "=r"(opaque) : "r"(address));
  return opaque;
}

// The same address kept in a word of shared memory, and back.
__device__ __forceinline__ u32 kept(Staged at) { return at; }
__device__ __forceinline__ Staged staged(u32 kept_address) { return kept_address; }

// 4 or 8 bytes of shared memory, OFFSET bytes after an aligned address.
template <int OFFSET = 0>
__device__ __forceinline__ u32 fetch4(Staged at) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(word) : "r"(at), "n"(OFFSET));
  return word;
}
__device__ __forceinline__ uint2 fetch8(Staged at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}

// The element at `at`, which moves on to the next one, if `bit`; else zero, and `at` stays.
template <int BYTES>
__device__ __forceinline__ u32 take(Staged& at, u32 bit) {
  u32 element;
  if constexpr (BYTES == 1)
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0;"
                 " @p ld.shared.u8 %0, [%1]; @p add.u32 %1, %1, 1; }"
                 : "=&r"(element), "+r"(at) : "r"(bit));
  else if constexpr (BYTES == 2)
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0;"
                 " @p ld.shared.u16 %0, [%1]; @p add.u32 %1, %1, 2; }"
                 : "=&r"(element), "+r"(at) : "r"(bit));
  else
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0;"
                 " @p ld.shared.u32 %0, [%1]; @p add.u32 %1, %1, 4; }"
                 : "=&r"(element), "+r"(at) : "r"(bit));
  return element;
}

template <typename E>
__device__ __forceinline__ void store_element(E* at, E element) { *at = element; }

// One 16-byte store; a struct assignment may become four.
__device__ __forceinline__ void store16(void* global, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store8(void* global, u32 x, u32 y) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(global), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void stage16(Staged at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void stage8(Staged at, u32 x, u32 y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}

// Close the group of copies issued since the last call.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most `PENDING` groups of this thread are on their way. Other lanes' copies are visible
// only after the __syncwarp that must follow.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
#endif

// Copy elements [first, first + count) into `slot`, in whole 16-byte vectors, and return the index
// inside the slot of the first one. Reads at most 15 bytes on either side of the range.
template <typename E>
__device__ __forceinline__ u32 stage_elements(u8* slot, u64 values, u64 first, u32 count, u32 lane) {
  u64 begin = values + first * sizeof(E), aligned = begin & ~static_cast<u64>(15);
  u32 head = static_cast<u32>(begin - aligned);
  u32 vectors = count ? (head + count * static_cast<u32>(sizeof(E)) + 15) / 16 : 0;
  for (u32 i = lane; i < vectors; i += 32) copy16(slot + 16 * i, pointer<u8>(aligned) + 16 * i);
  return head / static_cast<u32>(sizeof(E));
}

__device__ __forceinline__ uint4 quad(u32 x, u32 y, u32 z, u32 w) {
  uint4 v;
  v.x = x, v.y = y, v.z = z, v.w = w;
  return v;
}

// A register of output from its elements, the first one lowest.
template <int BYTES>
__device__ __forceinline__ u32 join(const u32* e) {
  if constexpr (BYTES == 1)
    return __byte_perm(__byte_perm(e[0], e[1], 0x0040), __byte_perm(e[2], e[3], 0x0040), 0x5410);
  else if constexpr (BYTES == 2)
    return __byte_perm(e[0], e[1], 0x5410);
  else
    return e[0];
}

// Write the 1024 weights of a tile: lane L, step j writes the 16-byte vector j*32+L, so a warp stores
// 512 contiguous bytes at a time. Two shuffles bring the bitmap word of that vector and the number of
// stored elements before the word; a popcount gives those before the vector. No branch depends on
// the data: at most `lanes_per_vector` predicated shared loads, then one store.
//
//   staged   shared address of the tile's first stored element
//   word     this lane's bitmap word, zero bits past the end of the tensor
//   before   stored elements of the tile below this lane's word
template <typename E>
__device__ __forceinline__ void expand_tile(Staged staged, u32 word, u32 before, const Tensor& t,
                                            u64 tile, u32 lane) {
  constexpr int BYTES = sizeof(E);
  constexpr u32 VECTOR = 16 / BYTES, STEPS = TILE / (32 * VECTOR), PER_REGISTER = 4 / BYTES;
  const u64 start = tile * TILE;
  const bool whole = start + TILE <= t.numel;  // the same for all lanes
  E* out = reinterpret_cast<E*>(t.out) + start;
#pragma unroll
  for (u32 j = 0; j < STEPS; j++) {
    const u32 first = (j * 32 + lane) * VECTOR, owner = first >> 5, bit = first & 31;
    u32 bits = __shfl_sync(FULL_WARP, word, owner);
    const u32 rank = __shfl_sync(FULL_WARP, before, owner) + __popc(bits & ((1u << bit) - 1u));
    Staged at = staged + rank * BYTES;
    bits >>= bit;
    u32 element[VECTOR];
#pragma unroll
    for (u32 i = 0; i < VECTOR; i++) element[i] = take<BYTES>(at, bits & (1u << i));
    if (whole || start + first + VECTOR <= t.numel) {
      store16(out + first, quad(join<BYTES>(element), join<BYTES>(element + PER_REGISTER),
                                join<BYTES>(element + 2 * PER_REGISTER),
                                join<BYTES>(element + 3 * PER_REGISTER)));
    } else {
      for (u32 i = 0; i < VECTOR; i++)
        if (start + first + i < t.numel) store_element(out + first + i, static_cast<E>(element[i]));
    }
  }
}
