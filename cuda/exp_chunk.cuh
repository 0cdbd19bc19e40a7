// Codec `exp`: 8 stored elements at a time, from planes to elements.
//
// A stored element is a number w of k + R bits, code << R | rest (R = mantissa and sign bits). Its low
// 8B bits lie in B byte planes, the P = k + R - 8B bits above in P bit planes:
//
//   bytes   u8[B][nnz]     | b b b b b b b b | ...   8 elements: one 8-byte load per plane
//   planes  u8[P][stride]  |    1 byte       | ...   8 elements: one byte per plane
//   patches per 8 tiles: u16 rank, u8 true exponent
//
// A chunk is 8 elements, aligned in rank and so in every plane; one lane decodes one without a branch on
// the data.
//
// bf16 with at most 4 planes, that is nearly every weight:
//
//   bits of the planes as one number, bit 8j + i = bit j of element i's code
//   two exchanges of bits (8j + i -> a nibble an element): every nibble is a code
//   byte permutes with the nibbles as selectors: 4 codes -> 4 exponents' upper 7 bits, and their lowest one
//   join with sign and mantissa for 4 elements at once, and interleave
#pragma once

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

// What is the same for all elements of a tensor.
template <u32 P>
struct Window {
  // Codes are byte-permute selectors: 4 bits of a plane each, all of them in the table's reach.
  static constexpr bool SELECTS = S == 2 && M == 7 && P <= 4;
  u32 base;
  u32 upper[4];  // exponent >> 1 of codes 4i .. 4i + 3, a byte each
  u32 lowest;    // (exponent & 1) << 7 of any four codes that begin with an even one

  explicit __device__ __forceinline__ Window(u32 first) : base(first) {
    if constexpr (SELECTS) {
      u32 four = first * 0x01010101u + 0x03020100u;
      lowest = four << 7 & 0x80808080u;
#pragma unroll
      for (u32 i = 0; i < 4; i++, four += 0x04040404u) upper[i] = four >> 1 & 0x7f7f7f7fu;
    }
  }

  // Nibbles of `selector` to exponents: their upper 7 bits, and the lowest one at bit 7 of a byte.
  __device__ __forceinline__ void look_up(u32 selector, u32& high, u32& low) const {
    if constexpr (P <= 3) {
      high = permute(upper[0], upper[1], selector);
      low = permute(lowest, lowest, selector);
    } else {
      // Bit 3 of a selector asks for the byte's sign eight times over: 0x80 becomes 0xff where it is set. The
      // top bit of a mask is always set, and clear in both tables.
      const u32 mask = permute(0x80808080u, 0x80808080u, selector), three = selector & 0x77777777u;
      high = (permute(upper[0], upper[1], three) & ~mask) | (permute(upper[2], upper[3], three) & mask);
      low = permute(lowest, lowest, three);
    }
  }
};

// What one lane loads for 8 stored elements.
template <u32 P>
struct Chunk {
  uint2 bytes[B ? B : 1];
  u32 bits[P];

  template <typename Arrays>
  __device__ __forceinline__ void load(const Arrays& t, u64 chunk) {
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

  // All codes at a nibble each: the lower four are elements 0, 4, 1, 5, the upper four 2, 6, 3, 7.
  __device__ __forceinline__ u32 selectors() const {
    u32 x = bits[0];
#pragma unroll
    for (u32 j = 1; j < P; j++) x |= bits[j] << (8 * j);
    const u32 far = (x ^ x >> 14) & 0x0000ccccu;
    x ^= far ^ far << 14;
    const u32 near = (x ^ x >> 7) & 0x00aa00aau;
    return x ^ near ^ near << 7;
  }

  // The 8 elements, in order, `PER_WORD` to a register.
  __device__ __forceinline__ void decode(const Window<P>& window, u32* words) const {
    if constexpr (Window<P>::SELECTS) {
      const u32 all = selectors();
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        u32 high, low;
        window.look_up(all >> (16 * half), high, low);
        const u32 rest = permute(bytes[0].x, bytes[0].y, half ? 0x7362u : 0x5140u);
        high |= rest & 0x80808080u;
        low |= rest & 0x7f7f7f7fu;
        words[half] = permute(low, high, 0x6240u);
        words[2 + half] = permute(low, high, 0x7351u);
      }
      return;
    }
    const u32 base = window.base;
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

// Give an element another exponent.
__device__ __forceinline__ void put_exponent(Element* element, u32 exponent) {
  store_element(element, static_cast<Element>((*element & ~EXPONENT) | ((exponent << M) & EXPONENT)));
}

// The patches of one group of 8 tiles, by rank from the group's first stored element.
struct PatchList {
  const u16* ranks = nullptr;
  const u8* exponents = nullptr;
  u32 count = 0;

  template <typename Arrays>
  __device__ __forceinline__ void find(const Arrays& t, u64 group) {
    const u32* offsets = pointer<u32>(t.patch_offsets) + group;
    const u32 begin = __ldg(offsets), end = smaller(__ldg(offsets + 1), t.patches);
    ranks = pointer<u16>(t.patch_ranks) + begin;
    exponents = pointer<u8>(t.patch_exponents) + begin;
    count = begin < end ? end - begin : 0;
  }
};
