// AscendC kernels: launches of their host model, tasks of a stream like the operators of CANN.
//
// A library that models kernels finds these functions with dlsym. What a kernel does is unknown
// here; what it moved it says itself, while it runs.
#include <fcntl.h>
#include <unistd.h>

#include "runtime.h"

namespace sim {
namespace {

constexpr aclError kKernelError = ACL_ERROR_RT_AICORE_EXCEPTION;
constexpr size_t kErrorSize = 4096;

using Run = int (*)(void *context, char *error, size_t error_size, unsigned long long seed);

// What was launched; alive while a queue or a graph holds it.
struct Kernel {
  Kernel(const char *name, Run run, void *context, void (*destroy)(void *))
      : name(name), run(run), context(context), destroy(destroy) {}
  ~Kernel() {
    if (destroy) destroy(context);
  }
  Kernel(const Kernel &) = delete;
  Kernel &operator=(const Kernel &) = delete;

  const std::string name;
  const Run run;
  void *const context;
  void (*const destroy)(void *);
};

// What the kernel that this thread runs has said about itself.
thread_local std::string t_report;

// The order in which the kernel's own pipes run: eager (0), as late as possible (1), drawn (2 on).
unsigned long long pipe_seed() {
  if (options().schedule == Schedule::kEager) return 0;
  if (options().schedule == Schedule::kLazy) return 1;
  Lock lock(g_mutex);
  return 2 + draw() % (1ull << 32);
}

int open_trace() {
  auto found = options().all.find("trace");
  if (found == options().all.end() || found->second.empty()) return -1;
  return open(found->second.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

// Appends the line that ops/sim/trace.py would write. One write: lines of processes do not mix.
void trace(const Kernel &kernel, int stream, int64_t replay) {
  static const int file = open_trace();
  if (file < 0) return;
  const std::string line =
      format("{\"operator\": \"%s\", \"tensors\": [], %s, \"stream\": %d, \"replay\": %lld, ",
             kernel.name.c_str(), t_report.empty() ? "\"bytes\": 0" : t_report.c_str(), stream,
             (long long)replay) +
      format("\"pid\": %d}\n", (int)getpid());
  if (write(file, line.data(), line.size()) < 0) perror("ascend-plugin simulator: trace");
}

Outcome launch(const Kernel &kernel, int stream, int64_t replay) {
  std::string error(kErrorSize, '\0');
  t_report.clear();
  if (kernel.run(kernel.context, error.data(), error.size(), pipe_seed())) {
    const std::string text = error.c_str();
    return failed(kKernelError, text.empty() ? "the kernel gave no reason" : text);
  }
  trace(kernel, stream, replay);
  return {};
}

}  // namespace
}  // namespace sim

using namespace sim;

// Enqueues a kernel, or captures it. `context` is the launch's own: `destroy` is called when no
// queue and no graph needs it, also if this call fails.
SIM_API int sim_launch_kernel(void *handle, const char *name, Run run, void *context,
                              void (*destroy)(void *)) {
  auto kernel = std::make_shared<Kernel>(name, run, context, destroy);
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, name);
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  const int number = stream->id;
  ++g_counters.launches;
  return submit(lock, stream, call_operation(name, [kernel, number](int64_t replay) {
                  return launch(*kernel, number, replay);
                }));
}

// Members of a JSON object ("bytes", "cycles", …) for the trace's line of the running kernel.
SIM_API void sim_kernel_report(const char *members) { t_report = members; }
