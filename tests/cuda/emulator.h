// Runs a CUDA kernel on the CPU: one fiber per thread, block after block, x86-64 and Linux only.
//
// What it is strict about, because the hardware would only sometimes punish it:
//   - a copy16 (cp.async) spoils its destination at once and delivers its bytes at copy_wait;
//   - what a lane stores or has copied reaches the others at its next __syncwarp or __syncthreads only
//     (a shuffle brings the lanes together, but orders no memory), so a missing wait or barrier shows;
//   - fibers run in a shuffled order between barriers, so a missing __syncwarp or __syncthreads shows;
//   - shared memory starts out poisoned, and each block's copy ends in a canary;
//   - every load through __ldg or copy16 must lie in a registered range;
//   - vector accesses must be aligned (the struct types are, and -fsanitize=alignment checks it).
// The mma layout is that of PTX's mma.m16n8k16 with 16-bit operands.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <ucontext.h>
#include <utility>
#include <vector>

#define ENDOR_EMULATED 1
#ifndef ENDOR_TENSOR_CORES
#define ENDOR_TENSOR_CORES 1
#endif
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define ENDOR_SHARED(name) unsigned char* name = emulator::shared_begin()

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct Dim { unsigned x = 1, y = 1, z = 1; };

namespace emulator {
typedef std::vector<std::pair<void*, const void*>> Group;
struct Store {
  void* to;
  unsigned char bytes[16];
  unsigned size;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  unsigned thread = 0;
  std::deque<Group> groups;
  Group open;
  std::vector<Store> stores;
};
struct Range { uintptr_t begin, end; };

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline Fiber* current;
inline Dim block_index, grid_size, block_size;
inline std::vector<unsigned char> shared;
inline std::vector<Range> readable;
inline std::vector<uint64_t> slots;  // 8 per thread, for exchanges inside a warp
inline std::vector<int> warp_arrived, warp_round;
inline int block_arrived, block_round;
inline std::function<void()> body;
constexpr unsigned CANARY = 64;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, block_index.x, current ? current->thread : 0);
  abort();
}
inline unsigned char* shared_begin() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared.data()) + 15) & ~uintptr_t(15));
}
inline void check_read(const void* p, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  for (const Range& r : readable)
    if (at >= r.begin && at + bytes <= r.end) return;
  fail("read outside the arrays");
}
inline unsigned shared_size;
inline void check_shared(const void* p, size_t bytes) {
  const unsigned char* at = static_cast<const unsigned char*>(p);
  if (at < shared_begin() || at + bytes > shared_begin() + shared_size) fail("outside shared memory");
}
inline void remember(void* to, const void* from, unsigned size) {
  Store store{to, {}, size};
  memcpy(store.bytes, from, size);
  current->stores.push_back(store);
}
inline void flush() {
  for (const Store& store : current->stores) memcpy(store.to, store.bytes, store.size);
  current->stores.clear();
}
inline void yield() { swapcontext(&current->context, &scheduler); }
inline int alive(unsigned warp) {
  int count = 0;
  for (unsigned i = 32 * warp; i < 32 * warp + 32 && i < fibers.size(); i++) count += !fibers[i].done;
  return count;
}
inline void warp_barrier() {
  const unsigned warp = current->thread / 32;
  const int round = warp_round[warp];
  if (++warp_arrived[warp] == alive(warp)) {
    warp_arrived[warp] = 0;
    warp_round[warp]++;
  } else {
    while (warp_round[warp] == round) yield();
  }
}
inline void block_barrier() {
  int all = 0;
  for (const Fiber& f : fibers) all += !f.done;
  const int round = block_round;
  if (++block_arrived == all) {
    block_arrived = 0;
    block_round++;
  } else {
    while (block_round == round) yield();
  }
}
inline void trampoline() {
  body();
  flush();
  current->done = true;
  yield();
}
template <typename Kernel>
void launch(unsigned grid, unsigned block, size_t shared_bytes, Kernel kernel) {
  grid_size.x = grid;
  block_size.x = block;
  body = kernel;
  shared_size = static_cast<unsigned>(shared_bytes);
  uint32_t random = 12345 + block;
  fibers.clear();
  fibers.resize(block);
  for (Fiber& f : fibers) f.stack.resize(96 << 10);
  std::vector<unsigned> order(block);
  for (unsigned i = 0; i < block; i++) order[i] = i;
  for (unsigned b = 0; b < grid; b++) {
    block_index.x = b;
    shared.assign(shared_bytes + 16 + CANARY, 0xCD);
    slots.assign(block * 8, 0);
    warp_arrived.assign((block + 31) / 32, 0);
    warp_round.assign((block + 31) / 32, 0);
    block_arrived = block_round = 0;
    for (unsigned t = 0; t < block; t++) {
      Fiber& f = fibers[t];
      f.thread = t;
      f.done = false;
      f.groups.clear();
      f.open.clear();
      f.stores.clear();
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr;
      makecontext(&f.context, trampoline, 0);
    }
    for (long rounds = 0, any = 1; any; rounds++) {
      any = 0;
      for (unsigned i = block - 1; i; i--) {
        random = random * 1664525u + 1013904223u;
        std::swap(order[i], order[(random >> 8) % (i + 1)]);
      }
      for (unsigned t : order) {
        if (fibers[t].done) continue;
        any = 1;
        current = &fibers[t];
        swapcontext(&scheduler, &current->context);
      }
      if (rounds > 1000000) fail("deadlock: a barrier in divergent code?");
    }
    for (unsigned i = 0; i < CANARY; i++)
      if (shared_begin()[shared_bytes + i] != 0xCD) fail("write past the end of shared memory");
  }
}
template <typename T>
T exchange(T value, unsigned lane) {
  const unsigned warp = current->thread / 32;
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  slots[current->thread * 8] = word;
  warp_barrier();
  T result;
  memcpy(&result, &slots[(32 * warp + lane) * 8], sizeof(T));
  warp_barrier();
  return result;
}
}  // namespace emulator

struct ThreadIndex {
  struct X { operator unsigned() const { return emulator::current->thread; } } x;
};
static ThreadIndex threadIdx;
#define blockIdx emulator::block_index
#define gridDim emulator::grid_size
#define blockDim emulator::block_size

inline unsigned lane_id() { return emulator::current->thread & 31; }
template <typename T> T __shfl_sync(unsigned, T v, unsigned lane) { return emulator::exchange(v, lane & 31); }
template <typename T> T __shfl_up_sync(unsigned, T v, unsigned d) {
  return emulator::exchange(v, lane_id() < d ? lane_id() : lane_id() - d);
}
template <typename T> T __shfl_xor_sync(unsigned, T v, unsigned d) { return emulator::exchange(v, lane_id() ^ d); }
inline unsigned __ballot_sync(unsigned, bool held) {
  const unsigned warp = emulator::current->thread / 32;
  emulator::slots[emulator::current->thread * 8] = held;
  emulator::warp_barrier();
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; i++) bits |= static_cast<unsigned>(emulator::slots[(32 * warp + i) * 8]) << i;
  emulator::warp_barrier();
  return bits;
}
inline unsigned __reduce_add_sync(unsigned, unsigned v) {
  const unsigned warp = emulator::current->thread / 32;
  emulator::slots[emulator::current->thread * 8] = v;
  emulator::warp_barrier();
  unsigned sum = 0;
  for (unsigned i = 0; i < 32; i++) sum += static_cast<unsigned>(emulator::slots[(32 * warp + i) * 8]);
  emulator::warp_barrier();
  return sum;
}
inline void __syncwarp() {
  emulator::flush();
  emulator::warp_barrier();
}
inline void __syncthreads() {
  emulator::flush();
  emulator::block_barrier();
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  by &= 31;
  return by ? low >> by | high << (32 - by) : low;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes = __byte_perm(a, b, selector);
  for (int i = 0; i < 4; i++)
    if (selector >> (4 * i) & 8) bytes = (bytes & ~(255u << 8 * i)) | (bytes >> (8 * i + 7) & 1 ? 255u << 8 * i : 0);
  return bytes;
}
template <typename T> T __ldg(const T* p) {
  emulator::check_read(p, sizeof(T));
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) emulator::fail("misaligned load");
  return *p;
}
inline void copy16(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulator::fail("misaligned 16-byte copy");
  emulator::check_read(global, 16);
  emulator::check_shared(shared, 16);
  memset(shared, 0xDD, 16);
  emulator::current->open.push_back({shared, global});
}
typedef uintptr_t Staged;
inline Staged staged_address(const void* shared) { return reinterpret_cast<Staged>(shared); }
// Addresses are wider here than a word: what is kept counts from the start of shared memory.
inline uint32_t kept(Staged at) { return static_cast<uint32_t>(at - reinterpret_cast<Staged>(emulator::shared_begin())); }
inline Staged staged(uint32_t offset) { return reinterpret_cast<Staged>(emulator::shared_begin()) + offset; }
template <int OFFSET = 0> uint32_t fetch4(Staged at) {
  if ((at + OFFSET) % 4) emulator::fail("misaligned shared load");
  emulator::check_shared(reinterpret_cast<const void*>(at + OFFSET), 4);
  uint32_t word;
  memcpy(&word, reinterpret_cast<const void*>(at + OFFSET), 4);
  return word;
}
inline uint2 fetch8(Staged at) {
  if (at % 8) emulator::fail("misaligned shared load");
  return {fetch4(at), fetch4(at + 4)};
}
template <int BYTES> uint32_t take(Staged& at, uint32_t bit) {
  if (!bit) return 0;
  if (at % BYTES) emulator::fail("misaligned shared load");
  const void* from = reinterpret_cast<const void*>(at);
  emulator::check_shared(from, BYTES);
  uint32_t element = 0;
  memcpy(&element, from, BYTES);
  at += BYTES;
  return element;
}
template <typename E> void store_element(E* at, E element) { emulator::remember(at, &element, sizeof(E)); }
inline void store16(void* global, uint4 v) {
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("misaligned 16-byte store");
  emulator::remember(global, &v, 16);
}
inline void store8(void* global, uint32_t x, uint32_t y) {
  if (reinterpret_cast<uintptr_t>(global) % 8) emulator::fail("misaligned 8-byte store");
  const uint32_t v[2] = {x, y};
  emulator::remember(global, v, 8);
}
inline void stage16(Staged at, uint4 v) {
  emulator::check_shared(reinterpret_cast<void*>(at), 16);
  store16(reinterpret_cast<void*>(at), v);
}
inline void stage8(Staged at, uint32_t x, uint32_t y) {
  emulator::check_shared(reinterpret_cast<void*>(at), 8);
  store8(reinterpret_cast<void*>(at), x, y);
}
inline void copy_commit() {
  emulator::current->groups.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}
template <int PENDING> void copy_wait() {
  auto& groups = emulator::current->groups;
  while (static_cast<int>(groups.size()) > PENDING) {
    for (auto& copy : groups.front()) emulator::remember(copy.first, copy.second, 16);
    groups.pop_front();
  }
}

inline float __uint_as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
template <typename T> T keep(T value) { return value; }
inline float half_to_float(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
inline uint16_t float_to_half(float f) {
  const _Float16 half = static_cast<_Float16>(f);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline uint16_t float_to_bf16(float f) {
  const uint32_t word = __float_as_uint(f);
  return static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

#ifdef ENDOR_HALF
inline float widen(uint32_t bits) {
#if ENDOR_HALF
  _Float16 half;
  const uint16_t low = static_cast<uint16_t>(bits);
  memcpy(&half, &low, 2);
  return static_cast<float>(half);
#else
  const uint32_t word = bits << 16;
  float f;
  memcpy(&f, &word, 4);
  return f;
#endif
}
inline uint16_t narrow(float f) {
  uint16_t bits;
#if ENDOR_HALF
  const _Float16 half = static_cast<_Float16>(f);
  memcpy(&bits, &half, 2);
#else
  uint32_t word;
  memcpy(&word, &f, 4);
  bits = static_cast<uint16_t>(f != f ? word >> 16 | 0x40u : (word + 0x7fffu + (word >> 16 & 1u)) >> 16);
#endif
  return bits;
}
inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned thread = emulator::current->thread, base = thread / 32 * 32, lane = thread & 31;
  for (int i = 0; i < 4; i++) emulator::slots[thread * 8 + i] = a[i];
  for (int i = 0; i < 2; i++) emulator::slots[thread * 8 + 4 + i] = b[i];
  emulator::warp_barrier();
  auto A = [&](unsigned row, unsigned k) {
    const unsigned owner = base + (row & 7) * 4 + (k & 7) / 2, reg = (row >= 8) + 2 * (k >= 8);
    const uint32_t word = static_cast<uint32_t>(emulator::slots[owner * 8 + reg]);
    return widen(k & 1 ? word >> 16 : word & 0xffffu);
  };
  auto B = [&](unsigned k, unsigned col) {
    const unsigned owner = base + col * 4 + (k & 7) / 2, reg = 4 + (k >= 8);
    const uint32_t word = static_cast<uint32_t>(emulator::slots[owner * 8 + reg]);
    return widen(k & 1 ? word >> 16 : word & 0xffffu);
  };
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = lane / 4 + 8 * (i >> 1), col = 2 * (lane & 3) + (i & 1);
    for (unsigned k = 0; k < 16; k++) c[i] += A(row, k) * B(k, col);
  }
  emulator::warp_barrier();
}
#endif
