// The scalar unit's data cache: its stores to global memory stay here until cleaned, and its loads
// may be old.
#pragma once

#include <cstdint>
#include <unordered_map>

#include "limits.h"

namespace ascendc_host {

class DataCache {
 public:
  /// Copies bytes as the scalar unit sees them; a line is filled from memory when it is not there.
  void read(uintptr_t address, uint64_t bytes, void* target);

  /// Changes bytes in the cache only.
  void write(uintptr_t address, uint64_t bytes, const void* source);

  /// Writes the line of `address` back, from `address` to the line's end, and drops it.
  ///
  /// Calls `wrote(begin, bytes)` for what reaches memory: the whole part, changed or not.
  template <class F>
  void clean(uintptr_t address, F&& wrote) {
    const uintptr_t line = address / CACHE_LINE_BYTES * CACHE_LINE_BYTES;
    const auto found = lines_.find(line);
    if (found == lines_.end()) return;
    if (store(line, found->second, address - line)) {
      wrote(address, line + CACHE_LINE_BYTES - address);
    }
    if (found->second.dirty == 0) lines_.erase(found);
  }

  /// Writes every changed line back and drops all.
  template <class F>
  void clean_all(F&& wrote) {
    for (auto& [line, contents] : lines_) {
      if (store(line, contents, 0)) wrote(line, uint64_t{CACHE_LINE_BYTES});
    }
    lines_.clear();
  }

  /// Address of a byte that was written and never cleaned; 0 if there is none.
  uintptr_t first_dirty() const;

  void reset() { lines_.clear(); }

 private:
  struct Line {
    uint8_t data[CACHE_LINE_BYTES];
    uint64_t dirty = 0;  // a bit per byte
  };

  Line& line_of(uintptr_t address);
  static bool store(uintptr_t line, Line& contents, uint64_t from);

  std::unordered_map<uintptr_t, Line> lines_;
};

}  // namespace ascendc_host
