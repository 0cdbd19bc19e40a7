// Codec `exp` to dense: exponent codes in bit planes, the rest in byte and bit planes, patches.
//
// A stored element is a number w of k + R bits, code << R | rest (R = mantissa and sign bits). Its low
// 8B bits lie in B byte planes, the P = k + R - 8B bits above in P bit planes:
//
//   bytes   u8[B][nnz]     | b b b b b b b b | ...   8 elements: one 8-byte load per plane
//   planes  u8[P][stride]  |    1 byte       | ...   8 elements: one byte per plane
//   patches per 8 tiles: u16 rank, u8 true exponent
//
// One warp per tile, one lane per 8 stored elements (a chunk: aligned in rank, so in every plane):
//   1. load the chunk's bytes, spread each plane's 8 bits over 8 byte lanes with a multiply, join
//      bytes and codes with byte permutes, place sign, exponent + base and mantissa: 8 elements for
//      about 7 instructions each, no branch on the data;
//   2. with a bitmap: put them into the warp's shared slot, patch there by rank, and expand the tile as
//      `raw` does. Without: store them, then patch in place.
//
// Bytes per weight at density d for bf16 (B = 1, P = k): 1/8 + d(1 + k/8) + 1/256 read, 2 written: 0.81
// + 2 at 0.5 and k = 3. About 17 instructions per weight, close to the point where an H200 turns from
// memory to issue.
//
// Why not fused (decode while expanding): then every weight pays for the code, not every stored
// element, and the plane bits of a lane's 8 weights start at any bit.
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

constexpr u32 S = ENDOR_ITEM_BYTES, E = ENDOR_EXPONENT_BITS, M = ENDOR_MANTISSA_BITS;
constexpr bool SIGNED = ENDOR_SIGNED;  // the 8-bit integers have no sign field and a window that wraps
constexpr u32 R = M + (SIGNED ? 1 : 0), B = R / 8;
static_assert(SIGNED ? S * 8 == 1 + E + M : S * 8 == E, "fields must fill the element");
static_assert(S == B + 1, "byte planes and at most 8 bit planes make up one element");

// Elements of one 32-bit register, and constants repeated for each of them.
constexpr u32 PER_WORD = 4 / S;
constexpr u32 EVERY = S == 1 ? 0x01010101u : S == 2 ? 0x00010001u : 1u;
constexpr u32 EXPONENT = ((1u << E) - 1u) << M;
constexpr u32 MANTISSA = (1u << M) - 1u;
constexpr u32 WORDS = 8 / PER_WORD;  // registers of a chunk
// Chunks of a lane whose loads are in flight together.
constexpr u32 AHEAD = S == 4 ? 1 : 3;

// 8 bytes from any address; at most 8 bytes beyond them are read.
__device__ __forceinline__ uint2 load8(u64 address) {
  const u32 off = static_cast<u32>(address & 7) * 8;
  const uint2* p = pointer<uint2>(address & ~static_cast<u64>(7));
  uint2 low = __ldg(p);
  if (off == 0) return low;  // the same for all lanes
  uint2 high = __ldg(p + 1);
  uint2 v;
  if (off < 32) {
    v.x = __funnelshift_r(low.x, low.y, off);
    v.y = __funnelshift_r(low.y, high.x, off);
  } else {
    v.x = __funnelshift_r(low.y, high.x, off - 32);
    v.y = __funnelshift_r(high.x, high.y, off - 32);
  }
  return v;
}

// What one lane loads for 8 stored elements.
template <u32 P>
struct Chunk {
  uint2 bytes[B ? B : 1];
  u32 bits[P];

  __device__ __forceinline__ void load(const Tensor& t, u64 chunk) {
#pragma unroll
    for (u32 j = 0; j < B; j++) {
      const u64 address = t.values + j * t.nnz + chunk * 8;
      bytes[j] = j ? load8(address) : __ldg(pointer<uint2>(address));  // plane 0 is aligned
    }
#pragma unroll
    for (u32 j = 0; j < P; j++) bits[j] = __ldg(pointer<u8>(t.planes + j * t.plane_nbytes) + chunk);
  }

  // Bits 4*half .. 4*half+3 of every plane as the bytes of one register, plane j at bit j of a byte.
  // The multiply puts bit i of a nibble at bit 8i + j; the products of other bits are masked away.
  __device__ __forceinline__ u32 codes(u32 half) const {
    u32 all = 0;
#pragma unroll
    for (u32 j = 0; j < P; j++)
      all |= ((bits[j] >> (4 * half) & 15u) * (0x00204081u << j)) & (0x01010101u << j);
    return all;
  }

  // The 8 elements, in order, `PER_WORD` to a register.
  __device__ __forceinline__ void decode(u32 base, u32* words) const {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      const u32 top = codes(half);
      u32* w = words + half * (WORDS / 2);
      if constexpr (S == 1) {
        w[0] = top;
      } else if constexpr (S == 2) {
        const u32 low = half ? bytes[0].y : bytes[0].x;
        w[0] = __byte_perm(low, top, 0x5140);
        w[1] = __byte_perm(low, top, 0x7362);
      } else {
        const u32 b0 = half ? bytes[0].y : bytes[0].x;
        const u32 b1 = half ? bytes[1].y : bytes[1].x;
        const u32 b2 = half ? bytes[2].y : bytes[2].x;
#pragma unroll
        for (u32 i = 0; i < 4; i++)
          w[i] = __byte_perm(__byte_perm(b0, b1, i | (4 + i) << 4),
                             __byte_perm(b2, top, i | (4 + i) << 4), 0x5410);
      }
    }
#pragma unroll
    for (u32 i = 0; i < WORDS; i++) words[i] = element(words[i], base);
  }

  // [code | sign | mantissa] -> [sign | code + base | mantissa], for every element of a register.
  static __device__ __forceinline__ u32 element(u32 w, u32 base) {
    if constexpr (SIGNED) {
      // code + base fits the field (checked when the header is read), so nothing carries out of it
      const u32 exponent = ((w >> 1) & EXPONENT * EVERY) + (base << M) * EVERY;
      const u32 sign = (w & (1u << M) * EVERY) << (8 * S - 1 - M);
      return exponent | sign | (w & MANTISSA * EVERY);
    } else {
      // bytes added modulo 256: low 7 bits without their carry, then the top bit
      const u32 add = base * EVERY;
      return ((w & 0x7f7f7f7fu) + (add & 0x7f7f7f7fu)) ^ ((w ^ add) & 0x80808080u);
    }
  }
};

__device__ __forceinline__ void put_shared(Staged slot, u32 chunk, const u32* words) {
  if constexpr (WORDS == 2) {
    stage8(slot + 8 * chunk, words[0], words[1]);
  } else {
#pragma unroll
    for (u32 i = 0; i < WORDS; i += 4)
      stage16(slot + 4 * (WORDS * chunk + i), quad(words[i], words[i + 1], words[i + 2], words[i + 3]));
  }
}

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

// Give the patched elements of ranks [first, first + count) their true exponent. `elements[0]` is rank
// `first`. The lanes share out the patches of the tile's group; ranks outside the tile are skipped.
__device__ __forceinline__ void patch(const Tensor& t, u64 tile, Range range, u64 group_first,
                                      Element* elements, u32 lane) {
  const u32* offsets = pointer<u32>(t.patch_offsets) + tile / GROUP_TILES;
  const u32 end = smaller(__ldg(offsets + 1), t.patches);
  for (u64 i = static_cast<u64>(__ldg(offsets)) + lane; i < end; i += 32) {
    const u64 rank = group_first + __ldg(pointer<u16>(t.patch_ranks) + i);
    if (rank < range.first || rank - range.first >= range.count) continue;
    Element* e = elements + (rank - range.first);
    const u32 exponent = static_cast<u32>(__ldg(pointer<u8>(t.patch_exponents) + i)) << M;
    store_element(e, static_cast<Element>((*e & ~EXPONENT) | (exponent & EXPONENT)));
  }
}

template <u32 P, bool BITMAP>
__device__ __forceinline__ void expand(const Tensor& t, u64 tile, u8* slot, u32 lane) {
  u32 word = 0;
  Range range;
  u64 group_first;
  const u64 group_tile = tile / GROUP_TILES * GROUP_TILES;
  if constexpr (BITMAP) {
    word = __ldg(pointer<u32>(t.bitmap) + tile * 32 + lane);
    range = stored_range(t, tile);
    group_first = t.patch_offsets ? __ldg(pointer<u32>(t.tile_offsets) + group_tile) : 0;
  } else {
    range = Range{tile * TILE, smaller(t.numel - tile * TILE, TILE)};
    group_first = group_tile * TILE;
  }
  const u64 first_chunk = range.first >> 3;
  const u32 shift = static_cast<u32>(range.first & 7);
  const u32 chunks = range.count ? (shift + range.count + 7) >> 3 : 0;

  const Staged place = BITMAP ? staged_address(slot) : Staged();
  for (u32 done = 0; done < chunks; done += 32 * AHEAD) {
    Chunk<P> loaded[AHEAD];
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++)
      if (done + 32 * a + lane < chunks) loaded[a].load(t, first_chunk + done + 32 * a + lane);
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
      const u32 chunk = done + 32 * a + lane;
      if (chunk >= chunks) continue;
      u32 words[WORDS];
      loaded[a].decode(t.base, words);
      if constexpr (BITMAP)
        put_shared(place, chunk, words);
      else
        put_global(t, first_chunk + chunk, words);
    }
  }

  if constexpr (BITMAP) {
    const u32 before = exclusive_sum(__popc(word), lane);
    __syncwarp();
    if (t.patch_offsets) {
      patch(t, tile, range, group_first, reinterpret_cast<Element*>(slot) + shift, lane);
      __syncwarp();
    }
    expand_tile<Element>(place + shift * S, word, before, t, tile, lane);
  } else if (t.patch_offsets) {
    __syncwarp();  // orders the warp's own stores before the patches
    patch(t, tile, range, group_first, reinterpret_cast<Element*>(t.out) + range.first, lane);
  }
}

// Instantiated for the plane counts of one launch only: bit P of ENDOR_PLANES is set where a tensor of
// the batch has P bit planes.
template <u32 P, bool BITMAP>
__device__ __forceinline__ void dispatch(const Tensor& t, u64 tile, u8* slot, u32 lane) {
  if constexpr (P <= 8) {
    if constexpr ((ENDOR_PLANES >> P) & 1) {
      if ((ENDOR_PLANES == 1u << P) || t.n_planes == P) return expand<P, BITMAP>(t, tile, slot, lane);
    }
    dispatch<P + 1, BITMAP>(t, tile, slot, lane);
  }
}

// batch    tensors of one dtype, `exp`, none of them empty, all with or all without a bitmap
// grid     ceil(n_tiles / warps per block) blocks of whole warps
// shared   with a bitmap: warps per block * (1024 * ENDOR_ITEM_BYTES + STAGING_SLACK) bytes, else none
extern "C" __global__ void __launch_bounds__(256)
    expand_exp(const __grid_constant__ Batch batch) {
  ENDOR_SHARED(shared);
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u64 tile = static_cast<u64>(blockIdx.x) * (blockDim.x >> 5) + warp;
  if (tile >= batch.n_tiles) return;  // a whole warp leaves
  const Tensor& t = find_tensor(batch, tile);
  u8* slot = shared + warp * (TILE * S + STAGING_SLACK);
  dispatch<1, ENDOR_BITMAP != 0>(t, tile, slot, lane);
}
