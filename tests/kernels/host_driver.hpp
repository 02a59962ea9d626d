// What the host driver knows, and how each of its functions begins. See host_driver.cpp.

#pragma once

#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "geometry.cuh"

namespace kvferry {

// CUresult, as far as it is answered here.
enum Code : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500,
  kIllegalAddress = 700,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
  kMisalignedAddress = 716,
};

// What a handle is of. Handles of different kinds differ, and none is used a second time.
enum class Kind : u64 { kContext = 1, kStream, kEvent, kModule, kFunction };

struct Memory {
  u64 nbytes;
  int device;  // -1: host memory that is registered
};

struct Function {
  u64 module;
  bool is_gather;
  u32 width;
};

struct Driver {
  std::mutex mutex;
  bool is_initialised = false;
  int version = 13000;
  int num_devices = 1;
  u64 handles_made = 0;
  std::map<std::string, int> refusals;
  std::string misuses;
  std::map<u64, Memory> memory;  // by its first address, both kinds
  std::set<u64> streams, events;
  std::map<u64, std::set<std::string>> modules;  // the kernels of each
  std::map<u64, Function> functions;
};

// Never destroyed: streams and events are, by Python, while the process ends.
inline Driver& driver = *new Driver;
inline thread_local u64 current_context = 0;

inline u64 new_handle(Kind kind) { return static_cast<u64>(kind) << 40 | ++driver.handles_made << 4; }

inline u64 context_of(int device) { return static_cast<u64>(Kind::kContext) << 40 | (device + 1); }

inline int current_device() { return static_cast<int>(current_context & 0xff) - 1; }

// One call of one of the functions, one at a time.
class Call {
 public:
  // `needs_context`: it is refused to a thread that has made none current.
  Call(const char* name, bool needs_context) : name_(name), lock_(driver.mutex) {
    const auto refusal = driver.refusals.find(name);
    if (!driver.is_initialised && std::strcmp(name, "cuInit") != 0) {
      misused(kNotInitialized, "before cuInit");
    } else if (refusal != driver.refusals.end()) {
      code = refusal->second;
    } else if (needs_context && current_context == 0) {
      misused(kInvalidContext, "by a thread without a context");
    }
  }

  bool is_refused() const { return code != kSuccess; }

  // Refuses a call that nobody should make, and notes it.
  bool is_misuse(bool is_wrong, int refusal, const char* what) {
    if (is_wrong) {
      misused(refusal, what);
    }
    return is_wrong;
  }

  int code = kSuccess;

 private:
  void misused(int refusal, const char* what) {
    code = refusal;
    driver.misuses += std::string(name_) + ": " + what + "\n";
  }

  const char* name_;
  std::lock_guard<std::mutex> lock_;
};

// The memory that holds all of these bytes, or null.
inline const std::pair<const u64, Memory>* memory_of(u64 address, u64 nbytes) {
  auto behind = driver.memory.upper_bound(address);
  if (behind == driver.memory.begin()) {
    return nullptr;
  }
  const auto& found = *--behind;
  const u64 offset = address - found.first;
  const bool is_inside = offset < found.second.nbytes && nbytes <= found.second.nbytes - offset;
  return is_inside ? &found : nullptr;
}

// The bytes from an address on to the end of its device memory; 0 where it is none of the current device.
inline u64 device_bytes_behind(u64 address) {
  const auto* found = memory_of(address, 1);
  const bool is_here = found != nullptr && found->second.device == current_device();
  return is_here ? found->first + found->second.nbytes - address : 0;
}

// host_copies.cpp: the functions that move bytes.

struct CopyAttributes;

int memcpy_async(u64 target, u64 source, u64 nbytes, u64 stream);
int memcpy_batch_async(const u64* targets, const u64* sources, const u64* sizes, u64 count,
                       const CopyAttributes* attributes, const u64* first_copies, u64 num_attributes, u64* failed,
                       u64 stream);
int module_load_data(u64* module, const u8* image);
int module_unload(u64 module);
int module_get_function(u64* function, u64 module, const char* name);
int launch_kernel(u64 function, u32 grid_x, u32 grid_y, u32 grid_z, u32 block_x, u32 block_y, u32 block_z,
                  u32 shared_bytes, u64 stream, void** arguments, void** extra);

}  // namespace kvferry
