// Loads and stores of the scalar program.
#include <utility>

#include "core.h"
#include "machine.h"

namespace ascendc_host {

void Core::scalar_read(const Access& access, const char* api) {
  flush_stores();
  Thread& program = threads_[PROGRAM];
  ++program.sequence;
  ++program.cycle;
  ++counters_[PIPE_S].instructions;
  counters_[PIPE_S].bytes += access.length;
  if (access.place == Place::GM) {
    Buffer* buffer = machine_.gm.find(access.begin, access.length, api);
    if (buffer != nullptr) buffer->read += access.length;
  }
  check_access(PROGRAM, access, api);
}

void Core::global_read(const Access& access, const char* api, void* target) {
  scalar_read(access, api);
  data_cache_.read(access.begin, access.length, target);
}

void Core::global_write(const Access& access, const char* api, const void* source) {
  Buffer* buffer = machine_.gm.find(access.begin, access.length, api);
  if (buffer != nullptr) buffer->written += access.length;
  ++threads_[PROGRAM].cycle;
  ++counters_[PIPE_S].instructions;
  counters_[PIPE_S].bytes += access.length;
  data_cache_.write(access.begin, access.length, source);
}

void Core::clean_cache(uintptr_t address, bool entire) {
  // A line can reach beyond its buffer; what lies there is not the kernel's.
  const auto wrote = [this](uintptr_t begin, uint64_t bytes) {
    ++threads_[PROGRAM].sequence;
    for (const Buffer& buffer : machine_.gm.buffers()) {
      const uintptr_t first = std::max(begin, buffer.begin);
      const uintptr_t last = std::min(begin + bytes, buffer.begin + buffer.bytes);
      if (first >= last) continue;
      const Access access{first, 0, static_cast<uint32_t>(last - first), 1, Place::GM, true};
      check_access(PROGRAM, access, "DataCacheCleanAndInvalid");
    }
  };
  if (entire) {
    data_cache_.clean_all(wrote);
  } else {
    data_cache_.clean(address, wrote);
  }
}

void Core::scalar_store(const Access& access, const char* api, std::function<void()> work) {
  Instruction instruction;
  instruction.api = api;
  instruction.work = std::move(work);
  instruction.accesses = {access};
  issue(PIPE_S, std::move(instruction));
}

void Core::flush_stores() {
  if (pipes_[PIPE_S].empty()) return;
  while (!pipes_[PIPE_S].empty()) step(PIPE_S);
  merge_program(publish(PIPE_S));
}

}  // namespace ascendc_host
