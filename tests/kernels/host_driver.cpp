// The host driver: a libcuda.so.1 without a GPU, for the functions of CUDA's driver that kvferry.cuda.driver calls.
//
// NVIDIA's own cuda.bindings load it in place of a driver. So what kvferry.cuda.driver passes goes through their
// conversions and arrives here as the real driver would see it: `tests/gpu` runs on a machine without a GPU. Device
// memory is memory of this process, and a kernel is emulation.cpp's, with the arguments that were launched.
//
// Shown by it: types, order and values of arguments; that memory, streams, events and modules are there when they are
// used, and given back; what becomes of refusals; that a cubin has the kernels that are asked for.
// Not shown: asynchrony (every call is done when it returns; tests/unit/played_device.py plays the worst order), the
// machine code of kernels, speed, and whatever real hardware and its driver do that their documentation does not say.
//
// Calls that CUDA leaves undefined are refused, and so are those that it would take and kvferry must not make, such as
// copies from host memory that is not registered. Both are noted as misuses, for some refusals reach nobody.
// host_driver.py has the controls at the end of this file. The functions that move bytes are in host_copies.cpp.

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "host_driver.hpp"

using namespace kvferry;

namespace {

// Constants of cuda.h.
enum Constant : u32 {
  kNonBlockingStream = 1,
  kBlockingSync = 1,
  kDisableTiming = 2,
  kPortable = 1,
  kMemoryType = 2,
  kDeviceOrdinal = 9,
  kHostMemory = 1,
  kDeviceMemory = 2,
  kCapabilityMajor = 75,
  kCapabilityMinor = 76,
  kSymbolFound = 0,
  kSymbolNotFound = 1,
};

constexpr int kLeastPriority = 0, kGreatestPriority = -5;
constexpr int kMajor = 9, kMinor = 0;  // what it calls itself: sm_90
constexpr u64 kMostMemory = 4ull << 30;
constexpr u64 kAlignment = 256;
constexpr u64 kOsPage = 4096;

bool is_mapped(u64 address, u64 nbytes) {
  const u64 first = address / kOsPage * kOsPage;
  return msync(reinterpret_cast<void*>(first), address + nbytes - first, MS_ASYNC) == 0;
}

bool shares_a_page_with_registered(u64 address, u64 nbytes) {
  for (const auto& [first, memory] : driver.memory) {
    const bool is_apart = (first + memory.nbytes - 1) / kOsPage < address / kOsPage ||
                          (address + nbytes - 1) / kOsPage < first / kOsPage;
    if (memory.device < 0 && !is_apart) {
      return true;
    }
  }
  return false;
}

// The device, the context.

int init(u32 flags) {
  Call call("cuInit", false);
  if (call.is_refused() || call.is_misuse(flags != 0, kInvalidValue, "flags")) return call.code;
  driver.is_initialised = driver.num_devices > 0;
  return driver.is_initialised ? kSuccess : kNoDevice;
}

int driver_get_version(int* version) {
  Call call("cuDriverGetVersion", false);
  *version = driver.version;
  return call.code;
}

int device_get_count(int* count) {
  Call call("cuDeviceGetCount", false);
  *count = driver.num_devices;
  return call.code;
}

int device_get(int* device, int index) {
  Call call("cuDeviceGet", false);
  const bool is_there = 0 <= index && index < driver.num_devices;
  if (call.is_refused() || call.is_misuse(!is_there, kInvalidDevice, "no such device")) return call.code;
  *device = index;
  return kSuccess;
}

int device_get_attribute(int* value, u32 attribute, int device) {
  Call call("cuDeviceGetAttribute", false);
  const bool is_there = 0 <= device && device < driver.num_devices;
  if (call.is_refused() || call.is_misuse(!is_there, kInvalidDevice, "no such device")) return call.code;
  const bool is_known = attribute == kCapabilityMajor || attribute == kCapabilityMinor;
  if (call.is_misuse(!is_known, kInvalidValue, "an attribute that nobody needs")) return call.code;
  *value = attribute == kCapabilityMajor ? kMajor : kMinor;
  return kSuccess;
}

int device_primary_ctx_retain(u64* context, int device) {
  Call call("cuDevicePrimaryCtxRetain", false);
  const bool is_there = 0 <= device && device < driver.num_devices;
  if (call.is_refused() || call.is_misuse(!is_there, kInvalidDevice, "no such device")) return call.code;
  *context = context_of(device);
  return kSuccess;
}

int ctx_set_current(u64 context) {
  Call call("cuCtxSetCurrent", false);
  const u64 device = context - context_of(0);
  const bool is_there = device < static_cast<u64>(driver.num_devices);
  if (call.is_refused() || call.is_misuse(!is_there, kInvalidContext, "no such context")) return call.code;
  current_context = context;
  return kSuccess;
}

int ctx_get_stream_priority_range(int* least, int* greatest) {
  Call call("cuCtxGetStreamPriorityRange", true);
  *least = kLeastPriority;
  *greatest = kGreatestPriority;
  return call.code;
}

// Streams and events.

int stream_create_with_priority(u64* stream, u32 flags, int priority) {
  Call call("cuStreamCreateWithPriority", true);
  if (call.is_refused()) return call.code;
  if (call.is_misuse(flags != kNonBlockingStream, kInvalidValue, "a stream that waits for the default stream")) {
    return call.code;
  }
  const bool is_in_range = kGreatestPriority <= priority && priority <= kLeastPriority;
  if (call.is_misuse(!is_in_range, kInvalidValue, "no such priority")) return call.code;
  *stream = *driver.streams.insert(new_handle(Kind::kStream)).first;
  return kSuccess;
}

int stream_create(u64* stream, u32 flags) { return stream_create_with_priority(stream, flags, kLeastPriority); }

int stream_destroy(u64 stream) {
  Call call("cuStreamDestroy", false);
  if (call.is_refused() || call.is_misuse(!driver.streams.erase(stream), kInvalidHandle, "no stream")) return call.code;
  return kSuccess;
}

int stream_wait_event(u64 stream, u64 event, u32 flags) {
  Call call("cuStreamWaitEvent", true);
  if (call.is_refused() || call.is_misuse(!driver.streams.count(stream), kInvalidHandle, "no stream") ||
      call.is_misuse(!driver.events.count(event), kInvalidHandle, "no event") ||
      call.is_misuse(flags != 0, kInvalidValue, "flags")) {
    return call.code;
  }
  return kSuccess;
}

int event_create(u64* event, u32 flags) {
  Call call("cuEventCreate", true);
  const bool is_known = (flags & ~(kBlockingSync | kDisableTiming)) == 0;
  if (call.is_refused() || call.is_misuse(!is_known, kInvalidValue, "flags")) return call.code;
  *event = *driver.events.insert(new_handle(Kind::kEvent)).first;
  return kSuccess;
}

int event_destroy(u64 event) {
  Call call("cuEventDestroy", false);
  if (call.is_refused() || call.is_misuse(!driver.events.erase(event), kInvalidHandle, "no event")) return call.code;
  return kSuccess;
}

int event_record(u64 event, u64 stream) {
  Call call("cuEventRecord", true);
  if (call.is_refused() || call.is_misuse(!driver.events.count(event), kInvalidHandle, "no event") ||
      call.is_misuse(!driver.streams.count(stream), kInvalidHandle, "no stream")) {
    return call.code;
  }
  return kSuccess;
}

int event_synchronize(u64 event) {
  Call call("cuEventSynchronize", true);
  if (call.is_refused() || call.is_misuse(!driver.events.count(event), kInvalidHandle, "no event")) return call.code;
  return kSuccess;
}

// Memory.

int mem_alloc(u64* address, u64 nbytes) {
  Call call("cuMemAlloc", true);
  if (call.is_refused() || call.is_misuse(nbytes == 0, kInvalidValue, "no bytes")) return call.code;
  if (nbytes > kMostMemory) return kOutOfMemory;
  const u64 rounded = (nbytes + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded);
  if (memory == nullptr) return kOutOfMemory;
  std::memset(memory, 0xdd, rounded);
  *address = reinterpret_cast<u64>(memory);
  driver.memory[*address] = {nbytes, current_device()};
  return kSuccess;
}

int mem_free(u64 address) {
  Call call("cuMemFree", true);
  if (call.is_refused()) return call.code;
  const auto found = driver.memory.find(address);
  const bool is_allocated = found != driver.memory.end() && found->second.device >= 0;
  if (call.is_misuse(!is_allocated, kInvalidValue, "not the beginning of device memory")) return call.code;
  std::free(reinterpret_cast<void*>(address));
  driver.memory.erase(found);
  return kSuccess;
}

int mem_host_register(u64 address, u64 nbytes, u32 flags) {
  Call call("cuMemHostRegister", true);
  if (call.is_refused() || call.is_misuse(flags != kPortable, kInvalidValue, "flags") ||
      call.is_misuse(nbytes == 0 || !is_mapped(address, nbytes), kInvalidValue, "not this process's memory")) {
    return call.code;
  }
  if (shares_a_page_with_registered(address, nbytes)) return kAlreadyRegistered;
  driver.memory[address] = {nbytes, -1};
  return kSuccess;
}

int mem_host_unregister(u64 address) {
  Call call("cuMemHostUnregister", true);
  if (call.is_refused()) return call.code;
  const auto found = driver.memory.find(address);
  const bool is_registered = found != driver.memory.end() && found->second.device < 0;
  if (call.is_misuse(!is_registered, kNotRegistered, "not the beginning of registered memory")) return call.code;
  const bool is_there = is_mapped(address, found->second.nbytes);
  driver.memory.erase(found);
  return call.is_misuse(!is_there, kInvalidValue, "memory that is unmapped already") ? call.code : kSuccess;
}

int pointer_get_attribute(u32* value, u32 attribute, u64 address) {
  Call call("cuPointerGetAttribute", true);
  const bool is_known = attribute == kMemoryType || attribute == kDeviceOrdinal;
  if (call.is_refused() || call.is_misuse(!is_known, kInvalidValue, "an attribute that nobody needs")) return call.code;
  const auto* found = memory_of(address, 1);
  if (found == nullptr) return kInvalidValue;
  const bool is_device = found->second.device >= 0;
  if (attribute == kMemoryType) {
    *value = is_device ? kDeviceMemory : kHostMemory;
  } else {
    *value = is_device ? found->second.device : current_device();
  }
  return kSuccess;
}

int get_proc_address(const char* symbol, void** function, int version, u64 flags, int* status);

struct Symbol {
  const char* name;
  int since, until;  // CUDA's versions that ask for this form of it
  void* function;
};

constexpr int kForever = 1 << 30;

const Symbol symbols[] = {
    {"cuInit", 2000, kForever, reinterpret_cast<void*>(init)},
    {"cuDriverGetVersion", 2020, kForever, reinterpret_cast<void*>(driver_get_version)},
    {"cuGetProcAddress", 12000, kForever, reinterpret_cast<void*>(get_proc_address)},
    {"cuDeviceGetCount", 2000, kForever, reinterpret_cast<void*>(device_get_count)},
    {"cuDeviceGet", 2000, kForever, reinterpret_cast<void*>(device_get)},
    {"cuDeviceGetAttribute", 2000, kForever, reinterpret_cast<void*>(device_get_attribute)},
    {"cuDevicePrimaryCtxRetain", 7000, kForever, reinterpret_cast<void*>(device_primary_ctx_retain)},
    {"cuCtxSetCurrent", 4000, kForever, reinterpret_cast<void*>(ctx_set_current)},
    {"cuCtxGetStreamPriorityRange", 5050, kForever, reinterpret_cast<void*>(ctx_get_stream_priority_range)},
    {"cuStreamCreate", 2000, kForever, reinterpret_cast<void*>(stream_create)},
    {"cuStreamCreateWithPriority", 5050, kForever, reinterpret_cast<void*>(stream_create_with_priority)},
    {"cuStreamDestroy", 4000, kForever, reinterpret_cast<void*>(stream_destroy)},
    {"cuStreamWaitEvent", 3020, kForever, reinterpret_cast<void*>(stream_wait_event)},
    {"cuEventCreate", 2000, kForever, reinterpret_cast<void*>(event_create)},
    {"cuEventDestroy", 4000, kForever, reinterpret_cast<void*>(event_destroy)},
    {"cuEventRecord", 2000, kForever, reinterpret_cast<void*>(event_record)},
    {"cuEventSynchronize", 2000, kForever, reinterpret_cast<void*>(event_synchronize)},
    {"cuMemAlloc", 3020, kForever, reinterpret_cast<void*>(mem_alloc)},
    {"cuMemFree", 3020, kForever, reinterpret_cast<void*>(mem_free)},
    {"cuMemHostRegister", 6050, kForever, reinterpret_cast<void*>(mem_host_register)},
    {"cuMemHostUnregister", 4000, kForever, reinterpret_cast<void*>(mem_host_unregister)},
    {"cuPointerGetAttribute", 4000, kForever, reinterpret_cast<void*>(pointer_get_attribute)},
    {"cuMemcpyAsync", 4000, kForever, reinterpret_cast<void*>(memcpy_async)},
    {"cuMemcpyBatchAsync", 12080, 13000, reinterpret_cast<void*>(memcpy_batch_async)},
    {"cuModuleLoadData", 2000, kForever, reinterpret_cast<void*>(module_load_data)},
    {"cuModuleUnload", 2000, kForever, reinterpret_cast<void*>(module_unload)},
    {"cuModuleGetFunction", 2000, kForever, reinterpret_cast<void*>(module_get_function)},
    {"cuLaunchKernel", 4000, kForever, reinterpret_cast<void*>(launch_kernel)},
};

int get_proc_address(const char* symbol, void** function, int version, u64 flags, int* status) {
  std::lock_guard<std::mutex> lock(driver.mutex);
  *function = nullptr;
  int found = kSymbolNotFound;
  if (flags > 2 || version > driver.version) return kInvalidValue;
  for (const Symbol& known : symbols) {
    if (std::strcmp(symbol, known.name) == 0 && known.since <= version && version < known.until) {
      *function = known.function;
      found = kSymbolFound;
    }
  }
  if (status != nullptr) {
    *status = found;
  }
  return kSuccess;
}

}  // namespace

// By this one function the bindings find all the others.
extern "C" int cuGetProcAddress_v2(const char* symbol, void** function, int version, u64 flags, int* status) {
  return get_proc_address(symbol, function, version, flags, status);
}

// Begins anew, with what nobody has given back yet.
extern "C" void host_driver_set(int version, int num_devices) {
  std::lock_guard<std::mutex> lock(driver.mutex);
  driver.version = version;
  driver.num_devices = num_devices;
  driver.is_initialised = false;
  driver.refusals.clear();
  driver.misuses.clear();
}

// Has a function answer nothing but a code, until 0 is given.
extern "C" void host_driver_refuse(const char* function, int code) {
  std::lock_guard<std::mutex> lock(driver.mutex);
  driver.refusals[function] = code;
  if (code == kSuccess) {
    driver.refusals.erase(function);
  }
}

// Copies the misuses so far, a line for each, and forgets them.
extern "C" void host_driver_take_misuses(char* text, u64 nbytes) {
  std::lock_guard<std::mutex> lock(driver.mutex);
  std::snprintf(text, nbytes, "%s", driver.misuses.c_str());
  driver.misuses.clear();
}

// What was made and not given back.
struct Left {
  u64 allocations, registrations, streams, events, modules;
};

extern "C" void host_driver_left(Left* left) {
  std::lock_guard<std::mutex> lock(driver.mutex);
  *left = {0, 0, driver.streams.size(), driver.events.size(), driver.modules.size()};
  for (const auto& [address, memory] : driver.memory) {
    (memory.device < 0 ? left->registrations : left->allocations) += 1;
  }
}
