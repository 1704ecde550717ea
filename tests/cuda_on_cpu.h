// Runs simple CUDA C++ kernels on a CPU, one block at a time, for checking their results where there is no GPU.
//
// Use (tests/test_codebook_grad_cuda.py): `python cuda_on_cpu.py kernel.cu -o kernel.cpp` rewrites launches and dynamic shared memory, then
//   g++ -std=c++17 -O1 -fsanitize=address,undefined -I<cuda>/include -include cuda_on_cpu.h -shared -fPIC kernel.cpp -o kernel.so
// Pointers are host pointers; streams are ignored. Every thread of a block is a fiber; between two barriers the fibers run in
// an order drawn from EMU_SEED, so a result that depends on the order of threads or blocks changes with the seed.
// Not modelled: inline PTX, textures, cooperative groups, memory ordering between blocks, speed.
#pragma once
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

namespace emu {
constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;
struct Warp { uint64_t slot[kWarp]; int arrived = 0; uint64_t generation = 0; uint64_t published[kWarp]; unsigned mask = 0, done_mask = 0; };
struct Fiber { ucontext_t context; uint3 id; int linear; bool done = false; std::vector<char> stack; };
struct Block {
  std::vector<Fiber> fibers; std::vector<Warp> warps; ucontext_t scheduler; int current = -1, waiting = 0, live = 0;
  uint64_t barrier = 0; int votes = 0, vote_sum = 0, vote_result = 0; std::vector<char> dynamic;
};
inline Block* block = nullptr;
inline uint3 block_id; inline dim3 grid_dim, block_dim;
inline std::function<void()>* body = nullptr;
inline void yield() { Fiber& f = block->fibers[block->current]; swapcontext(&f.context, &block->scheduler); }
inline Fiber& self() { return block->fibers[block->current]; }
inline void* dynamic_shared() { return block->dynamic.data(); }
inline void entry() { (*body)(); Fiber& f = self(); f.done = true; block->live--; swapcontext(&f.context, &block->scheduler); }
inline int barrier_vote(int predicate) {
  uint64_t mine = block->barrier; block->vote_sum += predicate != 0; block->waiting++;
  while (block->barrier == mine) {
    if (block->waiting >= block->live) { block->vote_result = block->vote_sum; block->votes = block->waiting; block->vote_sum = 0; block->waiting = 0; block->barrier++; break; }
    yield();
  }
  return block->vote_result;
}
inline int lane() { return self().linear % kWarp; }
// All lanes of `mask` publish a word; returns after all have, with every lane's word readable until the next exchange.
inline const uint64_t* exchange(unsigned mask, uint64_t word) {
  Warp& w = block->warps[self().linear / kWarp]; int me = lane();
  if (!(mask >> me & 1)) { std::fprintf(stderr, "cuda_on_cpu: lane %d called a warp intrinsic whose mask %08x leaves it out\n", me, mask); std::abort(); }
  w.slot[me] = word; w.mask |= 1u << me; uint64_t generation = w.generation;
  long spins = 0;
  while (w.generation == generation) {
    unsigned need = mask; int base = self().linear / kWarp * kWarp;
    for (int l = 0; l < kWarp; l++) if (base + l >= (int)block->fibers.size()) need &= ~(1u << l);
    if ((w.mask & need) == need) { std::memcpy(w.published, w.slot, sizeof w.slot); w.mask = 0; w.generation++; break; }
    if (++spins > 1000000) { std::fprintf(stderr, "cuda_on_cpu: a warp intrinsic waits for lanes %08x for ever\n", need & ~w.mask); std::abort(); }
    yield();
  }
  return w.published;
}
inline unsigned seed() { const char* s = std::getenv("EMU_SEED"); return s ? (unsigned)std::atoi(s) : 0u; }
inline void run(dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> f) {
  long count = (long)threads.x * threads.y * threads.z;
  if (count < 1 || count > 1024) { std::fprintf(stderr, "cuda_on_cpu: %ld threads in a block\n", count); std::abort(); }
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) { std::fprintf(stderr, "cuda_on_cpu: invalid grid\n"); std::abort(); }
  body = &f; grid_dim = grid; block_dim = threads; std::mt19937 random(seed());
  std::vector<long> blocks((long)grid.x * grid.y * grid.z); std::iota(blocks.begin(), blocks.end(), 0L);
  if (seed()) std::shuffle(blocks.begin(), blocks.end(), random);
  Block b; block = &b; b.fibers.resize(count); b.warps.resize((count + kWarp - 1) / kWarp);
  for (auto& fiber : b.fibers) fiber.stack.resize(kStack);
  std::vector<int> order(count);
  for (long index : blocks) {
    block_id = {(unsigned)(index % grid.x), (unsigned)(index / grid.x % grid.y), (unsigned)(index / grid.x / grid.y)};
    b.dynamic.assign(shared_bytes, (char)0x7b); b.live = count; b.waiting = 0; b.vote_sum = 0;
    for (auto& w : b.warps) w = Warp();
    for (int t = 0; t < count; t++) {
      Fiber& fiber = b.fibers[t]; fiber.done = false; fiber.linear = t;
      fiber.id = {t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
      getcontext(&fiber.context); fiber.context.uc_stack.ss_sp = fiber.stack.data(); fiber.context.uc_stack.ss_size = kStack; fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
    }
    while (b.live > 0) {
      std::iota(order.begin(), order.end(), 0); if (seed()) std::shuffle(order.begin(), order.end(), random);
      for (int t : order) if (!b.fibers[t].done) { b.current = t; swapcontext(&b.scheduler, &b.fibers[t].context); }
    }
  }
  block = nullptr;
}
template <class T> inline uint64_t word(T v) { static_assert(sizeof(T) <= 8); uint64_t w = 0; std::memcpy(&w, &v, sizeof v); return w; }
template <class T> inline T value(uint64_t w) { T v; std::memcpy(&v, &w, sizeof v); return v; }
}  // namespace emu

#define threadIdx (emu::self().id)
#define blockIdx (emu::block_id)
#define blockDim (emu::block_dim)
#define gridDim (emu::grid_dim)
#define warpSize 32
inline void __syncthreads() { emu::barrier_vote(0); }
inline int __syncthreads_count(int p) { return emu::barrier_vote(p); }
inline int __syncthreads_or(int p) { return emu::barrier_vote(p) != 0; }
inline int __syncthreads_and(int p) { int c = emu::barrier_vote(p); return c == emu::block->votes; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::exchange(mask, 0); }
template <class T> inline T __shfl_sync(unsigned m, T v, int src, int width = 32) { auto p = emu::exchange(m, emu::word(v)); int l = emu::lane(); return emu::value<T>(p[(l & ~(width - 1)) + (src & (width - 1))]); }
template <class T> inline T __shfl_xor_sync(unsigned m, T v, int x, int width = 32) { auto p = emu::exchange(m, emu::word(v)); int l = emu::lane(), s = l ^ x; return emu::value<T>(p[(s & ~(width - 1)) == (l & ~(width - 1)) ? s : l]); }
template <class T> inline T __shfl_down_sync(unsigned m, T v, unsigned d, int width = 32) { auto p = emu::exchange(m, emu::word(v)); int l = emu::lane(), s = l + (int)d; return emu::value<T>(p[(s & ~(width - 1)) == (l & ~(width - 1)) ? s : l]); }
template <class T> inline T __shfl_up_sync(unsigned m, T v, unsigned d, int width = 32) { auto p = emu::exchange(m, emu::word(v)); int l = emu::lane(), s = l - (int)d; return emu::value<T>(p[s >= (l & ~(width - 1)) ? s : l]); }
inline unsigned __ballot_sync(unsigned m, int pred) { auto p = emu::exchange(m, pred != 0); unsigned r = 0; for (int l = 0; l < 32; l++) if (m >> l & 1) r |= (unsigned)(p[l] & 1) << l; return r; }
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }
template <class T> inline unsigned __match_any_sync(unsigned m, T v) { uint64_t w = emu::word(v); auto p = emu::exchange(m, w); unsigned r = 0; for (int l = 0; l < 32; l++) if ((m >> l & 1) && p[l] == w) r |= 1u << l; return r; }
inline unsigned __activemask() { return 0xffffffffu; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline unsigned __brev(unsigned v) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i); return r; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) { uint64_t v = (uint64_t)b << 32 | a; unsigned r = 0; for (int i = 0; i < 4; i++) { unsigned n = s >> 4 * i & 15, x = v >> 8 * (n & 7) & 255; if (n & 8) x = x & 128 ? 255 : 0; r |= x << 8 * i; } return r; }
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) { return (unsigned)(((uint64_t)hi << 32 | lo) >> (s & 31)); }
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) { return (unsigned)(((uint64_t)hi << 32 | lo) << (s & 31) >> 32); }
inline float __uint_as_float(unsigned v) { return emu::value<float>(v); }
inline unsigned __float_as_uint(float v) { return (unsigned)emu::word(v); }
inline float __int_as_float(int v) { return emu::value<float>((unsigned)v); }
inline int __float_as_int(float v) { return (int)emu::word(v); }
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T, class U> inline T atomicAdd(T* p, U v) { T o = *p; *p = (T)(o + (T)v); return o; }
template <class T, class U> inline T atomicSub(T* p, U v) { T o = *p; *p = (T)(o - (T)v); return o; }
template <class T, class U> inline T atomicMax(T* p, U v) { T o = *p; *p = std::max(o, (T)v); return o; }
template <class T, class U> inline T atomicMin(T* p, U v) { T o = *p; *p = std::min(o, (T)v); return o; }
template <class T, class U> inline T atomicExch(T* p, U v) { T o = *p; *p = (T)v; return o; }
template <class T, class U> inline T atomicInc(T* p, U v) { T o = *p; *p = o >= (T)v ? 0 : o + 1; return o; }
template <class T, class U> inline T atomicOr(T* p, U v) { T o = *p; *p = o | (T)v; return o; }
template <class T, class U, class V> inline T atomicCAS(T* p, U c, V v) { T o = *p; if (o == (T)c) *p = (T)v; return o; }
using std::max;
using std::min;

extern "C" {
cudaError_t __attribute__((weak)) cudaGetLastError() { return cudaSuccess; }
cudaError_t __attribute__((weak)) cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t __attribute__((weak)) cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { std::memset(p, v, n); return cudaSuccess; }
cudaError_t __attribute__((weak)) cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) { std::memcpy(d, s, n); return cudaSuccess; }
cudaError_t __attribute__((weak)) cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
cudaError_t __attribute__((weak)) cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch (a) { case cudaDevAttrMultiProcessorCount: *v = 3; break; case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 232448; break; case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrComputeCapabilityMajor: *v = 9; break; case cudaDevAttrComputeCapabilityMinor: *v = 0; break; default: *v = 0; }
  return cudaSuccess;
}
const char* __attribute__((weak)) cudaGetErrorString(cudaError_t) { return "emulated"; }
cudaError_t __attribute__((weak)) cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t __attribute__((weak)) cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 2; return cudaSuccess; }
}
