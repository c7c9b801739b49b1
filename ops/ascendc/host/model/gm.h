// Global memory: the buffers a launch may touch, with bounds and traffic of each.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shadow.h"

namespace ascendc_host {

/// A buffer that a kernel argument points to.
struct Buffer {
  uintptr_t begin = 0;
  uint64_t bytes = 0;
  std::string name;
  uint64_t read = 0;
  uint64_t written = 0;
  Shadow shadow;
};

class GlobalMemory {
 public:
  /// Registers the buffers of a launch; with none, every address is taken as valid.
  void reset(std::vector<Buffer> buffers, bool bounded);

  /// Buffer that holds all of [begin, begin + bytes); fails, naming the nearest, if none does.
  /// Null when addresses are not bounded.
  Buffer* find(uintptr_t begin, uint64_t bytes, const char* api);

  const std::vector<Buffer>& buffers() const { return buffers_; }

 private:
  [[noreturn]] void refuse(uintptr_t begin, uint64_t bytes, const char* api) const;

  std::vector<Buffer> buffers_;
  bool bounded_ = true;
};

}  // namespace ascendc_host
