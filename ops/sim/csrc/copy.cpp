// Copies and fills. Pinned host memory is read and written when the task runs, so a buffer that is
// reused too early is seen; pageable memory is staged at the call, as the driver does.
#include <cstring>

#include "runtime.h"

namespace sim {
namespace {

const char *place_name(Place place) {
  switch (place) {
    case Place::kDevice:
      return "device memory";
    case Place::kPinned:
      return "pinned host memory";
    default:
      return "pageable host memory";
  }
}

aclError check_side(const char *caller, const char *side, const void *pointer, const Found &found,
                    size_t bytes, bool device_wanted, bool any) {
  if (!any && (found.place == Place::kDevice) != device_wanted) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: the %s %p is %s, but the kind of copy wants %s",
                caller, side, pointer, place_name(found.place), device_wanted ? "device" : "host");
  }
  if (found.place != Place::kPageable && bytes > found.left) {
    return fail(ACL_ERROR_RT_PARAM_INVALID,
                "%s: %zu bytes from the %s %p leave its allocation, which has %zu left", caller,
                bytes, side, pointer, found.left);
  }
  return 0;
}

aclError check_copy(const char *caller, void *to, size_t room, const void *from, size_t bytes,
                    aclrtMemcpyKind kind) {
  if (bytes > room) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %zu bytes into a destination of %zu", caller,
                bytes, room);
  }
  if (!to || !from) return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: a null pointer", caller);
  const bool any = kind == ACL_MEMCPY_DEFAULT;
  const bool to_device = kind != ACL_MEMCPY_HOST_TO_HOST && kind != ACL_MEMCPY_DEVICE_TO_HOST;
  const bool from_device =
      kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE ||
      kind == ACL_MEMCPY_INNER_DEVICE_TO_DEVICE || kind == ACL_MEMCPY_INTER_DEVICE_TO_DEVICE;
  if (aclError code =
          check_side(caller, "source", from, find_memory(from), bytes, from_device, any)) {
    return code;
  }
  return check_side(caller, "destination", to, find_memory(to), bytes, to_device, any);
}

aclError refuse_pageable(Stream *stream, const char *caller) {
  stream->capture->invalid = format("%s from or to pageable host memory", caller);
  return fail(ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC,
              "%s: stream %d is captured, and a copy from or to pageable host memory would have to "
              "wait; pin the memory",
              caller, stream->id);
}

aclError copy_async(const char *caller, void *to, size_t room, const void *from, size_t bytes,
                    aclrtMemcpyKind kind, aclrtStream handle) {
  if (!bytes) return 0;
  if (aclError code = check_copy(caller, to, room, from, bytes, kind)) return code;
  const bool staged_source = find_memory(from).place == Place::kPageable;
  const bool waits = find_memory(to).place == Place::kPageable;
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, caller);
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (stream->capture && (staged_source || waits)) return refuse_pageable(stream, caller);
  std::shared_ptr<std::string> stage;
  if (staged_source) {
    stage = std::make_shared<std::string>(static_cast<const char *>(from), bytes);
  }
  auto copy = [=](int64_t) {
    memmove(to, stage ? stage->data() : from, bytes);
    return Outcome{};
  };
  if (aclError code = submit(lock, stream, call_operation("copy", copy))) return code;
  return waits ? drain(lock, stream, caller) : 0;
}

aclError check_fill(const char *caller, void *to, size_t room, size_t bytes) {
  if (bytes > room) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %zu bytes into a destination of %zu", caller,
                bytes, room);
  }
  return check_side(caller, "destination", to, find_memory(to), bytes, true, true);
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_API aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes,
                                  aclrtMemcpyKind kind, aclrtStream stream) {
  return copy_async("aclrtMemcpyAsync", to, room, from, bytes, kind, stream);
}

SIM_API aclError aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from,
                                               size_t bytes, aclrtMemcpyKind kind,
                                               aclrtStream stream) {
  return copy_async("aclrtMemcpyAsyncWithCondition", to, room, from, bytes, kind, stream);
}

// Now, and without waiting for any stream: as on hardware, waiting is the caller's business.
SIM_API aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes,
                             aclrtMemcpyKind kind) {
  if (!bytes) return 0;
  if (aclError code = check_copy("aclrtMemcpy", to, room, from, bytes, kind)) return code;
  Lock lock(g_mutex);
  if (aclError code = refuse_if_capturing("aclrtMemcpy")) return code;
  memmove(to, from, bytes);
  return 0;
}

SIM_API aclError aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
  if (aclError code = check_fill("aclrtMemset", to, room, bytes)) return code;
  Lock lock(g_mutex);
  if (aclError code = refuse_if_capturing("aclrtMemset")) return code;
  memset(to, value, bytes);
  return 0;
}

SIM_API aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes,
                                  aclrtStream stream) {
  if (aclError code = check_fill("aclrtMemsetAsync", to, room, bytes)) return code;
  return submit(stream, "aclrtMemsetAsync", call_operation("fill", [=](int64_t) {
                  memset(to, value, bytes);
                  return Outcome{};
                }));
}
