// Flags between pipes, barriers, event ids and cross-core flags.
#include <utility>

#include "core.h"
#include "machine.h"

namespace ascendc_host {

using AscendC::HardEvent;

const EventPipes& event_pipes(HardEvent event) {
  static const EventPipes table[EVENT_COUNT] = {
      {PIPE_MTE2, PIPE_MTE1, "MTE2_MTE1"},
      {PIPE_MTE1, PIPE_MTE2, "MTE1_MTE2"},
      {PIPE_MTE1, PIPE_M, "MTE1_M"},
      {PIPE_M, PIPE_MTE1, "M_MTE1"},
      {PIPE_MTE2, PIPE_V, "MTE2_V"},
      {PIPE_V, PIPE_MTE2, "V_MTE2"},
      {PIPE_MTE3, PIPE_V, "MTE3_V"},
      {PIPE_V, PIPE_MTE3, "V_MTE3"},
      {PIPE_M, PIPE_V, "M_V"},
      {PIPE_V, PIPE_M, "V_M"},
      {PIPE_V, PIPE_V, "V_V"},
      {PIPE_MTE3, PIPE_MTE1, "MTE3_MTE1"},
      {PIPE_MTE1, PIPE_MTE3, "MTE1_MTE3"},
      {PIPE_MTE1, PIPE_V, "MTE1_V"},
      {PIPE_MTE2, PIPE_M, "MTE2_M"},
      {PIPE_M, PIPE_MTE2, "M_MTE2"},
      {PIPE_V, PIPE_MTE1, "V_MTE1"},
      {PIPE_M, PIPE_FIX, "M_FIX"},
      {PIPE_FIX, PIPE_M, "FIX_M"},
      {PIPE_MTE3, PIPE_MTE2, "MTE3_MTE2"},
      {PIPE_MTE2, PIPE_MTE3, "MTE2_MTE3"},
      {PIPE_S, PIPE_V, "S_V"},
      {PIPE_V, PIPE_S, "V_S"},
      {PIPE_S, PIPE_MTE2, "S_MTE2"},
      {PIPE_MTE2, PIPE_S, "MTE2_S"},
      {PIPE_S, PIPE_MTE3, "S_MTE3"},
      {PIPE_MTE3, PIPE_S, "MTE3_S"},
      {PIPE_MTE2, PIPE_FIX, "MTE2_FIX"},
      {PIPE_FIX, PIPE_MTE2, "FIX_MTE2"},
      {PIPE_FIX, PIPE_S, "FIX_S"},
      {PIPE_M, PIPE_S, "M_S"},
      {PIPE_FIX, PIPE_MTE3, "FIX_MTE3"},
      {PIPE_MTE1, PIPE_FIX, "MTE1_FIX"},
      {PIPE_FIX, PIPE_MTE1, "FIX_MTE1"},
      {PIPE_FIX, PIPE_FIX, "FIX_FIX"},
  };
  return table[static_cast<int>(event)];
}

const EventPipes& Core::require_event(HardEvent event, int id, const char* api) const {
  const EventPipes& pipes = event_pipes(event);
  HOST_CHECK(id >= 0 && id < EVENT_IDS, "%s<%s>(%d): event ids are 0 to %d", api, pipes.name, id,
             EVENT_IDS - 1);
  require_pipe(pipes.source, api);
  require_pipe(pipes.target, api);
  // Legal pairs of this architecture: "Synchronisation within a core", tables 2 and 3.
  const bool scalar = pipes.source == PIPE_S || pipes.target == PIPE_S;
  const bool cube_only = kind_ == Kind::AIC && (scalar || event == HardEvent::M_V);
  HOST_CHECK(!cube_only && pipes.source != pipes.target,
             "%s<%s>: this event does not exist on a %s core; %s", api, pipes.name,
             kind_ == Kind::AIC ? "cube" : "vector",
             scalar ? "use PipeBarrier<PIPE_ALL>" : "use PipeBarrier of the pipe");
  return pipes;
}

void Core::set_flag(HardEvent event, int id, const char* api) {
  const EventPipes& pipes = require_event(event, id, api);
  Flag& flag = flags_[flag_index(event, id)];
  ++flag.sets;
  HOST_CHECK(flag.sets - flag.waits <= 1,
             "%s<%s>(%d): the event is set twice with no WaitFlag between", api, pipes.name, id);
  Instruction instruction;
  instruction.kind = Instruction::Kind::SET;
  instruction.flag = flag_index(event, id);
  instruction.api = api;
  issue(pipes.source, std::move(instruction));
}

void Core::wait_flag(HardEvent event, int id, const char* api) {
  const EventPipes& pipes = require_event(event, id, api);
  const int index = flag_index(event, id);
  ++flags_[index].waits;
  if (pipes.target == PIPE_S) {
    demand(index, 0);
    merge_program(flags_[index].stamps.front());
    flags_[index].stamps.pop_front();
    machine_.maybe_yield();
    return;
  }
  Instruction instruction;
  instruction.kind = Instruction::Kind::WAIT;
  instruction.flag = index;
  instruction.api = api;
  issue(pipes.target, std::move(instruction));
}

void Core::barrier(pipe_t pipe) {
  HOST_CHECK(pipe != PIPE_S, "PipeBarrier<PIPE_S>: the scalar pipe needs and has no barrier");
  if (pipe == PIPE_ALL) {
    drain();
    return;
  }
  Instruction instruction;
  instruction.kind = Instruction::Kind::BARRIER;
  instruction.api = "PipeBarrier";
  issue(pipe, std::move(instruction));
}

// --- events of queues -------------------------------------------------------------------------

int Core::free_event(HardEvent event, const char* api) const {
  const int index = static_cast<int>(event);
  for (int id = 0; id < EVENT_IDS; ++id) {
    if ((held_events_[index] >> id & 1) == 0) return id;
  }
  fail("%s: all %d ids of event %s are in use; queues hold one per buffer in flight", api,
       EVENT_IDS, event_pipes(event).name);
}

int Core::allocate_event(HardEvent event, const char* api, bool queue) {
  const int id = free_event(event, api);
  held_events_[static_cast<int>(event)] |= static_cast<uint8_t>(1 << id);
  if (queue) queue_events_[static_cast<int>(event)] |= static_cast<uint8_t>(1 << id);
  return id;
}

void Core::release_event(HardEvent event, int id) {
  HOST_CHECK(id >= 0 && id < EVENT_IDS && (held_events_[static_cast<int>(event)] >> id & 1) != 0,
             "ReleaseEventID<%s>(%d): the id is not allocated", event_pipes(event).name, id);
  held_events_[static_cast<int>(event)] &= static_cast<uint8_t>(~(1 << id));
  queue_events_[static_cast<int>(event)] &= static_cast<uint8_t>(~(1 << id));
}

void Core::forbid_queue_event(HardEvent event, int id, const char* api) const {
  HOST_CHECK(id < 0 || id >= EVENT_IDS || (queue_events_[static_cast<int>(event)] >> id & 1) == 0,
             "%s<%s>(%d): a queue holds this event id; take one from TPipe::FetchEventID or "
             "AllocEventID",
             api, event_pipes(event).name, id);
}

// --- cross-core flags and the end -------------------------------------------------------------

void Core::cross_set(int mode, pipe_t pipe, uint16_t flag) {
  HOST_CHECK(flag < CROSS_CORE_FLAGS, "CrossCoreSetFlag(%u): flags are 0 to %d", flag,
             CROSS_CORE_FLAGS - 1);
  HOST_CHECK(mode != 1 || kind_ == Kind::AIV,
             "CrossCoreSetFlag<1>(%u): mode 1 is between vector cores; this is a cube core", flag);
  const TaskType type = machine_.options().type;
  HOST_CHECK(mode == 0 || type == TaskType::MIX_AIC_1_1 || type == TaskType::MIX_AIC_1_2,
             "CrossCoreSetFlag<%d>(%u): modes 1 and 2 need a kernel of KERNEL_TYPE_MIX_AIC_1_1 or "
             "MIX_AIC_1_2",
             mode, flag);
  Instruction instruction;
  instruction.kind = Instruction::Kind::CROSS_SET;
  instruction.api = "CrossCoreSetFlag";
  instruction.mode = static_cast<uint8_t>(mode);
  instruction.flag = flag;
  issue(pipe, std::move(instruction));
}

void Core::cross_wait(uint16_t flag) {
  HOST_CHECK(flag < CROSS_CORE_FLAGS, "CrossCoreWaitFlag(%u): flags are 0 to %d", flag,
             CROSS_CORE_FLAGS - 1);
  machine_.wait_until([this, flag] { return !cross_[flag].empty(); },
                      "CrossCoreWaitFlag(" + std::to_string(flag) + ")");
  merge_program(cross_[flag].front());
  cross_[flag].pop_front();
}

/// As the vendor's own: barriers and cross-core flags 11 to 14.
void Core::sync_all(bool vectors_only) {
  constexpr uint16_t CUBES = 11, TO_VECTORS = 12, TO_CUBE = 13, VECTORS = 14;
  barrier(PIPE_ALL);
  if (vectors_only) {
    HOST_CHECK(kind_ == Kind::AIV,
               "SyncAll<true>() on a cube core waits for ever; use SyncAll<false>() on all cores");
    cross_set(0, PIPE_MTE3, VECTORS);
    cross_wait(VECTORS);
    return;
  }
  HOST_CHECK(machine_.options().type == TaskType::MIX_AIC_1_1 ||
                 machine_.options().type == TaskType::MIX_AIC_1_2,
             "SyncAll<false>() needs a kernel of KERNEL_TYPE_MIX_AIC_1_1 or MIX_AIC_1_2");
  if (kind_ == Kind::AIC) {
    cross_wait(TO_CUBE);
    cross_set(0, PIPE_FIX, CUBES);
    cross_wait(CUBES);
    cross_set(2, PIPE_MTE3, TO_VECTORS);
  } else {
    cross_set(2, PIPE_MTE3, TO_CUBE);
    cross_wait(TO_VECTORS);
  }
}

void Core::cross_signal(int flag, const Stamp& stamp) {
  cross_[flag].push_back(stamp);
  HOST_CHECK(cross_[flag].size() <= CROSS_CORE_FLAG_LIMIT,
             "CrossCoreSetFlag(%d): the counter of %s exceeds %d; a CrossCoreWaitFlag is missing",
             flag, name_.c_str(), CROSS_CORE_FLAG_LIMIT);
}

void Core::require_no_cross_flags() const {
  for (int flag = 0; flag < CROSS_CORE_FLAGS; ++flag) {
    HOST_CHECK(cross_[flag].empty(),
               "%s: the kernel ended with cross-core flag %d set but never waited for",
               name_.c_str(), flag);
  }
}

}  // namespace ascendc_host
