// Remembers who touched which bytes last, and refuses accesses that nothing orders.
//
// A happens-before check: every pipe of every core is a thread; flags, barriers, queues and
// cross-core flags carry clocks. Two accesses to the same bytes, at least one of them a write, must
// be ordered by these. So a missing flag is an error even under a schedule in which the data happen
// to be right.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace ascendc_host {

/// One earlier access to (some bytes of) a granule of 32 bytes.
struct Record {
  const char* api;
  uint32_t thread;
  uint32_t sequence;
  uint32_t mask;  // bytes of the granule
  bool write;
  bool atomic;
};

/// Records of one memory, a short list per granule; made where touched.
class Shadow {
 public:
  static constexpr uint32_t GRANULE = 32;

  /// Forgets everything and covers `bytes` bytes.
  void reset(uint64_t bytes);

  /// Calls `conflict(record)` for each record that overlaps `access`, then stores `access`.
  ///
  /// A write replaces what it covers: later accesses ordered after it are ordered after those.
  template <class Conflict>
  void touch(uint64_t granule, const Record& access, Conflict&& conflict) {
    Granule& entry = at(granule);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < entry.used; ++i) {
      const Record& old = entry.records[i];
      if ((old.mask & access.mask) != 0) {
        conflict(old);
        if (replaces(access, old)) continue;
      }
      if (kept != i) entry.records[kept] = old;
      ++kept;
    }
    entry.used = kept;
    if (!entry.overflow.empty()) touch_overflow(entry, access, conflict);
    if (entry.used < INLINE) {
      entry.records[entry.used++] = access;
    } else {
      entry.overflow.push_back(access);
    }
  }

 private:
  static constexpr uint32_t INLINE = 3;
  static constexpr uint32_t CHUNK = 64;  // granules

  struct Granule {
    Record records[INLINE];
    std::vector<Record> overflow;
    uint32_t used = 0;
  };
  struct Chunk {
    Granule granules[CHUNK];
    uint64_t epoch = 0;
  };

  static bool replaces(const Record& now, const Record& old) {
    if ((old.mask & ~now.mask) != 0) return false;
    return (now.write && now.atomic == old.atomic) || (now.thread == old.thread && !old.write);
  }

  template <class Conflict>
  static void touch_overflow(Granule& entry, const Record& access, Conflict&& conflict) {
    size_t kept = 0;
    for (size_t i = 0; i < entry.overflow.size(); ++i) {
      const Record old = entry.overflow[i];
      if ((old.mask & access.mask) != 0) {
        conflict(old);
        if (replaces(access, old)) continue;
      }
      entry.overflow[kept++] = old;
    }
    entry.overflow.resize(kept);
  }

  Granule& at(uint64_t granule) {
    std::unique_ptr<Chunk>& chunk = chunks_[granule / CHUNK];
    if (!chunk) chunk = std::make_unique<Chunk>();
    if (chunk->epoch != epoch_) clear(*chunk);
    return chunk->granules[granule % CHUNK];
  }
  void clear(Chunk& chunk);

  std::vector<std::unique_ptr<Chunk>> chunks_;
  uint64_t epoch_ = 0;
};

}  // namespace ascendc_host
