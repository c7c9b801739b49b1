// The pipes of a core, and the events between them.
#pragma once

#include <cstdint>

#include "limits.h"

/// Pipes by the vendor's names; the numbers are this model's own.
enum pipe_t {
  PIPE_S = 0,
  PIPE_V,
  PIPE_M,
  PIPE_MTE1,
  PIPE_MTE2,
  PIPE_MTE3,
  PIPE_FIX,
  PIPE_ALL,
};

enum event_t {
  EVENT_ID0 = 0,
  EVENT_ID1,
  EVENT_ID2,
  EVENT_ID3,
  EVENT_ID4,
  EVENT_ID5,
  EVENT_ID6,
  EVENT_ID7,
};

namespace AscendC {

/// Source and destination pipe of a flag.
enum class HardEvent : uint8_t {
  MTE2_MTE1,
  MTE1_MTE2,
  MTE1_M,
  M_MTE1,
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  M_V,
  V_M,
  V_V,
  MTE3_MTE1,
  MTE1_MTE3,
  MTE1_V,
  MTE2_M,
  M_MTE2,
  V_MTE1,
  M_FIX,
  FIX_M,
  MTE3_MTE2,
  MTE2_MTE3,
  S_V,
  V_S,
  S_MTE2,
  MTE2_S,
  S_MTE3,
  MTE3_S,
  MTE2_FIX,
  FIX_MTE2,
  FIX_S,
  M_S,
  FIX_MTE3,
  MTE1_FIX,
  FIX_MTE1,
  FIX_FIX,
  MAX,
};

}  // namespace AscendC

namespace ascendc_host {

constexpr int PIPE_COUNT = 7;
constexpr const char* PIPE_NAME[PIPE_COUNT] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX"};

/// An event's two pipes and its name.
struct EventPipes {
  pipe_t source;
  pipe_t target;
  const char* name;
};

constexpr int EVENT_COUNT = static_cast<int>(AscendC::HardEvent::MAX);

/// Pipes of `event`.
const EventPipes& event_pipes(AscendC::HardEvent event);

/// A flag's number: event and id in one, and back.
constexpr int flag_index(AscendC::HardEvent event, int id) {
  return static_cast<int>(event) * EVENT_IDS + id;
}
inline const EventPipes& flag_pipes(int flag) {
  return event_pipes(static_cast<AscendC::HardEvent>(flag / EVENT_IDS));
}

}  // namespace ascendc_host
