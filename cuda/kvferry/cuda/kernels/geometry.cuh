// What a kernel knows about one page of a shard, and which bytes one thread moves at each of its steps.
//
// Compiled by NVRTC for the GPU and by a host compiler for the emulation in tests/kernels: no headers, no intrinsics,
// fixed widths only. `Geometry` is the twin of `CopyGeometry.pack()` in geometry.py; tests/kernels compares the two.

#pragma once

#ifdef __CUDACC__
#define KVFERRY_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KVFERRY_HOST_DEVICE inline
#endif

namespace kvferry {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "fixed widths");

// One thread moves up to this many vectors of a run at a time: all loads first, then all stores.
constexpr u32 kVectorsPerThread = 4;

// Strides and sizes in bytes. A run is contiguous in the page and in the shard. Dimensions that were folded into the
// run have one step.
struct Geometry {
  i64 page_stride;         // engine pages: from one page to the next
  i64 head_page_stride;    // within a page
  i64 token_page_stride;
  i64 kv_page_stride;
  i64 shard_bytes;         // from one shard to the next
  i64 page_shard_stride;   // within a shard: from one page of the block to the next
  i64 head_shard_stride;
  i64 layer_shard_stride;
  i64 token_shard_stride;
  i64 kv_shard_stride;
  i64 run_bytes;
  u32 num_heads;
  u32 num_layers;          // entries of layer_offsets
  u32 num_tokens;
  u32 num_kv;
  u32 pages_per_block;
  u32 lanes_log2;          // 2^lanes_log2 neighbouring threads share a stretch of lanes * kVectorsPerThread vectors
  u32 slices;              // lanes * (stretches of a run, rounded up)
};

static_assert(sizeof(Geometry) == 11 * 8 + 7 * 4 + 4, "padding at the end only");

// The number of a thread's work in mixed radix, least significant digit first. All digits but the last are below
// the size of their dimension.
struct Place {
  u32 slice;  // stretch * lanes + lane: what one thread moves of a run at one step
  u32 kv;
  u32 token;
  u32 layer;
  u32 head;
  u32 page;   // of the block
  u32 shard;
};

KVFERRY_HOST_DEVICE u32 take_digit(u64& number, u32 size) {
  const u32 digit = static_cast<u32>(number % size);
  number /= size;
  return digit;
}

// Splits a number into digits. Divides, so this is done once per thread and not at each step.
KVFERRY_HOST_DEVICE Place place_of(const Geometry& g, u64 number) {
  Place place;
  place.slice = take_digit(number, g.slices);
  place.kv = take_digit(number, g.num_kv);
  place.token = take_digit(number, g.num_tokens);
  place.layer = take_digit(number, g.num_layers);
  place.head = take_digit(number, g.num_heads);
  place.page = take_digit(number, g.pages_per_block);
  place.shard = static_cast<u32>(number);
  return place;
}

// Adds to a digit and returns the carry. Sizes stay below 2^31, so the sum does not wrap.
KVFERRY_HOST_DEVICE u32 add_digit(u32& digit, u32 step, u32 carry, u32 size) {
  const u32 sum = digit + step + carry;
  const bool is_over = sum >= size;
  digit = is_over ? sum - size : sum;
  return is_over ? 1 : 0;
}

// Adds the digits of `step`: additions and comparisons instead of divisions.
KVFERRY_HOST_DEVICE void advance(Place& place, const Place& step, const Geometry& g) {
  u32 carry = add_digit(place.slice, step.slice, 0, g.slices);
  carry = add_digit(place.kv, step.kv, carry, g.num_kv);
  carry = add_digit(place.token, step.token, carry, g.num_tokens);
  carry = add_digit(place.layer, step.layer, carry, g.num_layers);
  carry = add_digit(place.head, step.head, carry, g.num_heads);
  carry = add_digit(place.page, step.page, carry, g.pages_per_block);
  place.shard += step.shard + carry;
}

// The place's entry of page_ids.
KVFERRY_HOST_DEVICE u64 page_index(const Place& place, const Geometry& g) {
  return static_cast<u64>(place.shard) * g.pages_per_block + place.page;
}

// First byte of the place's run in the engine's memory.
KVFERRY_HOST_DEVICE i64 run_in_pages(const Place& place, const Geometry& g, const i64* layer_offsets, i32 page_id) {
  return layer_offsets[place.layer] + page_id * g.page_stride + place.head * g.head_page_stride +
         place.token * g.token_page_stride + place.kv * g.kv_page_stride;
}

// First byte of the place's run in the shards.
KVFERRY_HOST_DEVICE i64 run_in_shards(const Place& place, const Geometry& g) {
  return place.shard * g.shard_bytes + place.page * g.page_shard_stride + place.head * g.head_shard_stride +
         place.layer * g.layer_shard_stride + place.token * g.token_shard_stride + place.kv * g.kv_shard_stride;
}

// The place's first byte within its run; its others follow at distances of `lanes` vectors.
KVFERRY_HOST_DEVICE i64 first_in_run(const Place& place, const Geometry& g, u32 vector_bytes) {
  const u32 stretch = place.slice >> g.lanes_log2;
  const u32 lane = place.slice - (stretch << g.lanes_log2);
  return ((static_cast<i64>(stretch) * kVectorsPerThread << g.lanes_log2) + lane) * vector_bytes;
}

}  // namespace kvferry
