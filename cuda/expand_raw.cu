// Codec `raw` to dense: bitmap and stored elements in, row-major weights out.
//
//   tile_offsets  u32   .--- 2 words per warp ---.
//   bitmap        u32   | 32 words, one per lane |   128 B, one coalesced load
//   values        E     |xx|------ nnz ------|xx |   16-byte vectors into the warp's own shared slot
//   out           E     [ 1024 weights ]             16-byte vectors, 512 B per warp and step
//
// Bytes per weight at density d with elements of S bytes: 1/8 + dS + 1/256 read, S written; bf16 at
// 0.5: 1.13 + 2. About 12 instructions per weight, so memory is the limit on every card from sm_80.
//
// Why a warp per tile: everything stays inside the warp (no __syncthreads), the slot is private, and
// a tile's values, 1 KB at 0.5, are enough in flight per warp that 48 or more warps a multiprocessor
// cover the latency of two dependent loads (offset, values).
//
// Why staging: read straight from global memory, each lane's elements lie at data-dependent
// addresses; staged, global memory sees only full vectors.
#include "common.cuh"

#if ENDOR_ITEM_BYTES == 1
typedef u8 Element;
#elif ENDOR_ITEM_BYTES == 2
typedef u16 Element;
#elif ENDOR_ITEM_BYTES == 4
typedef u32 Element;
#else
#error "ENDOR_ITEM_BYTES must be 1, 2 or 4"
#endif

// batch    tensors of one element size, `raw`, none of them empty
// grid     ceil(n_units / warps per block) blocks of whole warps
// shared   warps per block * (1024 * ENDOR_ITEM_BYTES + STAGING_SLACK) bytes
extern "C" __global__ void __launch_bounds__(256)
    expand_raw(const __grid_constant__ Batch batch) {
  ENDOR_SHARED(shared);
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u64 tile = static_cast<u64>(blockIdx.x) * (blockDim.x >> 5) + warp;
  if (tile >= batch.n_units) return;  // a whole warp leaves
  const Tensor& t = find_tensor(batch, tile);
  u8* slot = shared + warp * (TILE * sizeof(Element) + STAGING_SLACK);

  const u32 word = __ldg(pointer<u32>(t.bitmap) + tile * 32 + lane);
  const Range range = stored_range(t, tile);
  const u32 shift = stage_elements<Element>(slot, t.values, range.first, range.count, lane);
  copy_commit();
  const u32 before = exclusive_sum(__popc(word), lane);  // while the values travel
  copy_wait<0>();
  __syncwarp();
  expand_tile<Element>(staged_address(slot) + shift * static_cast<u32>(sizeof(Element)), word, before,
                       t, tile, lane);
}
