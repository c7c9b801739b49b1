// Who runs when. Nothing has a thread of its own: a stream advances when a host thread waits for
// it, frees memory, or has filled it; the schedule says how far beyond that.
//
// Lazy is the hardest schedule for a program that forgot a wait: another stream's work happens as
// late as it can.
#include <algorithm>
#include <cstdio>
#include <thread>

#include "runtime.h"

namespace sim {
namespace {

// Hardware streams hold one to two thousand tasks before the host must wait.
constexpr size_t kFullQueue = 1024;

std::string describe_block(Stream *stream) {
  if (stream->queue.empty()) return format("stream %d is idle", stream->id);
  return format("stream %d: %s waits for %s", stream->id, stream->names.front().c_str(),
                stream->queue.front()->waits_for().c_str());
}

void keep_error(int number, aclError code, const std::string &text) {
  Device &it = device(number);
  if (it.error) return;  // the first one is the cause
  it.error = code;
  it.error_text = text;
  // torch_npu puts the text of some errors into a warning only.
  fprintf(stderr, "%s\n", text.c_str());
}

// Whether this thread is in a step: what a task of Python frees or waits for would wait for itself.
thread_local int t_steps = 0;

// One step of the first task. True if something happened.
bool advance(Lock &lock, Stream *stream) {
  if (stream->running || stream->queue.empty()) return false;
  Task *task = stream->queue.front().get();
  const bool dead = device(stream->device).error != 0;
  stream->running = true;
  lock.unlock();
  Outcome outcome;
  ++t_steps;
  if (dead) {
    task->cancel();
  } else {
    outcome = task->step();
  }
  --t_steps;
  lock.lock();
  stream->running = false;
  if (outcome.step == Step::kBlocked) return false;
  if (outcome.step == Step::kFailed) {
    const std::string text = format("ascend-plugin simulator: task %s of stream %d failed: ",
                                    stream->names.front().c_str(), stream->id) +
                             outcome.text;
    keep_error(stream->device, outcome.code, text);
  }
  if (outcome.step != Step::kProgress) {
    TaskPointer finished = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->names.pop_front();
    ++stream->finished;
    lock.unlock();
    finished.reset();
    collect_garbage();
    lock.lock();
  }
  g_changed.notify_all();
  return true;
}

// Advances the stream, or whoever it waits for.
bool advance_towards(Lock &lock, Stream *stream, int depth) {
  if (advance(lock, stream)) return true;
  if (stream->running || stream->queue.empty() || depth > 64) return false;
  Stream *producer = stream->queue.front()->producer();
  return producer && producer != stream && advance_towards(lock, producer, depth + 1);
}

bool advance_any(Lock &lock, Stream *except) {
  std::vector<Stream *> streams = all_streams();
  if (options().schedule == Schedule::kRandom) {
    std::rotate(streams.begin(), streams.begin() + draw() % streams.size(), streams.end());
  }
  for (Stream *other : streams) {
    if (other != except && advance(lock, other)) return true;
  }
  return false;
}

bool someone_runs() {
  const auto streams = all_streams();
  return std::any_of(streams.begin(), streams.end(), [](Stream *s) { return s->running; });
}

bool waits_for_peer(Stream *stream) {
  const auto streams = all_streams();
  (void)stream;
  return std::any_of(streams.begin(), streams.end(),
                     [](Stream *s) { return !s->queue.empty() && s->queue.front()->remote(); });
}

aclError give_up(Stream *stream, const std::string &what) {
  std::string text = "ascend-plugin simulator: " + what + " never ends: " + describe_block(stream);
  for (Stream *other : all_streams()) {
    if (other != stream && !other->queue.empty()) text += "; " + describe_block(other);
  }
  keep_error(stream->device, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, text);
  return device_error(stream->device);
}

void run_everything(Lock &lock) {
  bool any = true;
  while (any) {
    any = false;
    for (Stream *stream : all_streams()) {
      while (advance(lock, stream)) any = true;
    }
  }
}

void background_loop() {
  for (;;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (!python_runs()) return;
    Lock lock(g_mutex);
    for (Stream *stream : all_streams()) {
      const auto &queue = stream->queue;
      const bool remote = std::any_of(queue.begin(), queue.end(),
                                      [](const TaskPointer &task) { return task->remote(); });
      // What it waits for may be on a stream that nobody knows to be the producer: the value of an
      // external event, which a graph's update writes.
      for (int i = 0; remote && i < 1000; ++i) {
        if (!advance_towards(lock, stream, 0) && !advance_any(lock, stream)) break;
      }
    }
  }
}

}  // namespace

Counters g_counters;

aclError device_error(int number) {
  Device &it = device(number);
  if (it.error) set_error(it.error_text);
  return it.error;
}

aclError drive(Lock &lock, Stream *stream, const std::function<bool()> &reached,
               const std::string &what) {
  double idle_since = 0;
  while (!reached()) {
    if (t_steps) {
      return fail(ACL_ERROR_RT_INTERNAL_ERROR,
                  "%s inside an operator's Python function waits for the stream it runs on",
                  what.c_str());
    }
    // The random schedule lets others go first now and then.
    if (options().schedule == Schedule::kRandom && draw() % 2 && advance_any(lock, stream)) {
      continue;
    }
    if (advance_towards(lock, stream, 0) || advance_any(lock, stream)) {
      idle_since = 0;
      continue;
    }
    const double now = now_seconds();
    if (!idle_since || someone_runs()) idle_since = now;
    const double limit = waits_for_peer(stream) ? options().peer_timeout : options().timeout;
    if (now - idle_since > limit) return give_up(stream, what);
    pause(lock, 200);
  }
  return device_error(stream->device);
}

aclError drain(Lock &lock, Stream *stream, const char *what) {
  const uint64_t target = stream->submitted;
  return drive(lock, stream, [=] { return stream->finished >= target; }, what);
}

aclError drain_device(Lock &lock, int number, const char *what) {
  for (Stream *stream : all_streams()) {
    const aclError code = stream->device == number ? drain(lock, stream, what) : 0;
    if (code == ACL_ERROR_RT_INTERNAL_ERROR) return code;
  }
  return device_error(number);
}

void give_turn(Lock &lock, Stream *stream) {
  if (stream) advance_towards(lock, stream, 0);
}

void run_after_submit(Lock &lock, Stream *stream) {
  switch (options().schedule) {
    case Schedule::kEager:
      run_everything(lock);
      break;
    case Schedule::kRandom:
      for (uint64_t turns = draw() % 4; turns > 0; --turns) advance_any(lock, nullptr);
      break;
    case Schedule::kLazy:
      if (stream->queue.size() > kFullQueue) {
        const uint64_t target = stream->submitted - kFullQueue / 2;
        drive(lock, stream, [=] { return stream->finished >= target; }, "a full stream");
      }
  }
}

// A peer process waits for this one's part of a collective, whether or not this one synchronises.
void start_background_progress() {
  static std::once_flag once;
  std::call_once(once, [] { std::thread(background_loop).detach(); });
}

}  // namespace sim

SIM_API int64_t sim_counter(const char *name) {
  sim::Lock lock(sim::g_mutex);
  const auto &it = sim::g_counters;
  const std::map<std::string, int64_t> numbers = {
      {"launches", it.launches},       {"captures", it.captures}, {"replays", it.replays},
      {"task_groups", it.task_groups}, {"updates", it.updates},   {"collectives", it.collectives},
  };
  auto found = numbers.find(name);
  return found == numbers.end() ? -1 : found->second;
}

// For a debugger attached to a process that hangs: call (char *)sim_describe().
SIM_API const char *sim_describe() {
  static auto *text = new std::string;
  sim::Lock lock(sim::g_mutex);
  text->clear();
  for (sim::Stream *stream : sim::all_streams()) {
    *text += sim::describe_block(stream) + sim::format(" (%zu queued)\n", stream->queue.size());
  }
  return text->c_str();
}
