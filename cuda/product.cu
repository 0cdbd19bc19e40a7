// y = W x straight from codec `raw`: values travel as they are (`product.cuh` has the product).
//
// While a warp multiplies a segment, the next one's values travel to its other slots (cp.async, 16 bytes a lane:
// the LANES lanes of a row copy its values) and the bitmap words of the one after into registers. At density 0.5 a
// row's values are two vectors a lane and a little: three predicated copies, whose addresses differ by constants,
// then a loop for what is fuller.
//
// Bytes per weight at density d: 1/8 + 2d + 1/256 read: 1.13 at 0.5 where dense bf16 has 2.
#include "common.cuh"
#include "product.cuh"

struct RawStaging {
  static constexpr u32 BUFFERS = 2, EXTRA = 0, COPIES = 3;
  const Rows rows;
  u8* slots;
  u32 slot, parity;
  u32 rank[WORDS_A_LANE];   // of the next element to copy, by row
  u32 after[WORDS_A_LANE];  // words of the segment after the next one
  Held next;

  __device__ __forceinline__ RawStaging(const Rows& all, u32 begin, u8* to, u32 bytes, u8*)
      : rows(all), slots(to), slot(bytes), parity(0) {
#pragma unroll
    for (int i = 0; i < WORDS_A_LANE; i++) {
      next.word[i] = rows.word(i, begin);
      after[i] = rows.word(i, begin + 1);
      rank[i] = rows.rank(i, begin);
    }
    copy();
  }

  // Send the values of `next` to the slots that are free.
  __device__ __forceinline__ void copy() {
    u32 count[WORDS_A_LANE];
    next.rank(rows.lane, count);
    const u32 capacity = least(rows.p.capacity, SEGMENT), base = kept(staged_address(slots));
#pragma unroll
    for (int i = 0; i < WORDS_A_LANE; i++) {
      const u32 from = least(rank[i], rows.p.nnz);
      const u32 some = least(least(count[i], rows.p.nnz - from), capacity);
      rank[i] = from + some;
      const u64 first = rows.p.values + 2 * static_cast<u64>(from);
      const u32 head = static_cast<u32>(first) & 15u;
      const u32 vectors = some ? (head + 2 * some + 15) >> 4 : 0;
      const u32 at = (parity * ROWS + rows.in_block(i)) * slot;
      next.first[i] = base + at + head;
      const u8* source = pointer<u8>(first - head + 16 * rows.sub);
      u8* to = slots + at + 16 * rows.sub;
#pragma unroll
      for (u32 k = 0; k < COPIES; k++)
        if (rows.sub + k * LANES < vectors) copy16(to + 16 * k * LANES, source + 16 * k * LANES);
      for (u32 k = rows.sub + COPIES * LANES; k < vectors; k += LANES)
        copy16(slots + at + 16 * k, pointer<u8>(first - head) + 16 * k);
    }
    copy_commit();
    parity ^= 1;
  }

  __device__ __forceinline__ void issue(u32 segment, Held& held) {
    held = next;
#pragma unroll
    for (int i = 0; i < WORDS_A_LANE; i++) {
      next.word[i] = after[i];
      after[i] = rows.word(i, segment + 2);
    }
    copy();
  }

  __device__ __forceinline__ void arrive() { copy_wait<1>(); }  // the next segment may still travel
};

// grid     ceil(rows / ROWS); block and shared memory: see `multiply_rows`
extern "C" __global__ void __launch_bounds__(256)
    product(const __grid_constant__ Product p) {
  ENDOR_SHARED(shared);
  multiply_rows<RawStaging>(p, shared);
}
