// Virtual memory: address ranges and physical memory apart, as expandable segments use them.
// Physical memory is a file in memory, so that it can be mapped at several places.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "runtime.h"

namespace {

constexpr size_t kGranularity = 2ull << 20;

struct Physical {
  int file = -1, device = -1;
  size_t size = 0;
};

std::map<uintptr_t, size_t> &ranges() {
  static auto *made = new std::map<uintptr_t, size_t>;
  return *made;
}

std::map<uintptr_t, size_t> &mappings() {
  static auto *made = new std::map<uintptr_t, size_t>;
  return *made;
}

bool inside_range(uintptr_t address, size_t size) {
  auto it = ranges().upper_bound(address);
  if (it == ranges().begin()) return false;
  --it;
  return address + size <= it->first + it->second;
}

aclError check_granularity(size_t size, const char *caller) {
  if (size && size % kGranularity == 0) return 0;
  return sim::fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %zu bytes; sizes are multiples of 2 MiB",
                   caller, size);
}

}  // namespace

using namespace sim;

// Any size: torch_npu asks for 512 bytes to find out whether there is virtual memory.
SIM_API aclError aclrtReserveMemAddress(void **address, size_t size, size_t, void *, uint64_t) {
  void *at = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                "aclrtReserveMemAddress: no range of %zu bytes is left", size);
  }
  Lock lock(g_mutex);
  ranges()[reinterpret_cast<uintptr_t>(at)] = size;
  *address = at;
  return 0;
}

SIM_API aclError aclrtReleaseMemAddress(void *address) {
  Lock lock(g_mutex);
  auto it = ranges().find(reinterpret_cast<uintptr_t>(address));
  if (it == ranges().end()) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtReleaseMemAddress: %p is no reserved range",
                address);
  }
  munmap(address, it->second);
  ranges().erase(it);
  return 0;
}

SIM_API aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t size,
                                     const aclrtPhysicalMemProp *property, uint64_t) {
  if (aclError code = check_granularity(size, "aclrtMallocPhysical")) return code;
  if (property->location.type != ACL_MEM_LOCATION_TYPE_DEVICE) {
    return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                "aclrtMallocPhysical: only device memory is simulated, not location type %d",
                property->location.type);
  }
  Lock lock(g_mutex);
  const int number = (int)property->location.id;
  if (number < 0 || number >= options().devices) {
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "aclrtMallocPhysical: no device %d", number);
  }
  if (aclError code = take_memory(number, size, "aclrtMallocPhysical")) return code;
  const int file = memfd_create("ascend-plugin-device", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, (off_t)size)) {
    give_memory(number, size);
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMallocPhysical: the host has no memory left");
  }
  *handle = new Physical{file, number, size};
  return 0;
}

SIM_API aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  auto *physical = static_cast<Physical *>(handle);
  Lock lock(g_mutex);
  if (python_runs()) drain_device(lock, physical->device, "aclrtFreePhysical");
  give_memory(physical->device, physical->size);
  close(physical->file);
  delete physical;
  return 0;
}

SIM_API aclError aclrtMapMem(void *address, size_t size, size_t offset, aclrtDrvMemHandle handle,
                             uint64_t) {
  auto *physical = static_cast<Physical *>(handle);
  Lock lock(g_mutex);
  if (offset || size > physical->size ||
      !inside_range(reinterpret_cast<uintptr_t>(address), size)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID,
                "aclrtMapMem: %zu bytes at %p do not lie in a reserved range, or are not the %zu "
                "bytes of the memory",
                size, address, physical->size);
  }
  void *at = mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file, 0);
  if (at == MAP_FAILED) return fail(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "aclrtMapMem: mmap failed");
  memset(address, 0xFF, size);
  mappings()[reinterpret_cast<uintptr_t>(address)] = size;
  note_mapping(address, size, physical->device);
  return 0;
}

SIM_API aclError aclrtUnmapMem(void *address) {
  const Found found = find_memory(address);
  Lock lock(g_mutex);
  auto it = mappings().find(reinterpret_cast<uintptr_t>(address));
  if (it == mappings().end()) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtUnmapMem: nothing is mapped at %p", address);
  }
  if (python_runs()) drain_device(lock, found.device, "aclrtUnmapMem");
  drop_mapping(address);
  mmap(address, it->second, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1,
       0);
  mappings().erase(it);
  return 0;
}
