// One core: its memories, its pipes as in-order queues, and the flags between them.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "data_cache.h"
#include "fail.h"
#include "instruction.h"
#include "shadow.h"

namespace ascendc_host {

class Machine;

/// State of a queue's buffer. OCCUPIED after AllocTensor, until EnQue or FreeTensor.
enum class BufferState : uint8_t { FREE, OCCUPIED, ENQUEUED, DEQUEUED };
const char* buffer_state_name(BufferState state);

/// A buffer of a TQue: where it lies, who holds it, which event ids it holds.
struct QueueBuffer {
  uint32_t offset = 0;
  uint32_t bytes = 0;
  BufferState state = BufferState::FREE;
  uint32_t generation = 0;  // counts AllocTensor: tensors of earlier ones are stale
  int enqueue_event = -1;
  int free_event = -1;
};

/// What a TQue keeps; lives in the core so that its state is checked when the kernel ends.
struct QueueState {
  const char* position = "";
  std::vector<QueueBuffer> buffers;
  std::deque<int> order;
};

/// A flag between two pipes: the stamps of what was set and not yet waited for.
struct Flag {
  std::deque<Stamp> stamps;
  int sets = 0;   // issued by the program
  int waits = 0;  // issued by the program
};

/// Work of one pipe, for the report.
struct PipeCounters {
  uint64_t instructions = 0;
  uint64_t bytes = 0;
  uint64_t busy_cycles = 0;
};

class Core {
 public:
  enum class Kind : uint8_t { AIC, AIV };

  static constexpr int THREADS = 8;  // the pipes, and the scalar program itself
  static constexpr int PROGRAM = 7;

  Core(Machine& machine, int index);

  /// Makes the core fresh for a launch.
  void reset(Kind kind, int block, int sub_block);

  Kind kind() const { return kind_; }
  int index() const { return index_; }
  int block() const { return block_; }
  int sub_block() const { return sub_block_; }
  const std::string& name() const { return name_; }

  // --- memory -------------------------------------------------------------------------------
  uint8_t* memory(Memory memory);
  /// Fails if the tensor of a queue's buffer is freed, or waits in the queue.
  void require_held(int queue, int buffer, uint32_t generation, const char* api) const;
  /// Takes `bytes` of `memory` for InitBuffer; what lies there is poison.
  uint32_t allocate(Memory memory, uint32_t bytes);
  void free_all();

  // --- instructions -------------------------------------------------------------------------
  /// Hands `instruction` to `pipe`; the schedule decides when it runs.
  void issue(pipe_t pipe, Instruction instruction);
  void set_flag(AscendC::HardEvent event, int id, const char* api);
  void wait_flag(AscendC::HardEvent event, int id, const char* api);
  void barrier(pipe_t pipe);
  /// A scalar load: sees what is there now.
  void scalar_read(const Access& access, const char* api);
  /// A scalar store: reaches memory later, at the latest with a flag from pipe S.
  void scalar_store(const Access& access, const char* api, std::function<void()> work);
  /// A scalar load from GM, through the data cache.
  void global_read(const Access& access, const char* api, void* target);
  /// A scalar store to GM; it stays in the data cache until cleaned.
  void global_write(const Access& access, const char* api, const void* source);
  /// Writes the cache line of `address` back, or the whole cache, and drops it.
  void clean_cache(uintptr_t address, bool entire);
  /// Lets the scalar program wait for the vector pipe, as reading its special registers does.
  void wait_for_vector(const char* api);
  /// Runs everything, in an order of the schedule's choice.
  void drain();
  void cross_set(int mode, pipe_t pipe, uint16_t flag);
  void cross_wait(uint16_t flag);
  void sync_all(bool vectors_only);
  /// Fails unless this core has `pipe`.
  void require_pipe(pipe_t pipe, const char* api) const;

  // --- events of queues ---------------------------------------------------------------------
  int allocate_event(AscendC::HardEvent event, const char* api, bool queue);
  int free_event(AscendC::HardEvent event, const char* api) const;
  void release_event(AscendC::HardEvent event, int id);
  void forbid_queue_event(AscendC::HardEvent event, int id, const char* api) const;

  // --- used by the machine ------------------------------------------------------------------
  bool runnable(int pipe) const;
  void step(int pipe);
  /// Steps one runnable pipe of the schedule's choice; false if there is none.
  bool step_any();
  void finish();
  void cross_signal(int flag, const Stamp& stamp);
  void require_no_cross_flags() const;
  uint64_t end_cycle() const;
  const PipeCounters& counters(int pipe) const { return counters_[pipe]; }
  PipeCounters& counters(int pipe) { return counters_[pipe]; }
  std::string waiting() const;

  std::deque<QueueState> queues;
  bool pipe_object_alive = false;
  float deq_scale = 1.0f;
  int atomic_type = 0;  // 0 none, else element code of SetAtomicAdd

 private:
  struct Thread {
    Clock known;
    uint32_t sequence = 0;
    uint64_t cycle = 0;    // of the estimate: free for the next instruction
    uint64_t visible = 0;  // and when what it did can be seen
    std::shared_ptr<const Clock> merged;
  };

  int thread_id(int thread) const { return index_ * THREADS + thread; }
  void merge(Thread& thread, const Clock& clock);
  void merge_program(const Stamp& stamp);
  Stamp publish(int thread);
  void demand(int flag, int depth);
  void run_ahead();
  const EventPipes& require_event(AscendC::HardEvent event, int id, const char* api) const;
  void check_access(int thread, const Access& access, const char* api);
  void touch(Shadow& shadow, uint64_t begin, int thread, const Access& access, const char* api,
             const char* place);
  bool ordered(const Record& old, const Record& now, int thread, bool self_ordered) const;
  [[noreturn]] void report_race(const Record& old, const Record& now, int thread, const char* place,
                                uint64_t begin, uint64_t end) const;
  void flush_stores();
  void count(int pipe, const Instruction& instruction);

  Machine& machine_;
  int index_;
  Kind kind_ = Kind::AIV;
  int block_ = 0;
  int sub_block_ = 0;
  std::string name_;
  std::array<std::unique_ptr<uint8_t[]>, MEMORY_COUNT> memory_;
  std::array<uint32_t, MEMORY_COUNT> used_{};
  std::array<Shadow, MEMORY_COUNT> shadow_;
  std::array<std::deque<Instruction>, PIPE_COUNT> pipes_;
  std::array<Thread, THREADS> threads_;
  std::shared_ptr<Clock> program_clock_;
  DataCache data_cache_;
  std::array<Flag, EVENT_COUNT * EVENT_IDS> flags_;
  std::array<uint8_t, EVENT_COUNT> held_events_{};   // allocated ids, a bit each
  std::array<uint8_t, EVENT_COUNT> queue_events_{};  // those of queues
  std::array<std::deque<Stamp>, CROSS_CORE_FLAGS> cross_;
  std::array<double, PIPE_COUNT> speed_{};
  std::array<PipeCounters, PIPE_COUNT> counters_;
};

}  // namespace ascendc_host
