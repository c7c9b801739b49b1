// What the pipes execute: a piece of work, what it touches, and flags between pipes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "limits.h"
#include "pipe.h"

namespace ascendc_host {

/// Where an access goes: one of the on-chip memories, or global memory.
enum class Place : uint8_t { UB, L1, L0A, L0B, L0C, GM };

/// `count` runs of `length` bytes, `stride` bytes apart. On chip `begin` is an offset, in GM an
/// address.
struct Access {
  uintptr_t begin;
  uint64_t stride;
  uint32_t length;
  uint32_t count;
  Place place;
  bool write;
  bool atomic = false;
  bool self_ordered = false;  // the pipe itself orders it after its earlier instructions
};

using Accesses = std::vector<Access>;

/// What each thread (pipe of a core) is known to have completed. A thread's own entry counts only
/// what a barrier or a round of flags has confirmed.
using Clock = std::vector<uint32_t>;

/// Published with a flag: what is complete when it is set, and the cycle of the estimate.
struct Stamp {
  Clock clock;
  uint64_t cycle = 0;
};

struct Instruction {
  enum class Kind : uint8_t { WORK, SET, WAIT, BARRIER, CROSS_SET };

  Kind kind = Kind::WORK;
  uint8_t mode = 0;      // of a cross-core flag
  int flag = 0;          // of SET, WAIT, CROSS_SET
  const char* api = "";  // for messages
  std::function<void()> work;
  Accesses accesses;
  uint64_t cycles = 0;  // busy time of the estimate
  uint64_t issue_cycle = 0;
  uint32_t issue_sequence = 0;               // what the scalar program had done at issue
  std::shared_ptr<const Clock> issue_clock;  // and knew
};

}  // namespace ascendc_host
