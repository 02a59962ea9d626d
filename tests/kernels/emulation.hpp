// What emulation.cpp offers: a kernel's launch, run on the host.

#pragma once

#include "geometry.cuh"

namespace kvferry {

// What a launch did; emulation.py has its twin.
struct Report {
  u64 bytes_stored;
  u64 misaligned;
  u64 outside;
};

}  // namespace kvferry

// Runs a gather or a scatter by vectors of `width` bytes as `num_threads` threads would. Accesses that a GPU would
// fault on, or that leave source and target, are left out and counted. Returns 1 where there is no such width.
extern "C" int emulate(int is_gather, kvferry::u32 width, const kvferry::Geometry* g,
                       const kvferry::i64* layer_offsets, const kvferry::u8* source, kvferry::u64 source_bytes,
                       kvferry::u8* target, kvferry::u64 target_bytes, const kvferry::i32* page_ids,
                       kvferry::i32 num_pages, kvferry::u64 num_threads, kvferry::Report* report);
