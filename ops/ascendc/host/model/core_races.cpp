// The order of accesses that flags, barriers and queues establish.
#include <algorithm>
#include <string>

#include "core.h"
#include "machine.h"

namespace ascendc_host {

void Core::check_access(int thread, const Access& access, const char* api) {
  if (!machine_.options().races) return;
  for (uint32_t i = 0; i < access.count; ++i) {
    const uint64_t begin = access.begin + i * access.stride;
    if (access.place == Place::GM) {
      Buffer* buffer = machine_.gm.find(begin, access.length, api);
      if (buffer != nullptr) {
        touch(buffer->shadow, begin - buffer->begin, thread, access, api, buffer->name.c_str());
      }
    } else {
      const auto memory = static_cast<size_t>(access.place);
      touch(shadow_[memory], begin, thread, access, api, MEMORY_NAME[memory]);
    }
  }
}

void Core::touch(Shadow& shadow, uint64_t begin, int thread, const Access& access, const char* api,
                 const char* place) {
  Record record{api,
                static_cast<uint32_t>(thread_id(thread)),
                threads_[thread].sequence,
                0,
                access.write,
                access.atomic};
  const uint64_t end = begin + access.length;
  for (uint64_t granule = begin / Shadow::GRANULE; granule * Shadow::GRANULE < end; ++granule) {
    const uint64_t base = granule * Shadow::GRANULE;
    const uint64_t first = std::max(begin, base) - base;
    const uint64_t last = std::min<uint64_t>(end - base, Shadow::GRANULE);
    record.mask = static_cast<uint32_t>(((1ull << last) - 1) & ~((1ull << first) - 1));
    shadow.touch(granule, record, [&](const Record& old) {
      if ((old.write || record.write) && !ordered(old, record, thread, access.self_ordered)) {
        report_race(old, record, thread, place, base + first, base + last);
      }
    });
  }
}

/// Whether `old` is complete before `now`, which `thread` of this core does.
bool Core::ordered(const Record& old, const Record& now, int thread, bool self_ordered) const {
  if (old.atomic && now.atomic) return true;
  if (threads_[thread].known[old.thread] >= old.sequence) return true;
  if (old.thread != now.thread) return false;
  if (old.sequence == now.sequence) return true;  // operands of one instruction
  // In a pipe instructions start in order, but the next may start before the last has ended. The
  // scalar unit is the exception; pipes that copy never read what they have written.
  bool may_overtake = old.write && now.write;
  if (thread == PIPE_V) may_overtake = true;
  if (thread == PIPE_M) may_overtake = !self_ordered;
  if (thread == PIPE_S || thread == PROGRAM) may_overtake = false;
  return !may_overtake || !machine_.options().strict;
}

void Core::report_race(const Record& old, const Record& now, int thread, const char* place,
                       uint64_t begin, uint64_t end) const {
  const std::string where =
      "bytes [" + std::to_string(begin) + ", " + std::to_string(end) + ") of '" + place + "'";
  if (old.thread == now.thread) {
    fail("%s %s %s, which %s %s before it on pipe %s, with no PipeBarrier<PIPE_%s> between",
         now.api, now.write ? "writes" : "reads", where.c_str(), old.api,
         old.write ? "wrote" : "read", PIPE_NAME[thread], PIPE_NAME[thread]);
  }
  fail("race: %s (%s) %s %s, which %s (%s) %s, and nothing orders the two", now.api,
       machine_.thread_name(now.thread).c_str(), now.write ? "writes" : "reads", where.c_str(),
       old.api, machine_.thread_name(old.thread).c_str(), old.write ? "writes" : "reads");
}

}  // namespace ascendc_host
