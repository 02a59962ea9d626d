// Gather (engine pages to shards) and scatter (shards to engine pages), one kernel for each vector width.
//
// Grid: one-dimensional, as many thread blocks as the caller grants; each thread goes on with a stride of the whole
// grid, so any grid is right. Block: a multiple of 32 threads, at most kThreadsPerBlock.
// One thread moves up to 4 vectors of 16, 8, 4, 2 or 1 bytes at each step; all addresses are multiples of the width.
// No shared memory, no atomics, no synchronisation.
// Checked against HostStaging (kvferry/connector/staging.py) by tests/kernels/test_emulation.py.

#include "strided_copy.cuh"

namespace kvferry {

constexpr int kThreadsPerBlock = 1024;

// Pages and shards are touched once: streaming accesses ask the caches to keep what the model uses instead.
struct StreamingMemory {
  template <typename Vector>
  __device__ __forceinline__ Vector load(const u8* address) const {
    return __ldcs(reinterpret_cast<const Vector*>(address));
  }
  template <typename Vector>
  __device__ __forceinline__ void store(u8* address, Vector vector) const {
    __stcs(reinterpret_cast<Vector*>(address), vector);
  }
};

template <Direction direction, typename Vector>
__device__ __forceinline__ void run(const Geometry& g, const i64* layer_offsets, const u8* source, u8* target,
                                    const i32* page_ids, i32 num_pages) {
  const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const u64 num_threads = static_cast<u64>(gridDim.x) * blockDim.x;
  strided_copy<direction, Vector>(StreamingMemory{}, g, layer_offsets, source, target, page_ids, num_pages, thread,
                                  num_threads);
}

}  // namespace kvferry

#define KVFERRY_KERNELS(width, Vector)                                                                        \
  extern "C" __global__ void __launch_bounds__(kvferry::kThreadsPerBlock) kvferry_gather_v##width(            \
      const kvferry::Geometry geometry, const kvferry::i64* __restrict__ layer_offsets,                       \
      const kvferry::u8* __restrict__ pages, kvferry::u8* __restrict__ shards,                                \
      const kvferry::i32* __restrict__ page_ids, kvferry::i32 num_pages) {                                    \
    kvferry::run<kvferry::Direction::kGather, Vector>(geometry, layer_offsets, pages, shards, page_ids,       \
                                                      num_pages);                                             \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kvferry::kThreadsPerBlock) kvferry_scatter_v##width(           \
      const kvferry::Geometry geometry, const kvferry::i64* __restrict__ layer_offsets,                       \
      kvferry::u8* __restrict__ pages, const kvferry::u8* __restrict__ shards,                                \
      const kvferry::i32* __restrict__ page_ids, kvferry::i32 num_pages) {                                    \
    kvferry::run<kvferry::Direction::kScatter, Vector>(geometry, layer_offsets, shards, pages, page_ids,      \
                                                       num_pages);                                            \
  }

KVFERRY_KERNELS(16, uint4)
KVFERRY_KERNELS(8, uint2)
KVFERRY_KERNELS(4, unsigned int)
KVFERRY_KERNELS(2, unsigned short)
KVFERRY_KERNELS(1, unsigned char)
