// Codec `exp` to dense: exponent codes in bit planes, the rest in byte and bit planes, patches
// (`exp_chunk.cuh` has the layout of a chunk, 8 stored elements).
//
// One block per group of 8 tiles, whose stored elements follow one another and share their patches:
//   1. one lane per chunk: load, decode. With a bitmap the elements go to the block's shared memory;
//      without one they are stored at once;
//   2. all lanes share out the group's patches, in shared memory by rank, or in place;
//   3. with a bitmap, each warp expands its tile as `raw` does.
//
// Why not a warp per tile: half of 1024 weights are 65 chunks and not 64 as often as not, a third round
// for one lane of 32; and each of the 8 warps would walk all of the group's patches.
//
// Bytes per weight at density d for bf16 (B = 1, P = k): 1/8 + d(1 + k/8) + 1/256 read, 2 written: 0.81
// + 2 at 0.5 and k = 3.
//
// Why not fused (decode while expanding): then every weight pays for the code, not every stored
// element, and the plane bits of a lane's 8 weights start at any bit.
#include "common.cuh"
#include "exp_chunk.cuh"

// Chunks of a lane whose loads are in flight together: two are a group at density 0.5.
constexpr u32 AHEAD = S == 4 ? 1 : 2;
constexpr u32 THREADS = 32 * GROUP_TILES;

__device__ __forceinline__ void put_global(const Tensor& t, u64 chunk, const u32* words) {
  Element* out = reinterpret_cast<Element*>(t.out) + 8 * chunk;
  if (8 * chunk + 8 <= t.numel) {
    if constexpr (WORDS == 2) {
      store8(out, words[0], words[1]);
    } else {
#pragma unroll
      for (u32 i = 0; i < WORDS; i += 4)
        store16(out + PER_WORD * i, quad(words[i], words[i + 1], words[i + 2], words[i + 3]));
    }
    return;
  }
  for (u32 i = 0; 8 * chunk + i < t.numel; i++)
    store_element(out + i, static_cast<Element>(words[i / PER_WORD] >> (8 * S * (i % PER_WORD))));
}

// Give the group's patched elements their true exponent; `elements[0]` is its first stored one of `count`.
__device__ __forceinline__ void patch(const Tensor& t, u64 group, u32 count, Element* elements) {
  PatchList list;
  list.find(t, group);
#pragma unroll 1
  for (u32 i = threadIdx.x; i < list.count; i += THREADS) {
    const u32 rank = __ldg(list.ranks + i);
    if (rank < count) put_exponent(elements + rank, __ldg(list.exponents + i));
  }
}

template <u32 P, bool BITMAP>
__device__ __forceinline__ void expand(const Tensor& t, u64 group, u8* shared, u32 warp, u32 lane) {
  const u64 tile = group * GROUP_TILES + warp, n_tiles = (t.numel + TILE - 1) / TILE;
  const bool mine = tile < n_tiles;
  u32 word = 0, ahead = 0;  // stored elements of the group before this warp's tile
  u64 first = group * ENDOR_GROUP;
  u32 count = smaller(t.numel - first, ENDOR_GROUP);
  if constexpr (BITMAP) {
    const u32* offsets = pointer<u32>(t.tile_offsets) + group * GROUP_TILES;
    const u64 tiles = n_tiles - group * GROUP_TILES;
    first = __ldg(offsets);
    u64 end = __ldg(offsets + smaller(tiles, GROUP_TILES));
    if (end > t.nnz) end = t.nnz;
    if (first > end) first = end;
    count = smaller(end - first, ENDOR_GROUP);
    if (mine) {
      word = __ldg(pointer<u32>(t.bitmap) + tile * 32 + lane);
      const u64 begin = __ldg(offsets + warp);
      ahead = begin < first ? 0 : smaller(begin - first, warp * TILE);
    }
  }
  const u64 first_chunk = first >> 3;
  const u32 shift = static_cast<u32>(first & 7), chunks = count ? (shift + count + 7) >> 3 : 0;
  const Staged place = BITMAP ? staged_address(shared) : Staged();
  const Window<P> window(t.base);
  for (u32 done = 32 * warp; done < chunks; done += THREADS * AHEAD) {
    Chunk<P> loaded[AHEAD];
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
      const u32 chunk = done + THREADS * a + lane;
      if (chunk < chunks) loaded[a].load(t, first_chunk + chunk);
    }
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
      const u32 chunk = done + THREADS * a + lane;
      if (chunk >= chunks) continue;
      u32 words[WORDS];
      loaded[a].decode(window, words);
      if constexpr (BITMAP)
        put_shared(place, chunk, words);
      else
        put_global(t, first_chunk + chunk, words);
    }
  }

  if constexpr (BITMAP) {
    const u32 before = exclusive_sum(__popc(word), lane);
    __syncthreads();
    if (t.patch_offsets) {
      patch(t, group, count, reinterpret_cast<Element*>(shared) + shift);
      __syncthreads();
    }
    if (mine) expand_tile<Element>(place + (shift + ahead) * S, word, before, t, tile, lane);
  } else if (t.patch_offsets) {
    __syncthreads();  // orders the block's own stores before the patches
    patch(t, group, count, reinterpret_cast<Element*>(t.out) + first);
  }
}

// Instantiated for the plane counts of one launch only: bit P of ENDOR_PLANES is set where a tensor of
// the batch has P bit planes.
template <u32 P, bool BITMAP>
__device__ __forceinline__ void dispatch(const Tensor& t, u64 group, u8* shared, u32 warp, u32 lane) {
  if constexpr (P <= 8) {
    if constexpr ((ENDOR_PLANES >> P) & 1) {
      if ((ENDOR_PLANES == 1u << P) || t.n_planes == P)
        return expand<P, BITMAP>(t, group, shared, warp, lane);
    }
    dispatch<P + 1, BITMAP>(t, group, shared, warp, lane);
  }
}

// batch    tensors of one dtype, `exp`, none of them empty, all with or all without a bitmap; units are groups
// grid     n_units blocks of 8 warps
// shared   with a bitmap: 8 * (1024 * ENDOR_ITEM_BYTES + STAGING_SLACK) bytes, else none
extern "C" __global__ void __launch_bounds__(256)
    expand_exp(const __grid_constant__ Batch batch) {
  ENDOR_SHARED(shared);
  u64 group = blockIdx.x;
  const Tensor& t = find_tensor(batch, group);
  dispatch<1, ENDOR_BITMAP != 0>(t, group, shared, threadIdx.x >> 5, threadIdx.x & 31);
}
