// What the generated file of a kernel library needs: its entry points, and how to start them.
#pragma once

#include <cstdint>
#include <cstring>

#include "machine.h"

namespace ascendc_host {

/// An entry point: arguments arrive as 64-bit words in the order of the signature.
struct Entry {
  const char* name;
  TaskType type;
  const char* arguments;  // "type name" pairs, separated by commas
  int argument_count;
  void (*run)(const uint64_t* words);
};

/// The library's entry points; defined by the generated file.
extern const Entry ENTRIES[];
extern const int ENTRY_COUNT;

/// A word as an argument of type T.
template <class T>
T argument(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}
template <class T>
uint64_t word(T value) {
  uint64_t result = 0;
  std::memcpy(&result, &value, sizeof value);
  return result;
}

/// Starts an entry point on a stream of the simulated NPU; returns 0, or 1 if it is refused.
uint32_t launch_on_stream(const Entry& entry, uint32_t block_dim, void* stream,
                          const uint64_t* words);

}  // namespace ascendc_host
