#include "core.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "costs.h"
#include "machine.h"

namespace ascendc_host {

namespace {

// By seed, so that no value is lucky.
constexpr uint8_t POISON[] = {0xCD, 0x7F, 0xFF, 0x35};

}  // namespace

const char* buffer_state_name(BufferState state) {
  switch (state) {
    case BufferState::FREE:
      return "free";
    case BufferState::OCCUPIED:
      return "allocated";
    case BufferState::ENQUEUED:
      return "in the queue";
    case BufferState::DEQUEUED:
      return "dequeued";
  }
  return "?";
}

Core::Core(Machine& machine, int index) : machine_(machine), index_(index) {}

void Core::reset(Kind kind, int block, int sub_block) {
  kind_ = kind;
  block_ = block;
  sub_block_ = sub_block;
  name_ = (kind == Kind::AIC ? "AIC " : "AIV ") + std::to_string(block);
  free_all();
  const LaunchOptions& options = machine_.options();
  for (size_t i = 0; i < MEMORY_COUNT; ++i) shadow_[i].reset(CAPACITY[i]);
  const size_t threads = options.races ? static_cast<size_t>(machine_.core_count()) * THREADS : 0;
  for (Thread& thread : threads_) {
    thread.known.assign(threads, 0);
    thread.sequence = 0;
    thread.cycle = thread.visible = 0;
    thread.merged = nullptr;
  }
  program_clock_ = std::make_shared<Clock>(threads, 0);
  data_cache_.reset();
  for (auto& pipe : pipes_) pipe.clear();
  for (Flag& flag : flags_) {
    flag.stamps.clear();
    flag.sets = flag.waits = 0;
  }
  held_events_.fill(0);
  queue_events_.fill(0);
  for (auto& flag : cross_) flag.clear();
  counters_.fill({});
  queues.clear();
  pipe_object_alive = false;
  deq_scale = 1.0f;
  atomic_type = 0;
  constexpr double SPEEDS[] = {0.0, 0.05, 0.3, 0.7, 1.0};
  for (double& speed : speed_) speed = SPEEDS[machine_.random()() % 5];
}

uint8_t* Core::memory(Memory memory) {
  auto& bytes = memory_[static_cast<size_t>(memory)];
  if (!bytes) bytes = std::make_unique<uint8_t[]>(CAPACITY[static_cast<size_t>(memory)]);
  return bytes.get();
}

void Core::require_held(int queue, int buffer, uint32_t generation, const char* api) const {
  const QueueState& state = queues[queue];
  const QueueBuffer& entry = state.buffers[buffer];
  HOST_CHECK(entry.generation == generation && entry.state != BufferState::FREE,
             "%s: the tensor of the %s queue was freed by FreeTensor", api, state.position);
  HOST_CHECK(entry.state != BufferState::ENQUEUED,
             "%s: the tensor of the %s queue is in the queue; DeQue is missing", api,
             state.position);
}

uint32_t Core::allocate(Memory where, uint32_t bytes) {
  const auto index = static_cast<size_t>(where);
  const uint32_t rounded = (bytes + BLOCK_BYTES - 1) / BLOCK_BYTES * BLOCK_BYTES;
  HOST_CHECK(rounded <= USABLE[index] - used_[index],
             "InitBuffer: %u bytes do not fit into %s: %u of its %zu bytes are taken, and %zu are "
             "reserved",
             rounded, MEMORY_NAME[index], used_[index], CAPACITY[index],
             CAPACITY[index] - USABLE[index]);
  const uint32_t offset = used_[index];
  used_[index] += rounded;
  std::memset(memory(where) + offset, POISON[machine_.options().schedule.seed % 4], rounded);
  return offset;
}

void Core::free_all() { used_.fill(0); }

void Core::require_pipe(pipe_t pipe, const char* api) const {
  const bool cube = pipe == PIPE_M || pipe == PIPE_MTE1 || pipe == PIPE_FIX;
  const bool vector = pipe == PIPE_V;
  if (kind_ == Kind::AIC) {
    HOST_CHECK(!vector,
               "%s runs on pipe V, which a cube core (AIC) lacks; guard it with "
               "`if ASCEND_IS_AIV`, or set another KERNEL_TASK_TYPE_DEFAULT",
               api);
  } else {
    HOST_CHECK(!cube,
               "%s runs on pipe %s, which a vector core (AIV) lacks; guard it with "
               "`if ASCEND_IS_AIC`, or set another KERNEL_TASK_TYPE_DEFAULT",
               api, PIPE_NAME[pipe]);
  }
}

// --- clocks -----------------------------------------------------------------------------------

void Core::merge(Thread& thread, const Clock& clock) {
  for (size_t i = 0; i < thread.known.size(); ++i) {
    if (clock[i] > thread.known[i]) thread.known[i] = clock[i];
  }
}

void Core::merge_program(const Stamp& stamp) {
  Thread& program = threads_[PROGRAM];
  program.cycle = std::max(program.cycle, stamp.cycle);
  if (program.known.empty()) return;
  merge(program, stamp.clock);
  program_clock_ = std::make_shared<Clock>(program.known);
}

Stamp Core::publish(int thread) {
  Stamp stamp;
  stamp.clock = threads_[thread].known;
  stamp.cycle = std::max(threads_[thread].cycle, threads_[thread].visible);
  if (!stamp.clock.empty()) stamp.clock[thread_id(thread)] = threads_[thread].sequence;
  return stamp;
}

// --- issue ------------------------------------------------------------------------------------

void Core::count(int pipe, const Instruction& instruction) {
  PipeCounters& counters = counters_[pipe];
  ++counters.instructions;
  counters.busy_cycles += instruction.cycles;
  for (const Access& access : instruction.accesses) {
    const uint64_t bytes = static_cast<uint64_t>(access.length) * access.count;
    counters.bytes += bytes;
    if (access.place != Place::GM) continue;
    for (uint32_t i = 0; i < access.count; ++i) {
      Buffer* buffer =
          machine_.gm.find(access.begin + i * access.stride, access.length, instruction.api);
      if (buffer == nullptr) continue;
      (access.write ? buffer->written : buffer->read) += access.length;
    }
  }
}

void Core::issue(pipe_t pipe, Instruction instruction) {
  require_pipe(pipe, instruction.api);
  if (instruction.kind == Instruction::Kind::WORK) count(pipe, instruction);
  Thread& program = threads_[PROGRAM];
  instruction.issue_cycle = ++program.cycle;
  instruction.issue_sequence = program.sequence;
  instruction.issue_clock = program_clock_;
  pipes_[pipe].push_back(std::move(instruction));
  run_ahead();
  machine_.maybe_yield();
}

void Core::run_ahead() {
  switch (machine_.options().schedule.kind) {
    case Schedule::Kind::LAZIEST:
      return;
    case Schedule::Kind::EAGER:
      for (bool any = true; any;) {
        any = false;
        for (int pipe = 0; pipe < PIPE_COUNT; ++pipe) {
          while (runnable(pipe)) {
            step(pipe);
            any = true;
          }
        }
      }
      return;
    case Schedule::Kind::RANDOM:
      for (int pipe = 0; pipe < PIPE_COUNT; ++pipe) {
        while (runnable(pipe) && machine_.uniform() < speed_[pipe]) step(pipe);
      }
      return;
  }
}

// --- execution --------------------------------------------------------------------------------

bool Core::runnable(int pipe) const {
  const auto& queue = pipes_[pipe];
  if (queue.empty()) return false;
  const Instruction& head = queue.front();
  return head.kind != Instruction::Kind::WAIT || !flags_[head.flag].stamps.empty();
}

void Core::step(int pipe) {
  const Instruction instruction = std::move(pipes_[pipe].front());
  pipes_[pipe].pop_front();
  ++machine_.progress;
  Thread& thread = threads_[pipe];
  if (!thread.known.empty() && instruction.issue_clock != thread.merged) {
    merge(thread, *instruction.issue_clock);
    thread.merged = instruction.issue_clock;
  }
  if (!thread.known.empty()) {
    uint32_t& program = thread.known[thread_id(PROGRAM)];
    program = std::max(program, instruction.issue_sequence);
  }
  thread.cycle = std::max(thread.cycle, instruction.issue_cycle) + instruction.cycles;
  const bool copies = pipe == PIPE_MTE2 || pipe == PIPE_MTE3 || pipe == PIPE_FIX;
  if (instruction.kind == Instruction::Kind::WORK) {
    thread.visible = thread.cycle + (copies ? GM_LATENCY_CYCLES : 0);
  }
  switch (instruction.kind) {
    case Instruction::Kind::WORK:
      ++thread.sequence;
      // Writes first: the record of a read replaces that of the pipe's earlier reads, which a write
      // of the same instruction (in place) must still be ordered after.
      for (const bool write : {true, false}) {
        for (const Access& access : instruction.accesses) {
          if (access.write == write) check_access(pipe, access, instruction.api);
        }
      }
      instruction.work();
      break;
    case Instruction::Kind::SET:
      flags_[instruction.flag].stamps.push_back(publish(pipe));
      break;
    case Instruction::Kind::WAIT: {
      const Stamp stamp = std::move(flags_[instruction.flag].stamps.front());
      flags_[instruction.flag].stamps.pop_front();
      thread.cycle = std::max(thread.cycle, stamp.cycle);
      if (!thread.known.empty()) merge(thread, stamp.clock);
      break;
    }
    case Instruction::Kind::BARRIER:
      if (!thread.known.empty()) thread.known[thread_id(pipe)] = thread.sequence;
      break;
    case Instruction::Kind::CROSS_SET:
      machine_.cross_set(*this, instruction.mode, instruction.flag, publish(pipe));
      break;
  }
}

void Core::demand(int flag, int depth) {
  const EventPipes& pipes = flag_pipes(flag);
  auto& queue = pipes_[pipes.source];
  while (flags_[flag].stamps.empty()) {
    bool coming = false;
    for (const Instruction& instruction : queue) {
      coming |= instruction.kind == Instruction::Kind::SET && instruction.flag == flag;
    }
    HOST_CHECK(coming && depth < 64,
               "deadlock: WaitFlag<%s>(%d) has no SetFlag before it; pipes: %s", pipes.name,
               flag % EVENT_IDS, waiting().c_str());
    if (!runnable(pipes.source)) demand(queue.front().flag, depth + 1);
    step(pipes.source);
  }
}

void Core::wait_for_vector(const char* api) {
  require_pipe(PIPE_V, api);
  while (!pipes_[PIPE_V].empty()) {
    if (!runnable(PIPE_V)) demand(pipes_[PIPE_V].front().flag, 0);
    step(PIPE_V);
  }
  merge_program(publish(PIPE_V));
}

bool Core::step_any() {
  // Consumers first under the laziest schedule: whatever is not made to wait runs too early.
  static constexpr int LAZY_ORDER[] = {PIPE_MTE3, PIPE_FIX,  PIPE_V, PIPE_M,
                                       PIPE_MTE1, PIPE_MTE2, PIPE_S};
  int candidates[PIPE_COUNT];
  int count = 0;
  for (int pipe : LAZY_ORDER) {
    if (runnable(pipe)) candidates[count++] = pipe;
  }
  if (count == 0) return false;
  int chosen = candidates[0];
  const Schedule::Kind kind = machine_.options().schedule.kind;
  if (kind == Schedule::Kind::EAGER) chosen = candidates[count - 1];
  if (kind == Schedule::Kind::RANDOM) chosen = candidates[machine_.random()() % count];
  step(chosen);
  return true;
}

void Core::drain() {
  while (step_any()) {
  }
  for (int pipe = 0; pipe < PIPE_COUNT; ++pipe) {
    HOST_CHECK(pipes_[pipe].empty(),
               "deadlock: pipe %s waits for event %s id %d, which nothing sets; pipes: %s",
               PIPE_NAME[pipe], flag_pipes(pipes_[pipe].front().flag).name,
               pipes_[pipe].front().flag % EVENT_IDS, waiting().c_str());
  }
  for (int pipe = 0; pipe < PIPE_COUNT; ++pipe) merge_program(publish(pipe));
}

std::string Core::waiting() const {
  std::string text;
  for (int pipe = 0; pipe < PIPE_COUNT; ++pipe) {
    if (pipes_[pipe].empty()) continue;
    const Instruction& head = pipes_[pipe].front();
    text += text.empty() ? "" : ", ";
    text += std::string(PIPE_NAME[pipe]) + " at " + head.api;
    if (head.kind == Instruction::Kind::WAIT) {
      text += std::string("<") + flag_pipes(head.flag).name + ">(" +
              std::to_string(head.flag % EVENT_IDS) + ")";
    }
  }
  return text.empty() ? "all idle" : text;
}

uint64_t Core::end_cycle() const {
  uint64_t cycle = 0;
  for (const Thread& thread : threads_) cycle = std::max({cycle, thread.cycle, thread.visible});
  return cycle;
}

void Core::finish() {
  drain();
  const uintptr_t dirty = data_cache_.first_dirty();
  if (dirty != 0) {
    const Buffer* buffer = machine_.gm.find(dirty, 1, "GlobalTensor::SetValue");
    fail(
        "GlobalTensor::SetValue: byte %zu of '%s' never left the data cache; "
        "DataCacheCleanAndInvalid is missing",
        static_cast<size_t>(buffer == nullptr ? dirty : dirty - buffer->begin),
        buffer == nullptr ? "GM" : buffer->name.c_str());
  }
  for (const QueueState& queue : queues) {
    for (const QueueBuffer& buffer : queue.buffers) {
      HOST_CHECK(buffer.state == BufferState::FREE,
                 "the kernel ended with a tensor of a %s queue still %s; FreeTensor is missing",
                 queue.position, buffer_state_name(buffer.state));
      if (buffer.free_event >= 0) {  // set by the last FreeTensor, awaited by nobody
        ++flags_[buffer.free_event].waits;
      }
    }
  }
  for (size_t i = 0; i < flags_.size(); ++i) {
    HOST_CHECK(flags_[i].sets == flags_[i].waits,
               "the kernel ended with event %s id %d set but never waited for",
               flag_pipes(static_cast<int>(i)).name, static_cast<int>(i) % EVENT_IDS);
  }
}

}  // namespace ascendc_host
