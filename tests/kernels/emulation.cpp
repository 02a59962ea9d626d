// Runs the kernels' copy loop on the host, one thread after the other, and checks every access.

#include <cstddef>
#include <cstring>

#include "emulation.hpp"
#include "strided_copy.cuh"

using namespace kvferry;

namespace {

template <u32 width>
struct alignas(width) Vector {
  u8 bytes[width];
};

struct Span {
  const u8* base;
  u64 size;

  bool holds(const u8* address, u64 width) const {
    const u64 first = reinterpret_cast<u64>(address), base_address = reinterpret_cast<u64>(base);
    return first >= base_address && first + width <= base_address + size;
  }
};

// Refuses and counts accesses that a GPU would fault on, or that leave the memory that was given.
struct CheckedMemory {
  Span source;
  Span target;
  Report* report;

  bool is_good(const Span& span, const u8* address, u64 width) const {
    const bool is_aligned = reinterpret_cast<u64>(address) % width == 0;
    const bool is_inside = span.holds(address, width);
    report->misaligned += !is_aligned;
    report->outside += !is_inside;
    return is_aligned && is_inside;
  }

  template <typename V>
  V load(const u8* address) const {
    V vector = {};
    if (is_good(source, address, sizeof(V))) {
      std::memcpy(&vector, address, sizeof(V));
    }
    return vector;
  }

  template <typename V>
  void store(u8* address, const V& vector) const {
    if (is_good(target, address, sizeof(V))) {
      std::memcpy(address, &vector, sizeof(V));
      report->bytes_stored += sizeof(V);
    }
  }
};

template <Direction direction, u32 width>
void run(const CheckedMemory& memory, const Geometry& g, const i64* layer_offsets, u8* target, const i32* page_ids,
         i32 num_pages, u64 num_threads) {
  for (u64 thread = 0; thread < num_threads; ++thread) {
    strided_copy<direction, Vector<width>>(memory, g, layer_offsets, memory.source.base, target, page_ids, num_pages,
                                           thread, num_threads);
  }
}

template <Direction direction>
int run_width(u32 width, const CheckedMemory& memory, const Geometry& g, const i64* layer_offsets, u8* target,
              const i32* page_ids, i32 num_pages, u64 num_threads) {
  switch (width) {
    case 16: run<direction, 16>(memory, g, layer_offsets, target, page_ids, num_pages, num_threads); return 0;
    case 8: run<direction, 8>(memory, g, layer_offsets, target, page_ids, num_pages, num_threads); return 0;
    case 4: run<direction, 4>(memory, g, layer_offsets, target, page_ids, num_pages, num_threads); return 0;
    case 2: run<direction, 2>(memory, g, layer_offsets, target, page_ids, num_pages, num_threads); return 0;
    case 1: run<direction, 1>(memory, g, layer_offsets, target, page_ids, num_pages, num_threads); return 0;
    default: return 1;
  }
}

}  // namespace

extern "C" int emulate(int is_gather, u32 width, const Geometry* g, const i64* layer_offsets, const u8* source,
                       u64 source_bytes, u8* target, u64 target_bytes, const i32* page_ids, i32 num_pages,
                       u64 num_threads, Report* report) {
  const CheckedMemory memory{{source, source_bytes}, {target, target_bytes}, report};
  const auto copy = is_gather ? run_width<Direction::kGather> : run_width<Direction::kScatter>;
  return copy(width, memory, *g, layer_offsets, target, page_ids, num_pages, num_threads);
}

#define FIELD(name) #name, offsetof(Geometry, name), sizeof(Geometry::name)

struct Field {
  const char* name;
  u64 offset;
  u64 size;
};

// The struct as the compiler laid it out, ended by an entry that has no name and the struct's size.
extern "C" const Field geometry_fields[] = {
    {FIELD(page_stride)},        {FIELD(head_page_stride)},  {FIELD(token_page_stride)},  {FIELD(kv_page_stride)},
    {FIELD(shard_bytes)},        {FIELD(page_shard_stride)}, {FIELD(head_shard_stride)},  {FIELD(layer_shard_stride)},
    {FIELD(token_shard_stride)}, {FIELD(kv_shard_stride)},   {FIELD(run_bytes)},          {FIELD(num_heads)},
    {FIELD(num_layers)},         {FIELD(num_tokens)},        {FIELD(num_kv)},             {FIELD(pages_per_block)},
    {FIELD(lanes_log2)},         {FIELD(slices)},            {nullptr, sizeof(Geometry), 0},
};

extern "C" const u32 vectors_per_thread = kVectorsPerThread;
