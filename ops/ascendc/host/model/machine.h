// All cores of a launch, the schedule that interleaves them, and what lies between cores.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core.h"
#include "fiber.h"
#include "gm.h"

namespace ascendc_host {

/// Which cores a kernel runs on (KERNEL_TASK_TYPE_DEFAULT).
enum class TaskType : uint8_t {
  AIV_ONLY,
  AIC_ONLY,
  MIX_AIV_1_0,
  MIX_AIC_1_0,
  MIX_AIC_1_1,
  MIX_AIC_1_2,
};

/// Order in which pipes and cores run.
struct Schedule {
  enum class Kind : uint8_t { EAGER, LAZIEST, RANDOM };
  Kind kind = Kind::EAGER;
  uint64_t seed = 0;

  /// Seed 0 runs each instruction at once, seed 1 only when waited for, others at random.
  static Schedule of_seed(uint64_t seed);
};

/// What a launch asks for.
struct LaunchOptions {
  uint32_t block_dim = 1;
  TaskType type = TaskType::AIV_ONLY;
  Schedule schedule;
  bool strict = true;  // order of dependent instructions within V, MTE2 and MTE3 must be stated
  bool races = true;   // accesses that nothing orders are errors
  bool bounded = true;
};

class Machine {
 public:
  /// Runs `program` on every core; throws KernelError.
  void launch(const LaunchOptions& options, std::vector<Buffer> buffers,
              const std::function<void()>& program);

  Core& current() { return *current_; }
  const LaunchOptions& options() const { return options_; }
  std::mt19937_64& random() { return random_; }
  double uniform() { return static_cast<double>(random_() >> 11) * 0x1.0p-53; }
  int core_count() const { return active_; }
  const Core& core(int index) const { return *cores_[index]; }
  int vectors_per_cube() const;

  /// Blocks the program of the current core until `ready` holds; other cores go on.
  void wait_until(const std::function<bool()>& ready, const std::string& what);
  /// Lets other cores run now and then, under random schedules.
  void maybe_yield();

  void cross_set(Core& core, int mode, int flag, const Stamp& stamp);
  void require_cross_core(const char* api) const;

  GlobalMemory gm;
  std::string thread_name(uint32_t thread) const;
  uint64_t progress = 0;  // counts what was executed; a round without is a deadlock

 private:
  struct Program {
    std::unique_ptr<Fiber> fiber;
    std::function<bool()> ready;
    std::string waiting;
  };
  struct Pending {
    int mode;
    int scope;
    int flag;
    std::vector<std::deque<Stamp>> stamps;  // per member
  };

  void prepare();
  void run_program(int index, const std::function<void()>& program);
  void schedule_cores();
  bool run_round();
  bool step_somewhere();
  void unwind();
  [[noreturn]] void report_deadlock();
  Pending& pending(int mode, int scope, int flag, int members);

  LaunchOptions options_;
  std::vector<std::unique_ptr<Core>> cores_;
  int active_ = 0;
  Core* current_ = nullptr;
  std::vector<Program> programs_;
  std::vector<int> order_;
  std::vector<Pending> pending_;
  std::mt19937_64 random_;
  bool aborting_ = false;
  std::unique_ptr<KernelError> error_;
};

/// The machine of this library; launches are one at a time.
Machine& machine();
inline Core& core() { return machine().current(); }

}  // namespace ascendc_host
