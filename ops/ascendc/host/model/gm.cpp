#include "gm.h"

#include <cinttypes>
#include <utility>

#include "fail.h"

namespace ascendc_host {

void GlobalMemory::reset(std::vector<Buffer> buffers, bool bounded) {
  buffers_ = std::move(buffers);
  bounded_ = bounded;
  for (Buffer& buffer : buffers_) buffer.shadow.reset(buffer.bytes);
}

Buffer* GlobalMemory::find(uintptr_t begin, uint64_t bytes, const char* api) {
  if (!bounded_) return nullptr;
  const auto holds = [&](const Buffer& buffer) {
    return begin >= buffer.begin && begin - buffer.begin <= buffer.bytes &&
           bytes <= buffer.bytes - (begin - buffer.begin);
  };
  // Buffers may overlap (views of one tensor, or pointers into one allocation): the one that begins
  // last before the access is meant.
  Buffer* found = nullptr;
  for (Buffer& buffer : buffers_) {
    if (holds(buffer) && (found == nullptr || buffer.begin > found->begin)) found = &buffer;
  }
  if (found == nullptr) refuse(begin, bytes, api);
  return found;
}

void GlobalMemory::refuse(uintptr_t begin, uint64_t bytes, const char* api) const {
  const Buffer* nearest = nullptr;
  uint64_t best = UINT64_MAX;
  for (const Buffer& buffer : buffers_) {
    const uintptr_t end = buffer.begin + buffer.bytes;
    uint64_t distance = 0;
    if (begin < buffer.begin) distance = buffer.begin - begin;
    if (begin > end) distance = begin - end;
    if (distance < best) {
      best = distance;
      nearest = &buffer;
    }
  }
  if (begin < 4096 || nearest == nullptr) {
    fail("%s: %" PRIu64 " bytes at GM address 0x%" PRIxPTR ": the pointer is null or near null",
         api, bytes, begin);
  }
  fail("%s: %" PRIu64 " bytes at offset %" PRId64 " of '%s' leave its %" PRIu64 " bytes", api,
       bytes, static_cast<int64_t>(begin - nearest->begin), nearest->name.c_str(), nearest->bytes);
}

}  // namespace ascendc_host
