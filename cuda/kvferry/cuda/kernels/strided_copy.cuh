// The copy loop of every kernel: what one thread of many does. Direction and vector width are template arguments.
//
// `Memory` loads and stores one vector: streaming accesses on the GPU, checked ones in the emulation. A thread neither
// reads what another writes nor writes where another does, as long as the pages' own strides do not make two runs
// overlap; there is no shared memory and no order between threads.

#pragma once

#include "geometry.cuh"

namespace kvferry {

enum class Direction { kGather, kScatter };

// Copies up to kVectorsPerThread vectors, `lanes` vectors apart, that lie before the end of the run.
template <typename Vector, typename Memory>
KVFERRY_HOST_DEVICE void copy_slice(const Memory& memory, const u8* source, u8* target, i64 first, i64 step,
                                    i64 run_bytes) {
  Vector vectors[kVectorsPerThread];
  for (u32 i = 0; i < kVectorsPerThread; ++i) {
    if (first + i * step < run_bytes) {
      vectors[i] = memory.template load<Vector>(source + first + i * step);
    }
  }
  for (u32 i = 0; i < kVectorsPerThread; ++i) {
    if (first + i * step < run_bytes) {
      memory.template store<Vector>(target + first + i * step, vectors[i]);
    }
  }
}

// Does thread `thread`'s part of a copy that `num_threads` threads share; any number of them covers everything once.
//
// page_ids[i] is where page i % pages_per_block of shard i / pages_per_block lies; a page with a negative id is left
// out, its bytes are touched on neither side. Other ids are not checked here: the caller has done so.
template <Direction direction, typename Vector, typename Memory>
KVFERRY_HOST_DEVICE void strided_copy(const Memory& memory, const Geometry& g, const i64* layer_offsets,
                                      const u8* source, u8* target, const i32* page_ids, i32 num_pages,
                                      u64 thread, u64 num_threads) {
  const i64 vector_step = static_cast<i64>(sizeof(Vector)) << g.lanes_log2;
  const Place step = place_of(g, num_threads);
  Place place = place_of(g, thread);
  for (; page_index(place, g) < static_cast<u64>(num_pages); advance(place, step, g)) {
    const i32 page_id = page_ids[page_index(place, g)];
    if (page_id < 0) {
      continue;
    }
    const i64 in_pages = run_in_pages(place, g, layer_offsets, page_id);
    const i64 in_shards = run_in_shards(place, g);
    constexpr bool is_gather = direction == Direction::kGather;
    copy_slice<Vector>(memory, source + (is_gather ? in_pages : in_shards), target + (is_gather ? in_shards : in_pages),
                       first_in_run(place, g, sizeof(Vector)), vector_step, g.run_bytes);
  }
}

}  // namespace kvferry
