// C entry points of a kernel library: for the Python harness and for the simulated NPU.
#include "launch.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "costs.h"

namespace ascendc_host {
namespace {

std::mutex launch_lock;

/// The argument that by convention is scratch memory: small, and written again and again.
constexpr char WORKSPACE[] = "workspace";

void copy_text(const std::string& text, char* out, size_t size) {
  if (size > 0) std::snprintf(out, size, "%s", text.c_str());
}

/// The estimate of a launch.
struct Estimate {
  uint64_t read = 0;
  uint64_t written = 0;
  uint64_t workspace = 0;        // of both, what goes to the workspace and comes back
  uint64_t pipe_cycles = 0;      // longest chain of instructions and flags on a core
  uint64_t memory_cycles = 0;    // traffic at the bandwidth of HBM, that of the workspace at L2's
  uint64_t busiest_cycles = 0;   // of what is busy longest: the memory, or a pipe of a core
  std::string busiest = "HBM";   // its name
  const char* bound = "memory";  // and what it belongs to
};

Estimate estimate(const Machine& machine);

std::string pipe_report(const Machine& machine, Core::Kind kind) {
  std::string text;
  for (int pipe = 0; pipe < PIPE_COUNT; ++pipe) {
    PipeCounters sum;
    for (int i = 0; i < machine.core_count(); ++i) {
      if (machine.core(i).kind() != kind) continue;
      const PipeCounters& counters = machine.core(i).counters(pipe);
      sum.instructions += counters.instructions;
      sum.bytes += counters.bytes;
      sum.busy_cycles += counters.busy_cycles;
    }
    if (sum.instructions == 0) continue;
    text += (text.empty() ? "\"" : ",\"") + std::string(PIPE_NAME[pipe]) +
            "\":{\"instructions\":" + std::to_string(sum.instructions) +
            ",\"bytes\":" + std::to_string(sum.bytes) +
            ",\"busy_cycles\":" + std::to_string(sum.busy_cycles) + "}";
  }
  return "{" + text + "}";
}

std::string report(const Machine& machine) {
  std::string buffers;
  for (const Buffer& buffer : machine.gm.buffers()) {
    buffers += (buffers.empty() ? "\"" : ",\"") + buffer.name +
               "\":{\"read\":" + std::to_string(buffer.read) +
               ",\"written\":" + std::to_string(buffer.written) + "}";
  }
  const Estimate cost = estimate(machine);
  return "{\"aic\":" + pipe_report(machine, Core::Kind::AIC) +
         ",\"aiv\":" + pipe_report(machine, Core::Kind::AIV) + ",\"buffers\":{" + buffers +
         "},\"pipe_cycles\":" + std::to_string(cost.pipe_cycles) +
         ",\"memory_cycles\":" + std::to_string(cost.memory_cycles) + ",\"busiest\":\"" +
         cost.busiest + "\",\"busiest_cycles\":" + std::to_string(cost.busiest_cycles) +
         ",\"bound\":\"" + cost.bound + "\",\"clock_ghz\":" + std::to_string(CLOCK_GHZ) + "}";
}

/// Largest number of busy cycles of `pipe` on a core of `kind`.
uint64_t busiest(const Machine& machine, Core::Kind kind, int pipe) {
  uint64_t most = 0;
  for (int i = 0; i < machine.core_count(); ++i) {
    if (machine.core(i).kind() != kind) continue;
    most = std::max(most, machine.core(i).counters(pipe).busy_cycles);
  }
  return most;
}

/// Pipes that may bound a launch; of equals the first counts.
constexpr struct {
  const char* name;
  const char* bound;
  Core::Kind kind;
  int pipe;
} BOUNDS[] = {
    {"AIC MTE2", "memory", Core::Kind::AIC, PIPE_MTE2},
    {"AIC MTE3", "memory", Core::Kind::AIC, PIPE_MTE3},
    {"AIC FIX", "memory", Core::Kind::AIC, PIPE_FIX},
    {"AIV MTE2", "memory", Core::Kind::AIV, PIPE_MTE2},
    {"AIV MTE3", "memory", Core::Kind::AIV, PIPE_MTE3},
    {"AIC M", "cube", Core::Kind::AIC, PIPE_M},
    {"AIC MTE1", "cube", Core::Kind::AIC, PIPE_MTE1},
    {"AIV V", "vector", Core::Kind::AIV, PIPE_V},
};

/// Cycles that the traffic takes: what stays in L2 moves at its rate, all else also through HBM.
uint64_t memory_cycles(const Estimate& traffic) {
  const double all = static_cast<double>(traffic.read + traffic.written);
  const double outside = all - static_cast<double>(traffic.workspace);
  const double seconds = std::max(outside / HBM_BYTES_PER_SECOND, all / L2_BYTES_PER_SECOND);
  return static_cast<uint64_t>(seconds * CLOCK_GHZ * 1e9);
}

Estimate estimate(const Machine& machine) {
  Estimate result;
  for (const Buffer& buffer : machine.gm.buffers()) {
    result.read += buffer.read;
    result.written += buffer.written;
    if (buffer.name == WORKSPACE) result.workspace += buffer.read + buffer.written;
  }
  for (int i = 0; i < machine.core_count(); ++i) {
    result.pipe_cycles = std::max(result.pipe_cycles, machine.core(i).end_cycle());
  }
  result.busiest_cycles = result.memory_cycles = memory_cycles(result);
  for (const auto& candidate : BOUNDS) {
    const uint64_t cycles = busiest(machine, candidate.kind, candidate.pipe);
    if (cycles <= result.busiest_cycles) continue;
    result.busiest_cycles = cycles;
    result.busiest = candidate.name;
    result.bound = candidate.bound;
  }
  return result;
}

/// A launch waiting on a stream of the simulated NPU.
struct StreamLaunch {
  const Entry* entry;
  uint32_t block_dim;
  std::vector<uint64_t> words;
};

/// GM buffers of a stream's launch: from each pointer to the end of its allocation.
std::vector<Buffer> stream_buffers(const StreamLaunch& launch) {
  using BytesLeft = long long (*)(void*);
  static const auto bytes_left = reinterpret_cast<BytesLeft>(dlsym(RTLD_DEFAULT, "sim_bytes_left"));
  std::vector<Buffer> buffers;
  if (bytes_left == nullptr) return buffers;
  const char* declared = launch.entry->arguments;
  for (uint64_t word : launch.words) {
    const char* space = std::strchr(declared, ' ');
    const char* comma = std::strchr(declared, ',');
    const bool pointer = std::strncmp(declared, "GM_ADDR", 7) == 0;
    const std::string name =
        comma == nullptr ? std::string(space + 1) : std::string(space + 1, comma);
    declared = comma == nullptr ? declared + std::strlen(declared) : comma + 1;
    if (!pointer || word == 0) continue;
    const long long left = bytes_left(reinterpret_cast<void*>(word));
    if (left <= 0) continue;
    Buffer buffer;
    buffer.begin = word;
    buffer.bytes = static_cast<uint64_t>(left);
    buffer.name = name;
    buffers.push_back(std::move(buffer));
  }
  return buffers;
}

/// Adds this launch's traffic and estimate to the trace of the simulated NPU.
void report_to_stream(const Machine& machine, const StreamLaunch& launch) {
  using Report = void (*)(const char*);
  static const auto submit = reinterpret_cast<Report>(dlsym(RTLD_DEFAULT, "sim_kernel_report"));
  if (submit == nullptr) return;
  const Estimate cost = estimate(machine);
  std::string reads;
  for (const Buffer& buffer : machine.gm.buffers()) {
    if (buffer.read == 0) continue;
    reads += (reads.empty() ? "\"" : ", \"") + buffer.name + "\": " + std::to_string(buffer.read);
  }
  const std::string text =
      "\"bytes\": " + std::to_string(cost.read + cost.written) +
      ", \"read\": " + std::to_string(cost.read) +
      ", \"written\": " + std::to_string(cost.written) +
      ", \"workspace\": " + std::to_string(cost.workspace) + ", \"reads\": {" + reads + "}" +
      ", \"cycles\": " + std::to_string(std::max(cost.pipe_cycles, cost.memory_cycles)) +
      ", \"memory_cycles\": " + std::to_string(cost.memory_cycles) +
      ", \"busiest_cycles\": " + std::to_string(cost.busiest_cycles) + ", \"busiest\": \"" +
      cost.busiest + "\", \"bound\": \"" + cost.bound +
      "\", \"clock_ghz\": " + std::to_string(CLOCK_GHZ) +
      ", \"cores\": " + std::to_string(launch.block_dim);
  submit(text.c_str());
}

int run_stream_launch(void* context, char* error, size_t error_size, unsigned long long seed) {
  const auto* launch = static_cast<const StreamLaunch*>(context);
  LaunchOptions options;
  options.block_dim = launch->block_dim;
  options.type = launch->entry->type;
  options.schedule = Schedule::of_seed(seed);
  options.races = false;  // for speed; the tests of the kernels look for them
  const std::lock_guard<std::mutex> guard(launch_lock);
  std::vector<Buffer> buffers = stream_buffers(*launch);
  options.bounded = !buffers.empty();
  try {
    machine().launch(options, std::move(buffers),
                     [launch] { launch->entry->run(launch->words.data()); });
    report_to_stream(machine(), *launch);
  } catch (const KernelError& failure) {
    copy_text(std::string(launch->entry->name) + ": " + failure.text, error, error_size);
    return 1;
  } catch (const std::exception& failure) {
    copy_text(std::string(launch->entry->name) + ": " + failure.what(), error, error_size);
    return 1;
  }
  return 0;
}

void destroy_stream_launch(void* context) { delete static_cast<StreamLaunch*>(context); }

}  // namespace

uint32_t launch_on_stream(const Entry& entry, uint32_t block_dim, void* stream,
                          const uint64_t* words) {
  using Run = int (*)(void*, char*, size_t, unsigned long long);
  using Submit = int (*)(void*, const char*, Run, void*, void (*)(void*));
  static const auto submit = reinterpret_cast<Submit>(dlsym(RTLD_DEFAULT, "sim_launch_kernel"));
  if (submit == nullptr) {
    std::fprintf(stderr, "%s: no simulated NPU in this process (sim_launch_kernel is missing)\n",
                 entry.name);
    return 1;
  }
  auto launch = std::make_unique<StreamLaunch>(
      StreamLaunch{&entry, block_dim, std::vector<uint64_t>(words, words + entry.argument_count)});
  return submit(stream, entry.name, run_stream_launch, launch.release(), destroy_stream_launch) == 0
             ? 0
             : 1;
}

}  // namespace ascendc_host

using namespace ascendc_host;

extern "C" {

/// A GM buffer of a launch from Python.
struct ascendc_host_buffer {
  uint64_t address;
  uint64_t bytes;
  const char* name;
};

/// Entry points as lines "name type(argument, ...)"; for the Python harness.
__attribute__((visibility("default"))) const char* ascendc_host_entries() {
  static const std::string text = [] {
    std::string lines;
    for (int i = 0; i < ENTRY_COUNT; ++i) {
      lines += std::string(ENTRIES[i].name) + "\t" +
               std::to_string(static_cast<int>(ENTRIES[i].type)) + "\t" + ENTRIES[i].arguments +
               "\n";
    }
    return lines;
  }();
  return text.c_str();
}

/// Runs entry point `index` (bits of `checks`: 1 strict, 2 races); returns 0 with a report in
/// `out`, or 1 with an error.
__attribute__((visibility("default"))) int ascendc_host_launch(
    int index, uint32_t block_dim, uint64_t seed, int checks, const uint64_t* words,
    const ascendc_host_buffer* buffers, uint32_t buffer_count, char* out, size_t out_size) {
  const Entry& entry = ENTRIES[index];
  LaunchOptions options;
  options.block_dim = block_dim;
  options.type = entry.type;
  options.schedule = Schedule::of_seed(seed);
  options.strict = (checks & 1) != 0;
  options.races = (checks & 2) != 0;
  std::vector<Buffer> registered;
  for (uint32_t i = 0; i < buffer_count; ++i) {
    Buffer buffer;
    buffer.begin = buffers[i].address;
    buffer.bytes = buffers[i].bytes;
    buffer.name = buffers[i].name;
    registered.push_back(std::move(buffer));
  }
  const std::lock_guard<std::mutex> guard(launch_lock);
  try {
    machine().launch(options, std::move(registered), [&] { entry.run(words); });
  } catch (const KernelError& error) {
    copy_text(error.text, out, out_size);
    return 1;
  } catch (const std::exception& error) {
    copy_text(error.what(), out, out_size);
    return 1;
  }
  copy_text(report(machine()), out, out_size);
  return 0;
}

}  // extern "C"
