// Device memory: host memory with a limit per device, counted, and poisoned when it is fresh.
//
// Large allocations map one poisoned file again and again, copy on write: memory that is never
// written costs nothing.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "runtime.h"

namespace sim {
namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kPage = 4096;
constexpr size_t kPoisonBytes = 8ull << 20;
constexpr int kPoison = 0xFF;  // NaN in every float type, -1 in every integer

struct Allocation {
  size_t size = 0;    // as asked for
  size_t mapped = 0;  // to unmap; 0 if someone else does
  int device = -1;    // -1: pinned host memory
};

std::mutex g_map_mutex;  // taken last: find_memory is called with and without the runtime's lock

std::map<uintptr_t, Allocation> &allocations() {
  static auto *made = new std::map<uintptr_t, Allocation>;
  return *made;
}

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

int poison_file() {
  static const int file = [] {
    const int made = memfd_create("ascend-plugin-poison", MFD_CLOEXEC);
    if (made < 0 || ftruncate(made, kPoisonBytes)) return -1;
    void *at = mmap(nullptr, kPoisonBytes, PROT_READ | PROT_WRITE, MAP_SHARED, made, 0);
    if (at == MAP_FAILED) return -1;
    memset(at, kPoison, kPoisonBytes);
    munmap(at, kPoisonBytes);
    return made;
  }();
  return file;
}

// With a page behind it that nobody may touch.
char *map_poisoned(size_t bytes) {
  void *at = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  char *base = static_cast<char *>(at);
  mprotect(base + bytes, kPage, PROT_NONE);
  if (bytes < (1 << 20) || poison_file() < 0) {
    memset(base, kPoison, bytes);
    return base;
  }
  for (size_t done = 0; done < bytes; done += kPoisonBytes) {
    const size_t part = std::min(kPoisonBytes, bytes - done);
    mmap(base + done, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
         poison_file(), 0);
  }
  return base;
}

void note(void *base, const Allocation &allocation) {
  std::lock_guard<std::mutex> guard(g_map_mutex);
  allocations()[reinterpret_cast<uintptr_t>(base)] = allocation;
}

bool take_note(void *base, Allocation &allocation) {
  std::lock_guard<std::mutex> guard(g_map_mutex);
  auto it = allocations().find(reinterpret_cast<uintptr_t>(base));
  if (it == allocations().end()) return false;
  allocation = it->second;
  allocations().erase(it);
  return true;
}

aclError allocate(void **pointer, size_t size, const char *caller) {
  // Allowed during a capture: torch_npu allocates there in global mode, for its private pools and
  // for external events, and takes care to relax the mode for what is refused (aclrtMemset).
  Lock lock(g_mutex);
  const int number = current_device();
  if (number < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "%s: no device is set", caller);
  if (!size) return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: 0 bytes", caller);
  const size_t bytes = round_up(size, kAlignment);
  if (aclError code = take_memory(number, bytes, caller)) return code;
  const size_t mapped = round_up(bytes, kPage);
  char *base = map_poisoned(mapped);
  if (!base) {
    give_memory(number, bytes);
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s: the host has no %zu bytes left", caller, size);
  }
  note(base, {bytes, mapped, number});
  *pointer = base;
  return 0;
}

aclError allocate_host(void **pointer, size_t size, const char *caller) {
  if (!size) return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: 0 bytes", caller);
  const size_t mapped = round_up(size, kPage);
  char *base = map_poisoned(mapped);
  if (!base) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s: the host has no %zu bytes left", caller, size);
  }
  note(base, {size, mapped, -1});
  *pointer = base;
  return 0;
}

}  // namespace

// Virtual memory is mapped piece by piece: neighbours on one device are one stretch of memory.
bool continues(const Allocation &first, const Allocation &next) {
  return first.device >= 0 && !first.mapped && !next.mapped && first.device == next.device;
}

Found find_memory(const void *pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  std::lock_guard<std::mutex> guard(g_map_mutex);
  auto it = allocations().upper_bound(address);
  if (it == allocations().begin()) return {};
  --it;
  const Allocation &found = it->second;
  if (address - it->first >= found.size) return {};
  uintptr_t end = it->first + found.size;
  for (++it; it != allocations().end() && it->first == end && continues(found, it->second); ++it) {
    end += it->second.size;
  }
  return {found.device >= 0 ? Place::kDevice : Place::kPinned, found.device, end - address};
}

void note_mapping(void *base, size_t size, int number) { note(base, {size, 0, number}); }

void drop_mapping(void *base) {
  Allocation ignored;
  take_note(base, ignored);
}

aclError take_memory(int number, size_t size, const char *caller) {
  Device &it = device(number);
  const size_t limit = options().memory;
  if (it.allocated + size > limit) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                "%s: %zu bytes do not fit: device %d has %zu bytes and %zu are allocated "
                "(sim run --memory)",
                caller, size, number, limit, it.allocated);
  }
  it.allocated += size;
  it.peak = std::max(it.peak, it.allocated);
  return 0;
}

void give_memory(int number, size_t size) { device(number).allocated -= size; }

}  // namespace sim

using namespace sim;

SIM_API aclError aclrtMalloc(void **pointer, size_t size, aclrtMemMallocPolicy) {
  return allocate(pointer, size, "aclrtMalloc");
}

SIM_API aclError aclrtMallocAlign32(void **pointer, size_t size, aclrtMemMallocPolicy) {
  return allocate(pointer, size, "aclrtMallocAlign32");
}

SIM_API aclError aclrtFree(void *pointer) {
  const Found found = find_memory(pointer);
  if (found.place != Place::kDevice) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p is no device memory", pointer);
  }
  Lock lock(g_mutex);
  if (aclError code = refuse_if_capturing("aclrtFree")) return code;
  // Work that was enqueued before may still use it. At the end of a process that work is lost.
  if (python_runs()) {
    const aclError code = drain_device(lock, found.device, "aclrtFree");
    if (code == ACL_ERROR_RT_INTERNAL_ERROR) return code;  // it is still in use
  }
  Allocation dead;
  if (!take_note(pointer, dead) || !dead.mapped) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p is inside an allocation, or mapped",
                pointer);
  }
  give_memory(dead.device, dead.size);
  munmap(pointer, dead.mapped + kPage);
  return 0;
}

SIM_API aclError aclrtMallocHost(void **pointer, size_t size) {
  return allocate_host(pointer, size, "aclrtMallocHost");
}

SIM_API aclError aclrtMallocHostWithCfg(void **pointer, uint64_t size, aclrtMallocConfig *) {
  return allocate_host(pointer, size, "aclrtMallocHostWithCfg");
}

SIM_API aclError aclrtFreeHost(void *pointer) {
  Lock lock(g_mutex);
  if (python_runs()) {
    for (int i = 0; i < options().devices; ++i) drain_device(lock, i, "aclrtFreeHost");
  }
  Allocation dead;
  if (find_memory(pointer).place != Place::kPinned || !take_note(pointer, dead)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFreeHost: %p is no pinned memory", pointer);
  }
  munmap(pointer, dead.mapped + kPage);
  return 0;
}

SIM_API aclError aclrtHostRegister(void *pointer, uint64_t size, aclrtHostRegisterType,
                                   void **mapped) {
  if (find_memory(pointer).place != Place::kPageable) {
    return fail(ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "aclrtHostRegister: %p is registered",
                pointer);
  }
  note(pointer, {size, 0, -1});
  if (mapped) *mapped = pointer;
  return 0;
}

SIM_API aclError aclrtHostRegisterV2(void *pointer, uint64_t size, uint32_t) {
  return aclrtHostRegister(pointer, size, ACL_HOST_REGISTER_MAPPED, nullptr);
}

SIM_API aclError aclrtHostUnregister(void *pointer) {
  Allocation dead;
  if (find_memory(pointer).place == Place::kPinned && take_note(pointer, dead)) return 0;
  return fail(ACL_ERROR_HOST_MEMORY_NOT_REGISTERED, "aclrtHostUnregister: %p is not registered",
              pointer);
}

SIM_API aclError aclrtPointerGetAttributes(const void *pointer, aclrtPtrAttributes *attributes) {
  const Found found = find_memory(pointer);
  *attributes = {};
  attributes->location.id = found.device < 0 ? 0 : found.device;
  attributes->location.type = found.place == Place::kDevice   ? ACL_MEM_LOCATION_TYPE_DEVICE
                              : found.place == Place::kPinned ? ACL_MEM_LOCATION_TYPE_HOST
                                                              : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  attributes->pageSize = kPage;
  return 0;
}

SIM_API aclError aclrtGetMemInfo(aclrtMemAttr, size_t *available, size_t *total) {
  Lock lock(g_mutex);
  const int number = current_device();
  if (number < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetMemInfo: no device is set");
  *total = options().memory;
  *available = options().memory - device(number).allocated;
  return 0;
}

SIM_API int64_t sim_device_of(void *pointer) { return find_memory(pointer).device; }

// Bytes from the pointer to the end of its allocation; 0 if it is no device memory.
SIM_API int64_t sim_bytes_left(void *pointer) {
  const Found found = find_memory(pointer);
  return found.place == Place::kDevice ? (int64_t)found.left : 0;
}

SIM_API int64_t sim_allocated(int64_t number) {
  Lock lock(g_mutex);
  return device((int)number).allocated;
}

SIM_API int64_t sim_peak(int64_t number) {
  Lock lock(g_mutex);
  return device((int)number).peak;
}

SIM_API int64_t sim_limit(int64_t) { return options().memory; }
