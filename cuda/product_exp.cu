// y = W x straight from codec `exp`: a warp decodes a segment's values into its slots, then multiplies them
// (`product.cuh` has the product, `exp_chunk.cuh` the layout of a chunk, 8 stored elements).
//
// The LANES lanes of a row take its chunks in turn. At density 0.5 those are two a lane and one or two more: the lanes
// of the warp share out what is left of all its rows, in one round instead of one for each. Then the patches of the
// groups that a row's segment lies in are put in place by rank.
//
// Nothing travels ahead: a warp's loads wait while others decode, which is most of the work. So a warp has one set
// of slots, and a block half of the shared memory that `raw` takes.
//
// Bytes per weight at density d for bf16: 1/8 + d(1 + k/8) + 1/256 read: 0.81 at 0.5 and k = 3 where dense has 2.
#include "common.cuh"
#include "exp_chunk.cuh"
#include "product.cuh"

struct ExpStaging {
  static constexpr u32 P = ENDOR_BIT_PLANES, BUFFERS = 1, EXTRA = 8 * ROWS;
  static constexpr u32 IN_TURN = 2, LEFT = 32 / ROWS;  // chunks of a lane; lanes of a row for the others
  const Rows rows;
  u8* slots;
  u8* rest;  // of each row: its first chunk and their number
  u32 slot;
  u32 rank[WORDS_A_LANE];  // of the row's next stored element
  u32 next[WORDS_A_LANE];  // words of the next segment
  const Window<P> window;

  __device__ __forceinline__ ExpStaging(const Rows& all, u32 begin, u8* to, u32 bytes, u8* extra)
      : rows(all), slots(to), rest(extra), slot(bytes), window(all.p.base) {
#pragma unroll
    for (int i = 0; i < WORDS_A_LANE; i++) {
      next[i] = rows.word(i, begin);
      rank[i] = rows.rank(i, begin);
    }
  }

  __device__ __forceinline__ void issue(u32 segment, Held& held) {
    u32 count[WORDS_A_LANE], first[WORDS_A_LANE];
#pragma unroll
    for (int i = 0; i < WORDS_A_LANE; i++) {
      held.word[i] = next[i];
      next[i] = rows.word(i, segment + 1);
    }
    held.rank(rows.lane, count);
    const u32 capacity = least(rows.p.capacity, SEGMENT);
    const Staged place = staged_address(slots);
#pragma unroll
    for (int i = 0; i < WORDS_A_LANE; i++) {
      first[i] = least(rank[i], rows.p.nnz);
      count[i] = least(least(count[i], rows.p.nnz - first[i]), capacity);
      rank[i] = first[i] + count[i];
      const u32 at = rows.in_block(i) * slot, shift = first[i] & 7, chunk = first[i] >> 3;
      const u32 chunks = count[i] ? (shift + count[i] + 7) >> 3 : 0;
      held.first[i] = kept(place) + at + 2 * shift;
      if (rows.sub == 0) stage8(staged_address(rest + 8 * rows.in_block(i)), chunk, chunks);
      Chunk<P> loaded[IN_TURN];
#pragma unroll
      for (u32 k = 0; k < IN_TURN; k++)
        if (rows.sub + k * LANES < chunks) loaded[k].load(rows.p, chunk + rows.sub + k * LANES);
#pragma unroll
      for (u32 k = 0; k < IN_TURN; k++)
        if (rows.sub + k * LANES < chunks) decode(loaded[k], place + at, rows.sub + k * LANES);
    }
    __syncwarp();
    const u32 row = rows.lane / LEFT;
    const uint2 others = fetch8(staged_address(rest) + 8 * row);
#pragma unroll 1
    for (u32 k = IN_TURN * LANES + rows.lane % LEFT; k < others.y; k += LEFT) {
      Chunk<P> loaded;
      loaded.load(rows.p, others.x + k);
      decode(loaded, place + row * slot, k);
    }
    if (rows.p.patch_offsets) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < WORDS_A_LANE; i++) {
        Element* elements = reinterpret_cast<Element*>(slots + rows.in_block(i) * slot) + (first[i] & 7);
        patch(rows.flat(i, segment), segment, first[i], count[i], elements);
      }
    }
  }

  __device__ __forceinline__ void decode(const Chunk<P>& chunk, Staged to, u32 at) const {
    u32 words[WORDS];
    chunk.decode(window, words);
    put_shared(to, at, words);
  }

  // Give the patched ones of `count` elements from rank `first` on, weights from `at` on, their true exponent.
  // All lanes call it, those of a row with the same arguments.
  __device__ __forceinline__ void patch(u64 at, u32 segment, u32 first, u32 count, Element* elements) const {
    const u64 last = (at + least(rows.p.cols - segment * SEGMENT, SEGMENT) - 1) / ENDOR_GROUP;
    patch_group(at / ENDOR_GROUP, count != 0, first, count, elements);
    const bool more = count && last != at / ENDOR_GROUP;
    if (LANES == 32 ? more : __ballot_sync(FULL_WARP, more) != 0) patch_group(last, more, first, count, elements);
  }

  // Patches ascend by rank. Where few lanes have a row, each probes the list once, and what lies between the
  // probes around the segment is walked; 32 lanes walk a list of usual length as fast.
  __device__ __forceinline__ void patch_group(u64 group, bool live, u32 first, u32 count, Element* elements) const {
    PatchList list;
    u32 start = 0;
    if (live) {
      list.find(rows.p, group);
#if ENDOR_BITMAP
      start = __ldg(pointer<u32>(rows.p.tile_offsets) + group * GROUP_TILES);
#else
      start = static_cast<u32>(group * ENDOR_GROUP);
#endif
    }
    const int ahead = static_cast<int>(start - first);  // of the group's first element
    u32 begin = 0, end = list.count;
    if constexpr (LANES < 32) {
      const u32 step = (list.count + LANES - 1) / LANES, probe = rows.sub * step;
      int rank = static_cast<int>(count);
      if (probe < list.count) rank = ahead + __ldg(list.ranks + probe);
      constexpr u32 MINE = (1u << LANES % 32) - 1u;
      const u32 shift = rows.lane & ~(LANES - 1);
      const u32 before = __popc(__ballot_sync(FULL_WARP, rank < 0) >> shift & MINE);
      const u32 until = __popc(__ballot_sync(FULL_WARP, rank < static_cast<int>(count)) >> shift & MINE);
      begin = (before ? before - 1 : 0) * step;
      end = least(until * step, list.count);
    }
#pragma unroll 1
    for (u32 k = begin + rows.sub; k < end; k += LANES) {
      const u32 place = ahead + __ldg(list.ranks + k);  // before the first one: far above
      if (place < count) put_exponent(elements + place, __ldg(list.exponents + k));
    }
  }

  __device__ __forceinline__ void arrive() {}
};

// grid     ceil(rows / ROWS); block and shared memory: see `multiply_rows`
extern "C" __global__ void __launch_bounds__(256)
    product_exp(const __grid_constant__ Product p) {
  ENDOR_SHARED(shared);
  multiply_rows<ExpStaging>(p, shared);
}
