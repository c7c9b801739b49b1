// aclnn operators: phase one is a Python function in a slot, phase two enqueues what it made.
//
// The first operator that is reached imports the Python module that fills the slots.
#include "runtime.h"

extern "C" {
__attribute__((visibility("hidden"))) extern void *sim_slots[];
__attribute__((visibility("hidden"))) extern const char *const sim_names[];
__attribute__((visibility("hidden"))) extern const int64_t sim_count;
}

namespace sim {
namespace {

constexpr const char *kModule = "ascend_plugin.ops.sim.bind";
constexpr aclError kOperatorError = 561103;  // what op-api answers for a failed phase one

std::atomic<int (*)(int64_t, int64_t, int64_t)> g_run{nullptr};
std::atomic<void (*)(int64_t)> g_release{nullptr};
std::mutex g_garbage_mutex;
std::vector<int64_t> g_garbage;

// What phase one made in Python; alive while a queue or a graph holds it.
struct Executor {
  explicit Executor(int64_t number) : id(number) {}
  ~Executor() {
    std::lock_guard<std::mutex> guard(g_garbage_mutex);
    g_garbage.push_back(id);
  }
  const int64_t id;
};

Outcome run(int64_t executor, int64_t stream, int64_t replay) {
  auto function = g_run.load();
  if (!function) return failed(kOperatorError, std::string(kModule) + " has set no launcher");
  if (!python_runs()) return {};  // the process ends
  set_error("the operator gave no reason");
  const int code = function(executor, stream, replay);
  return code ? failed(code, last_error()) : Outcome{};
}

}  // namespace

void collect_garbage() {
  auto function = g_release.load();
  std::vector<int64_t> dead;
  {
    std::lock_guard<std::mutex> guard(g_garbage_mutex);
    dead.swap(g_garbage);
  }
  if (!function || !python_runs()) return;
  for (int64_t id : dead) function(id);
}

}  // namespace sim

using namespace sim;

SIM_API int64_t sim_operator_count() { return sim_count; }
SIM_API const char *sim_operator_name(int64_t index) {
  return index >= 0 && index < sim_count ? sim_names[index] : "";
}
SIM_API void sim_set_operator(int64_t index, void *phase_one) { sim_slots[index] = phase_one; }
SIM_API void sim_set_launcher(int (*function)(int64_t, int64_t, int64_t)) { g_run = function; }
SIM_API void sim_set_release(void (*function)(int64_t)) { g_release = function; }

// The function for an empty slot, or null with the error kept. Called by the assembly stubs.
extern "C" void *sim_resolve(int64_t index) {
  // Several threads may come here at once: Python's import lock lets them wait for each other
  // without holding the interpreter, which a lock of ours could not.
  const std::string error = python_import(kModule);
  if (sim_slots[index]) return sim_slots[index];
  if (!error.empty()) {
    fail(kOperatorError, "%s cannot be computed: importing %s failed: %s", sim_names[index],
         kModule, error.c_str());
  } else {
    fail(kOperatorError, "%s is not simulated: %s has no function for it", sim_names[index],
         kModule);
  }
  return nullptr;
}

extern "C" int sim_launch(void *, uint64_t, void *executor, aclrtStream stream, int64_t index) {
  const int64_t id = reinterpret_cast<int64_t>(executor);
  if (id <= 0) return fail(kOperatorError, "%s: no executor", sim_names[index]);
  auto kept = std::make_shared<Executor>(id);
  Lock lock(g_mutex);
  Stream *found = find_stream(stream, sim_names[index]);
  if (!found) return ACL_ERROR_RT_PARAM_INVALID;
  const int64_t number = found->id;
  ++g_counters.launches;
  return submit(lock, found, call_operation(sim_names[index], [=](int64_t replay) {
                  return run(kept->id, number, replay);
                }));
}

// Executors belong to the queues and graphs that hold them.
SIM_API int aclDestroyAclOpExecutor(void *) { return 0; }
