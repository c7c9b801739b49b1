// The simulated CANN runtime: what its files share.
//
// One lock guards all state. It is never held while a task runs, so that a task may call Python;
// and a host thread that waits while it holds Python's lock gives that back first.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "acl/acl.h"
#include "acl/acl_mdl.h"
#include "acl/acl_op.h"
#include "acl/acl_op_compiler.h"
#include "acl/acl_rt.h"

#define SIM_API extern "C" __attribute__((visibility("default")))

namespace sim {

// --- options and errors (options.cpp, errors.cpp)

enum class Schedule { kLazy, kEager, kRandom };

struct Options {
  int devices = 1;
  size_t memory = 8ull << 30;
  size_t streams = 2048;  // of a device, with those that captured graphs hold
  std::string soc = "Ascend910B1";
  Schedule schedule = Schedule::kLazy;
  uint64_t seed = 0;
  double timeout = 60, peer_timeout = 600;
  std::map<std::string, std::string> all;
};
const Options &options();
uint64_t draw();  // the next number of the seeded generator; call it with the lock held

// Keeps the text for aclGetRecentErrMsg of this thread and returns the code.
__attribute__((format(printf, 2, 3))) aclError fail(aclError code, const char *format, ...);
__attribute__((format(printf, 1, 2))) std::string format(const char *format, ...);
void set_error(const std::string &text);
const std::string &last_error();

// --- the lock, and Python's

extern std::mutex g_mutex;
extern std::condition_variable &g_changed;
using Lock = std::unique_lock<std::mutex>;

bool python_runs();
// Imports a module; the error's text, or nothing. Call it without the lock.
std::string python_import(const char *module);
// Waits until something changed or some time passed; gives Python's lock back meanwhile.
void pause(Lock &lock, int microseconds);
double now_seconds();

// --- tasks and streams (stream.cpp, scheduler.cpp)

enum class Step { kDone, kProgress, kBlocked, kFailed };

struct Outcome {
  Step step = Step::kDone;
  aclError code = 0;
  std::string text;
};
Outcome failed(aclError code, const std::string &text);

struct Stream;

// A unit of work of a stream. step() is called without the lock, again until it is done.
class Task {
 public:
  virtual ~Task() = default;
  virtual Outcome step() = 0;
  // Instead of the remaining steps, once an error has stopped the device.
  virtual void cancel() {}
  // What it waits for, for messages and to find who can end the wait. The lock is held.
  virtual std::string waits_for() const { return "nothing"; }
  virtual Stream *producer() const { return nullptr; }
  virtual bool remote() const { return false; }
};
using TaskPointer = std::unique_ptr<Task>;

// What is enqueued: kept by a captured graph, which makes a task from it for every replay.
struct Operation {
  std::string name;
  std::function<TaskPointer(int64_t replay)> make;  // its number, 0 if it is none
  bool remote = false;                              // other processes wait for it
};
// An operation that is one call of a function.
Operation call_operation(std::string name, std::function<Outcome(int64_t replay)> function);

struct Graph;
struct TaskGroup;

struct Stream {
  int id = 0, device = 0;
  std::deque<TaskPointer> queue;
  std::deque<std::string> names;  // of the tasks in the queue
  uint64_t submitted = 0, finished = 0;
  bool running = false;  // a thread is in a step of the first task

  // While the stream is captured:
  std::shared_ptr<Graph> capture;
  int lane = 0;                   // order in which streams joined the capture
  int last_node = -1;             // of this stream, -1 before the first
  std::vector<int> waits;         // nodes that the next one waits for
  TaskGroup *group = nullptr;     // being captured
  TaskGroup *updating = nullptr;  // whose operations are being replaced
  std::vector<Operation> update;
};

struct Device {
  int number = 0;
  bool active = false;
  size_t allocated = 0, peak = 0;
  Stream *default_stream = nullptr;
  aclError error = 0;  // sticky
  std::string error_text;
};

// All of these need the lock.
Device &device(int number);
std::vector<Stream *> all_streams();
int current_device();  // of this thread, -1 when none is set
Stream *new_stream(int device);
// Refuses one more stream, of a device that has as many as there may be. A captured graph holds one
// for each stream that it was captured from, until it is destroyed.
aclError refuse_if_no_stream_is_left(int device, const char *caller);
// The stream of a handle; null (with the error kept) for a handle that is none.
Stream *find_stream(aclrtStream handle, const char *caller);

// Enqueues, or captures, or collects for a task update. Takes the lock.
aclError submit(aclrtStream handle, const char *caller, Operation operation);
aclError submit(Lock &lock, Stream *stream, Operation operation);
// Runs tasks until `reached` holds; `what` names the call for the message of a wait without end.
aclError drive(Lock &lock, Stream *stream, const std::function<bool()> &reached,
               const std::string &what);
aclError drain(Lock &lock, Stream *stream, const char *what);
aclError drain_device(Lock &lock, int device, const char *what);
void give_turn(Lock &lock, Stream *stream);  // one step, for a host that polls
aclError device_error(int device);           // the sticky error, its text kept
void run_after_submit(Lock &lock, Stream *stream);
void start_background_progress();  // for collectives: peers must not wait for a lazy stream

// Numbers of this process for tests and reports; the lock is held.
struct Counters {
  int64_t launches = 0, captures = 0, replays = 0, task_groups = 0, updates = 0, collectives = 0;
};
extern Counters g_counters;

// --- events (event.cpp)

struct Event {
  int id = 0;
  uint32_t flag = 0;
  uint64_t requested = 0, completed = 0;
  double time_ms = 0;
  Stream *stream = nullptr;  // of the last record
  std::weak_ptr<Graph> capture;
  int node = -1;  // in the capture
};

// --- captured graphs (capture.cpp, graph.cpp); the lock is held

struct Node {
  Operation operation;
  std::vector<int> needs;
  int lane = 0;
};

struct TaskGroup {
  int id = 0;
  Graph *graph = nullptr;
  std::vector<int> nodes;
  bool open = true;
};

struct Graph : std::enable_shared_from_this<Graph> {
  int id = 0, device = 0;
  aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  uint64_t thread = 0;
  bool capturing = true;
  std::string invalid;  // why the capture cannot be ended with success
  Stream *origin = nullptr;
  std::vector<Stream *> streams;
  std::vector<Node> nodes;
  int64_t replays = 0;
  std::vector<std::unique_ptr<TaskGroup>> groups;
};

int add_node(Stream *stream, Operation operation);
size_t captured_streams(int device);  // that graphs hold
void join_capture(Stream *stream, const std::shared_ptr<Graph> &graph);
// Refuses a call that a capture in progress forbids in this thread (null: allowed).
Graph *forbidding_capture();
aclError refuse_if_capturing(const char *caller);
aclError refuse_captured(Stream *stream, const char *caller);
aclError refuse_device_captured(int device, const char *caller);
uint64_t thread_number();

// --- memory (memory.cpp); these take a lock of their own

enum class Place { kDevice, kPinned, kPageable };
struct Found {
  Place place = Place::kPageable;
  int device = -1;
  size_t left = 0;  // bytes from the pointer to the end of its allocation
};
Found find_memory(const void *pointer);
void note_mapping(void *base, size_t size, int device);  // virtual memory
void drop_mapping(void *base);
// Counts bytes against a device's limit. The lock is held.
aclError take_memory(int device, size_t size, const char *caller);
void give_memory(int device, size_t size);

// --- operators (operators.cpp, tensor.cpp)

size_t element_bytes(int dtype);  // of an aclDataType; 0 for one that is not simulated

void collect_garbage();  // releases executors in Python; call it without the lock

}  // namespace sim
