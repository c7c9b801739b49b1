#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <utility>

namespace ascendc_host {
namespace {

/// Thrown through the stacks of the other cores once one of them has failed.
struct Aborted {};

}  // namespace

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw KernelError{text};
}

Schedule Schedule::of_seed(uint64_t seed) {
  if (seed == 0) return {Kind::EAGER, seed};
  if (seed == 1) return {Kind::LAZIEST, seed};
  return {Kind::RANDOM, seed};
}

Machine& machine() {
  static Machine instance;
  return instance;
}

int Machine::vectors_per_cube() const {
  switch (options_.type) {
    case TaskType::AIV_ONLY:
    case TaskType::MIX_AIV_1_0:
    case TaskType::MIX_AIC_1_1:
      return 1;
    case TaskType::AIC_ONLY:
    case TaskType::MIX_AIC_1_0:
      return 0;
    case TaskType::MIX_AIC_1_2:
      return 2;
  }
  return 0;
}

void Machine::prepare() {
  const bool cubes = options_.type != TaskType::AIV_ONLY && options_.type != TaskType::MIX_AIV_1_0;
  const int vectors = vectors_per_cube();
  const int blocks = static_cast<int>(options_.block_dim);
  active_ = blocks * (vectors + (cubes ? 1 : 0));
  while (static_cast<int>(cores_.size()) < active_) {
    cores_.push_back(std::make_unique<Core>(*this, static_cast<int>(cores_.size())));
  }
  int next = 0;
  for (int block = 0; block < blocks; ++block) {
    if (cubes) cores_[next++]->reset(Core::Kind::AIC, block, 0);
    for (int sub = 0; sub < vectors; ++sub) {
      cores_[next++]->reset(Core::Kind::AIV, block * vectors + sub, sub);
    }
  }
}

void Machine::launch(const LaunchOptions& options, std::vector<Buffer> buffers,
                     const std::function<void()>& program) {
  options_ = options;
  random_.seed(options.schedule.seed);
  gm.reset(std::move(buffers), options.bounded);
  pending_.clear();
  progress = 0;
  aborting_ = false;
  error_.reset();
  prepare();
  programs_.clear();
  programs_.resize(active_);
  for (int i = 0; i < active_; ++i) {
    programs_[i].fiber = std::make_unique<Fiber>([this, i, &program] { run_program(i, program); });
  }
  order_.resize(active_);
  std::iota(order_.begin(), order_.end(), 0);
  if (options.schedule.kind == Schedule::Kind::LAZIEST) std::reverse(order_.begin(), order_.end());
  schedule_cores();
  programs_.clear();
  if (error_) throw KernelError(*error_);
  for (int i = 0; i < active_; ++i) cores_[i]->require_no_cross_flags();
}

void Machine::run_program(int index, const std::function<void()>& program) {
  Core& core = *cores_[index];
  try {
    program();
    core.finish();
  } catch (const KernelError& error) {
    if (!error_)
      error_ = std::make_unique<KernelError>(KernelError{core.name() + ": " + error.text});
  } catch (const Aborted&) {
  } catch (const std::exception& error) {
    if (!error_)
      error_ = std::make_unique<KernelError>(KernelError{core.name() + ": " + error.what()});
  }
}

void Machine::schedule_cores() {
  try {
    for (;;) {
      const uint64_t before = progress;
      if (run_round()) return;
      if (progress == before && !step_somewhere()) report_deadlock();
    }
  } catch (const KernelError& error) {  // of a pipe stepped on behalf of no program
    if (!error_) error_ = std::make_unique<KernelError>(error);
  }
  unwind();
}

/// Lets every program that can go on go on; true when all have ended or one has failed.
bool Machine::run_round() {
  if (options_.schedule.kind == Schedule::Kind::RANDOM) {
    std::shuffle(order_.begin(), order_.end(), random_);
  }
  bool done = true;
  for (int index : order_) {
    Program& program = programs_[index];
    if (program.fiber->finished()) continue;
    done = false;
    if (program.ready && !program.ready()) continue;
    program.ready = nullptr;
    ++progress;
    current_ = cores_[index].get();
    program.fiber->resume();
    if (error_) {
      unwind();
      return true;
    }
  }
  return done;
}

bool Machine::step_somewhere() {
  for (int index : order_) {
    current_ = cores_[index].get();
    if (cores_[index]->step_any()) return true;
  }
  return false;
}

void Machine::unwind() {
  aborting_ = true;
  for (int i = 0; i < active_; ++i) {
    Program& program = programs_[i];
    while (program.fiber->started() && !program.fiber->finished()) {
      current_ = cores_[i].get();
      program.fiber->resume();
    }
  }
}

void Machine::report_deadlock() {
  std::string text;
  for (int i = 0; i < active_; ++i) {
    if (programs_[i].fiber->finished()) continue;
    text += (text.empty() ? "" : "; ") + cores_[i]->name() + " waits for " + programs_[i].waiting;
  }
  fail("deadlock: %s", text.c_str());
}

void Machine::wait_until(const std::function<bool()>& ready, const std::string& what) {
  const int index = current_->index();
  while (!ready()) {
    programs_[index].ready = ready;
    programs_[index].waiting = what;
    programs_[index].fiber->yield();
    if (aborting_) throw Aborted();
  }
  ++progress;
}

void Machine::maybe_yield() {
  if (options_.schedule.kind != Schedule::Kind::RANDOM || active_ == 1) return;
  if (random_() % 32 != 0) return;
  const int index = current_->index();
  programs_[index].fiber->yield();
  if (aborting_) throw Aborted();
}

std::string Machine::thread_name(uint32_t thread) const {
  const Core& core = *cores_[thread / Core::THREADS];
  const int pipe = static_cast<int>(thread) % Core::THREADS;
  return core.name() + " pipe " + (pipe == Core::PROGRAM ? "S" : PIPE_NAME[pipe]);
}

// --- cross-core flags -------------------------------------------------------------------------

void Machine::require_cross_core(const char* api) const {
  HOST_CHECK(options_.type != TaskType::AIV_ONLY && options_.type != TaskType::AIC_ONLY,
             "%s needs the scheduling module, which KERNEL_TYPE_AIV_ONLY and AIC_ONLY leave off; "
             "use KERNEL_TYPE_MIX_AIV_1_0, MIX_AIC_1_0, MIX_AIC_1_1 or MIX_AIC_1_2",
             api);
}

Machine::Pending& Machine::pending(int mode, int scope, int flag, int members) {
  for (Pending& entry : pending_) {
    if (entry.mode == mode && entry.scope == scope && entry.flag == flag) return entry;
  }
  pending_.push_back({mode, scope, flag, {}});
  pending_.back().stamps.resize(members);
  return pending_.back();
}

void Machine::cross_set(Core& core, int mode, int flag, const Stamp& stamp) {
  const bool cube = core.kind() == Core::Kind::AIC;
  const int vectors = vectors_per_cube();
  const int group = cube || vectors == 0 ? core.block() : core.block() / vectors;
  std::vector<Core*> members;
  std::vector<Core*> targets;
  for (int i = 0; i < active_; ++i) {
    Core* other = cores_[i].get();
    const bool other_cube = other->kind() == Core::Kind::AIC;
    const int other_group = other_cube ? other->block() : other->block() / std::max(vectors, 1);
    if (mode != 0 && other_group != group) continue;
    if (other_cube == cube) members.push_back(other);
    if ((other_cube == cube) == (mode != 2)) targets.push_back(other);
  }
  const int scope = (mode == 0 ? 0 : group) * 2 + (cube ? 1 : 0);
  Pending& waiting = pending(mode, scope, flag, static_cast<int>(members.size()));
  const auto position = std::find(members.begin(), members.end(), &core) - members.begin();
  waiting.stamps[position].push_back(stamp);
  for (const auto& queue : waiting.stamps) {
    if (queue.empty()) return;
  }
  Stamp joined = stamp;
  for (auto& queue : waiting.stamps) {
    joined.cycle = std::max(joined.cycle, queue.front().cycle);
    for (size_t i = 0; i < joined.clock.size(); ++i) {
      joined.clock[i] = std::max(joined.clock[i], queue.front().clock[i]);
    }
    queue.pop_front();
  }
  for (Core* target : targets) target->cross_signal(flag, joined);
}

}  // namespace ascendc_host
