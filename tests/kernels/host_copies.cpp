// The host driver's functions that move bytes: copies, and kernels. See host_driver.cpp.

#include <elf.h>

#include <cstdio>
#include <cstring>
#include <set>
#include <string>

#include "emulation.hpp"
#include "host_driver.hpp"

namespace kvferry {

namespace {

constexpr int kInStreamOrder = 1;  // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
constexpr u16 kCudaMachine = 190;  // EM_CUDA

bool is_bad_copy(Call& call, u64 target, u64 source, u64 nbytes) {
  const bool is_apart = target + nbytes <= source || source + nbytes <= target;
  return call.is_misuse(nbytes == 0, kInvalidValue, "a copy of nothing") ||
         call.is_misuse(!memory_of(target, nbytes), kInvalidValue, "to memory that it does not know") ||
         call.is_misuse(!memory_of(source, nbytes), kInvalidValue, "from memory that it does not know") ||
         call.is_misuse(!is_apart, kInvalidValue, "onto itself");
}

void copy(u64 target, u64 source, u64 nbytes) {
  std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), nbytes);
}

}  // namespace

int memcpy_async(u64 target, u64 source, u64 nbytes, u64 stream) {
  Call call("cuMemcpyAsync", true);
  if (call.is_refused() || call.is_misuse(!driver.streams.count(stream), kInvalidHandle, "no stream") ||
      is_bad_copy(call, target, source, nbytes)) {
    return call.code;
  }
  copy(target, source, nbytes);
  return kSuccess;
}

struct Location {
  int type;
  int id;
};

struct CopyAttributes {
  int source_access_order;
  Location source;
  Location target;
  u32 flags;
};

static_assert(sizeof(CopyAttributes) == 24, "as in cuda.h");

// The form of CUDA 12.8, which tells the copy that failed.
int memcpy_batch_async(const u64* targets, const u64* sources, const u64* sizes, u64 count,
                       const CopyAttributes* attributes, const u64* first_copies, u64 num_attributes, u64* failed,
                       u64 stream) {
  Call call("cuMemcpyBatchAsync", true);
  *failed = ~0ull;
  if (call.is_refused() || call.is_misuse(!driver.streams.count(stream), kInvalidHandle, "no stream") ||
      call.is_misuse(count == 0 || num_attributes != 1, kInvalidValue, "counts") ||
      call.is_misuse(first_copies[0] != 0, kInvalidValue, "attributes that the first copy has not")) {
    return call.code;
  }
  const CopyAttributes& all = attributes[0];
  const bool has_hints = all.source.type || all.source.id || all.target.type || all.target.id;
  if (call.is_misuse(all.source_access_order != kInStreamOrder, kInvalidValue, "sources read out of order") ||
      call.is_misuse(has_hints || all.flags != 0, kInvalidValue, "hints and flags")) {
    return call.code;
  }
  for (u64 index = 0; index < count; ++index) {
    if (is_bad_copy(call, targets[index], sources[index], sizes[index])) {
      *failed = index;
      return call.code;
    }
  }
  for (u64 index = 0; index < count; ++index) {
    copy(targets[index], sources[index], sizes[index]);
  }
  return kSuccess;
}

namespace {

// The kernels of a cubin: the sections of code in an ELF file.
std::set<std::string> kernels_of(const u8* image) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff);
  const char* names = reinterpret_cast<const char*>(image + sections[header->e_shstrndx].sh_offset);
  const std::string code = ".text.";
  std::set<std::string> kernels;
  for (u32 index = 0; index < header->e_shnum; ++index) {
    const std::string name = names + sections[index].sh_name;
    if (name.compare(0, code.size(), code) == 0) {
      kernels.insert(name.substr(code.size()));
    }
  }
  return kernels;
}

}  // namespace

int module_load_data(u64* module, const u8* image) {
  Call call("cuModuleLoadData", true);
  if (call.is_refused()) return call.code;
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
  if (std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_machine != kCudaMachine) return kInvalidImage;
  *module = new_handle(Kind::kModule);
  driver.modules[*module] = kernels_of(image);
  return kSuccess;
}

int module_unload(u64 module) {
  Call call("cuModuleUnload", true);
  if (call.is_refused() || call.is_misuse(!driver.modules.erase(module), kInvalidHandle, "no module")) return call.code;
  return kSuccess;
}

int module_get_function(u64* function, u64 module, const char* name) {
  Call call("cuModuleGetFunction", true);
  if (call.is_refused()) return call.code;
  const auto found = driver.modules.find(module);
  if (call.is_misuse(found == driver.modules.end(), kInvalidHandle, "no module")) return call.code;
  char direction[8] = "";
  u32 width = 0;
  if (!found->second.count(name) || std::sscanf(name, "kvferry_%7[a-z]_v%u", direction, &width) != 2) return kNotFound;
  *function = new_handle(Kind::kFunction);
  driver.functions[*function] = {module, std::strcmp(direction, "gather") == 0, width};
  return kSuccess;
}

namespace {

template <typename T>
T argument(void** arguments, int index) {
  T value;
  std::memcpy(&value, arguments[index], sizeof(T));
  return value;
}

// Runs a kernel on the arguments that staging.cu declares: geometry, layer offsets, pages, shards, page ids, and how
// many these are.
int run_kernel(Call& call, const Function& kernel, u64 num_threads, void** arguments) {
  const auto geometry = argument<Geometry>(arguments, 0);
  const auto offsets = argument<u64>(arguments, 1), pages = argument<u64>(arguments, 2),
             shards = argument<u64>(arguments, 3), page_ids = argument<u64>(arguments, 4);
  const auto num_pages = argument<i32>(arguments, 5);
  const u64 pages_bytes = device_bytes_behind(pages), shards_bytes = device_bytes_behind(shards);
  if (call.is_misuse(num_pages < 1, kInvalidValue, "a kernel without pages") ||
      call.is_misuse(device_bytes_behind(offsets) < geometry.num_layers * sizeof(i64), kIllegalAddress,
                     "layer offsets that are not in device memory") ||
      call.is_misuse(device_bytes_behind(page_ids) < num_pages * sizeof(i32), kIllegalAddress,
                     "page ids that are not in device memory") ||
      call.is_misuse(!pages_bytes || !shards_bytes, kIllegalAddress, "pages or shards that are not in device memory")) {
    return call.code;
  }
  const bool is_gather = kernel.is_gather;
  Report report = {};
  const int is_unknown =
      emulate(is_gather, kernel.width, &geometry, reinterpret_cast<const i64*>(offsets),
              reinterpret_cast<const u8*>(is_gather ? pages : shards), is_gather ? pages_bytes : shards_bytes,
              reinterpret_cast<u8*>(is_gather ? shards : pages), is_gather ? shards_bytes : pages_bytes,
              reinterpret_cast<const i32*>(page_ids), num_pages, num_threads, &report);
  if (call.is_misuse(is_unknown, kInvalidHandle, "a width that no kernel has") ||
      call.is_misuse(report.misaligned, kMisalignedAddress, "misaligned accesses") ||
      call.is_misuse(report.outside, kIllegalAddress, "accesses outside of device memory")) {
    return call.code;
  }
  return kSuccess;
}

}  // namespace

int launch_kernel(u64 function, u32 grid_x, u32 grid_y, u32 grid_z, u32 block_x, u32 block_y, u32 block_z,
                  u32 shared_bytes, u64 stream, void** arguments, void** extra) {
  Call call("cuLaunchKernel", true);
  if (call.is_refused()) return call.code;
  const auto found = driver.functions.find(function);
  const bool is_loaded = found != driver.functions.end() && driver.modules.count(found->second.module);
  const bool is_line = grid_x >= 1 && grid_y == 1 && grid_z == 1 && block_y == 1 && block_z == 1;
  const bool is_whole = block_x >= 32 && block_x <= 1024 && block_x % 32 == 0;
  if (call.is_misuse(!is_loaded, kInvalidHandle, "no kernel, or its module is unloaded") ||
      call.is_misuse(!driver.streams.count(stream), kInvalidHandle, "no stream") ||
      call.is_misuse(!is_line, kInvalidValue, "a grid of more than one dimension, or of none") ||
      call.is_misuse(!is_whole, kInvalidValue, "thread blocks that are not 1 to 32 whole warps") ||
      call.is_misuse(shared_bytes != 0, kInvalidValue, "shared memory, which no kernel uses") ||
      call.is_misuse(arguments == nullptr || extra != nullptr, kInvalidValue, "arguments in another form")) {
    return call.code;
  }
  return run_kernel(call, found->second, static_cast<u64>(grid_x) * block_x, arguments);
}

}  // namespace kvferry
