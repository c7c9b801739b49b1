// Operators of torch that launch the AscendC kernels. They check nothing: ops/npu has done that.
//
// A launch is a task of torch_npu's own queue, like its operators: nothing waits on the host, with
// TASK_QUEUE_ENABLE 0 and 1 and while a graph is captured. The kernels' functions are found by the
// loader (ops/ascendc/library.py), which hands their addresses over, so that one file serves the
// kernels of CANN's compiler and those of the host model.
//
// A task keeps addresses only. That is enough for memory of torch_npu's allocator, which gives
// freed memory to later tasks of the same stream; who allocates on another stream records this one.
#include <torch/library.h>

#include <limits>
#include <map>
#include <mutex>
#include <string>

#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

#define ATTENTION_TILING_FUNCTION inline
#include "attention_tiling.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Numbers = at::IntArrayRef;

std::mutex g_mutex;

std::map<std::string, void *> &functions() {
  static auto *made = new std::map<std::string, void *>;  // threads may launch when a process ends
  return *made;
}

void bind(c10::string_view entry, int64_t address) {
  std::lock_guard<std::mutex> guard(g_mutex);
  functions()[std::string(entry)] = reinterpret_cast<void *>(address);
}

void *find(const std::string &entry) {
  std::lock_guard<std::mutex> guard(g_mutex);
  auto found = functions().find(entry);
  TORCH_CHECK(found != functions().end(), "the kernel ", entry, " is not loaded");
  return found->second;
}

void *at_(const Tensor &tensor) { return tensor.data_ptr(); }
void *at_(const Optional &tensor) { return tensor ? tensor->data_ptr() : nullptr; }

uint32_t number(int64_t value) {
  TORCH_CHECK(value >= 0 && value <= std::numeric_limits<uint32_t>::max(), value,
              " does not fit into 32 bits");
  return static_cast<uint32_t>(value);
}

// Puts the call of aclrtlaunch_<entry> into the queue of the current stream.
template <class... Arguments>
void enqueue(c10::string_view kernel, int64_t cores, Arguments... arguments) {
  using Launch = uint32_t (*)(uint32_t cores, void *stream, Arguments...);
  const std::string entry(kernel);
  const auto launch = reinterpret_cast<Launch>(find(entry));
  const uint32_t blocks = number(cores);
  void *stream = c10_npu::getCurrentNPUStream().stream(false);  // true would empty the queue
  at_npu::native::OpCommand::RunOpApiV2(
      entry, [=]() -> int { return static_cast<int>(launch(blocks, stream, arguments...)); });
}

void kv_cache_write(c10::string_view entry, int64_t cores, const Tensor &key, const Tensor &value,
                    const Tensor &slots, const Tensor &pages, const Optional &extras,
                    const Optional &channel_scales, const Optional &counters, Numbers sizes,
                    double k_threshold, double v_threshold, int64_t patch_code) {
  TORCH_CHECK(sizes.size() == 7, "kv_cache_write takes 7 sizes, got ", sizes.size());
  enqueue(entry, cores, at_(key), at_(value), at_(slots), at_(pages), at_(extras),
          at_(channel_scales), at_(counters), number(sizes[0]), number(sizes[1]), number(sizes[2]),
          number(sizes[3]), number(sizes[4]), number(sizes[5]), number(sizes[6]),
          static_cast<float>(k_threshold), static_cast<float>(v_threshold), number(patch_code));
}

void kv_cache_gather(c10::string_view entry, int64_t cores, const Tensor &pages,
                     const Optional &extras, const Optional &channel_scales,
                     const Tensor &block_table, const Tensor &seq_lens, const Tensor &starts,
                     const Tensor &key, const Tensor &value, Numbers sizes, int64_t patch_code) {
  TORCH_CHECK(sizes.size() == 6, "kv_cache_gather takes 6 sizes, got ", sizes.size());
  enqueue(entry, cores, at_(pages), at_(extras), at_(channel_scales), at_(block_table),
          at_(seq_lens), at_(starts), at_(key), at_(value), number(sizes[0]), number(sizes[1]),
          number(sizes[2]), number(sizes[3]), number(sizes[4]), number(sizes[5]),
          number(patch_code));
}

void paged_attention(c10::string_view entry, int64_t cores, const Tensor &query,
                     const Tensor &pages, const Optional &extras, const Optional &channel_scales,
                     const Tensor &block_table, const Tensor &query_start_loc,
                     const Tensor &seq_lens, const Tensor &out, const Tensor &workspace,
                     Numbers sizes, double scale, Numbers options) {
  TORCH_CHECK(sizes.size() == 10, "paged_attention takes 10 sizes, got ", sizes.size());
  TORCH_CHECK(options.size() == 3, "paged_attention takes 3 options, got ", options.size());
  enqueue(entry, cores, at_(query), at_(pages), at_(extras), at_(channel_scales), at_(block_table),
          at_(query_start_loc), at_(seq_lens), at_(out), at_(workspace), number(sizes[0]),
          number(sizes[1]), number(sizes[2]), number(sizes[3]), number(sizes[4]), number(sizes[5]),
          number(sizes[6]), number(sizes[7]), number(sizes[8]), number(sizes[9]),
          static_cast<float>(scale), number(options[0]), number(options[1]), number(options[2]));
}

// Bytes of the workspace of paged_attention; sizes: heads, kv_heads, head_dim, block_size,
// max_query_len, window, quantisation.
int64_t workspace_bytes(Numbers sizes, int64_t cores) {
  TORCH_CHECK(sizes.size() == 7, "workspace_bytes takes 7 sizes, got ", sizes.size());
  const auto geometry = attention_tiling::MakeGeometry(
      number(sizes[0]), number(sizes[1]), number(sizes[2]), number(sizes[3]), number(sizes[4]),
      number(sizes[5]), number(sizes[6]));
  return static_cast<int64_t>(attention_tiling::WorkspaceBytes(geometry, number(cores)));
}

void beam_topk(c10::string_view entry, int64_t cores, const Tensor &codes, const Tensor &scales,
               const Optional &logits, const Tensor &indices, const Tensor &scores,
               const Tensor &log_probs, const Tensor &workspace, Numbers sizes) {
  TORCH_CHECK(sizes.size() == 5, "beam_topk takes 5 sizes, got ", sizes.size());
  enqueue(entry, cores, at_(codes), at_(scales), at_(logits), at_(indices), at_(scores),
          at_(log_probs), at_(workspace), number(sizes[0]), number(sizes[1]), number(sizes[2]),
          number(sizes[3]), number(sizes[4]));
}

}  // namespace

TORCH_LIBRARY(ascend_plugin_launch, library) {
  library.def("bind(str entry, int address) -> ()", bind);
  library.def("workspace_bytes(int[] sizes, int cores) -> int", workspace_bytes);
  library.def(
      "kv_cache_write(str entry, int cores, Tensor key, Tensor value, Tensor slots, "
      "Tensor(a!) pages, Tensor(b!)? extras, Tensor? channel_scales, Tensor(c!)? counters, "
      "int[] sizes, float k_threshold, float v_threshold, int patch_code) -> ()");
  library.def(
      "kv_cache_gather(str entry, int cores, Tensor pages, Tensor? extras, "
      "Tensor? channel_scales, Tensor block_table, Tensor seq_lens, Tensor starts, "
      "Tensor(a!) key, Tensor(b!) value, int[] sizes, int patch_code) -> ()");
  library.def(
      "paged_attention(str entry, int cores, Tensor query, Tensor pages, Tensor? extras, "
      "Tensor? channel_scales, Tensor block_table, Tensor query_start_loc, Tensor seq_lens, "
      "Tensor(a!) out, Tensor(b!) workspace, int[] sizes, float scale, int[] options) -> ()");
  library.def(
      "beam_topk(str entry, int cores, Tensor codes, Tensor scales, Tensor? logits, "
      "Tensor(a!) indices, Tensor(b!) scores, Tensor(c!) log_probs, Tensor(d!) workspace, "
      "int[] sizes) -> ()");
}

TORCH_LIBRARY_IMPL(ascend_plugin_launch, PrivateUse1, library) {
  library.impl("kv_cache_write", kv_cache_write);
  library.impl("kv_cache_gather", kv_cache_gather);
  library.impl("paged_attention", paged_attention);
  library.impl("beam_topk", beam_topk);
}
