// Capture: what streams enqueue becomes nodes of a graph, their order and their event waits edges.
#include <algorithm>
#include <set>

#include "graph.h"

namespace sim {
namespace {

int g_next_graph = 0, g_next_group = 0;

// 0 global, 1 thread local, 2 relaxed: what this thread wants to be protected from.
thread_local aclmdlRICaptureMode t_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

std::map<Graph *, std::shared_ptr<Graph>> &graphs() {
  static auto *made = new std::map<Graph *, std::shared_ptr<Graph>>;
  return *made;
}

void leave_capture(Stream *stream) {
  stream->capture.reset();
  stream->lane = 0;
  stream->last_node = -1;
  stream->waits.clear();
  stream->group = nullptr;
}

std::set<int> ancestors(const Graph &graph, const std::vector<int> &from) {
  std::set<int> seen;
  std::vector<int> todo = from;
  while (!todo.empty()) {
    const int node = todo.back();
    todo.pop_back();
    if (node < 0 || !seen.insert(node).second) continue;
    const auto &needs = graph.nodes[node].needs;
    todo.insert(todo.end(), needs.begin(), needs.end());
  }
  return seen;
}

// A stream that forked off must have been waited for, or its work would hang loose.
std::string find_unjoined(const Graph &graph) {
  std::vector<int> last = graph.origin->waits;
  last.push_back(graph.origin->last_node);
  const std::set<int> joined = ancestors(graph, last);
  for (Stream *stream : graph.streams) {
    if (stream != graph.origin && stream->last_node >= 0 && !joined.count(stream->last_node)) {
      return format("stream %d, whose last task is %s", stream->id,
                    graph.nodes[stream->last_node].operation.name.c_str());
    }
  }
  return "";
}

}  // namespace

uint64_t thread_number() {
  static std::atomic<uint64_t> next{1};
  thread_local const uint64_t mine = next++;
  return mine;
}

std::shared_ptr<Graph> find_graph(aclmdlRI handle, const char *caller) {
  auto it = graphs().find(static_cast<Graph *>(handle));
  if (it != graphs().end()) return it->second;
  fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is no graph, or a destroyed one", caller, handle);
  return nullptr;
}

TaskGroup *find_group(aclrtTaskGrp handle, const char *caller) {
  for (auto &entry : graphs()) {
    for (auto &group : entry.second->groups) {
      if (group.get() == handle) return group.get();
    }
  }
  fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "%s: %p is no task group of a living graph", caller,
       handle);
  return nullptr;
}

int add_node(Stream *stream, Operation operation) {
  Graph &graph = *stream->capture;
  Node node{std::move(operation), std::move(stream->waits), stream->lane};
  stream->waits.clear();
  if (stream->last_node >= 0) node.needs.push_back(stream->last_node);
  std::sort(node.needs.begin(), node.needs.end());
  node.needs.erase(std::unique(node.needs.begin(), node.needs.end()), node.needs.end());
  graph.nodes.push_back(std::move(node));
  stream->last_node = (int)graph.nodes.size() - 1;
  if (stream->group) stream->group->nodes.push_back(stream->last_node);
  return stream->last_node;
}

void join_capture(Stream *stream, const std::shared_ptr<Graph> &graph) {
  leave_capture(stream);
  stream->capture = graph;
  stream->lane = (int)graph->streams.size();
  graph->streams.push_back(stream);
}

size_t captured_streams(int number) {
  size_t held = 0;
  for (auto &entry : graphs()) {
    if (entry.first->device == number) held += entry.first->streams.size();
  }
  return held;
}

Graph *forbidding_capture() {
  if (t_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return nullptr;
  for (auto &entry : graphs()) {
    Graph *graph = entry.first;
    if (!graph->capturing || graph->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) continue;
    const bool mine = graph->thread == thread_number();
    const bool global = graph->mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL &&
                        t_mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
    if (mine || global) return graph;
  }
  return nullptr;
}

aclError refuse_if_capturing(const char *caller) {
  Graph *graph = forbidding_capture();
  if (!graph) return 0;
  graph->invalid = format("%s was called during the capture", caller);
  return fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
              "%s is not allowed while stream %d is captured into graph %d; do it before the "
              "capture",
              caller, graph->origin->id, graph->id);
}

aclError refuse_captured(Stream *stream, const char *caller) {
  stream->capture->invalid = format("%s of captured stream %d", caller, stream->id);
  return fail(ACL_ERROR_RT_STREAM_CAPTURED,
              "%s: stream %d is captured into graph %d, so its tasks have not run and cannot be "
              "waited for or asked about",
              caller, stream->id, stream->capture->id);
}

aclError refuse_device_captured(int number, const char *caller) {
  for (auto &entry : graphs()) {
    Graph *graph = entry.first;
    if (!graph->capturing || graph->device != number) continue;
    graph->invalid = format("%s was called during the capture", caller);
    return fail(ACL_ERROR_RT_STREAM_CAPTURED,
                "%s: stream %d of device %d is captured into graph %d, so the device cannot be "
                "waited for",
                caller, graph->origin->id, number, graph->id);
  }
  return 0;
}

}  // namespace sim

using namespace sim;

SIM_API aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, "aclmdlRICaptureBegin");
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (stream->capture) {
    return fail(ACL_ERROR_RT_STREAM_CAPTURED, "aclmdlRICaptureBegin: stream %d is captured already",
                stream->id);
  }
  if (aclError error = refuse_if_no_stream_is_left(stream->device, "aclmdlRICaptureBegin")) {
    return error;
  }
  auto graph = std::make_shared<Graph>();
  graph->id = g_next_graph++;
  graph->device = stream->device;
  graph->mode = mode;
  graph->thread = thread_number();
  graph->origin = stream;
  graphs()[graph.get()] = graph;
  join_capture(stream, graph);
  ++g_counters.captures;
  return 0;
}

SIM_API aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI *model) {
  Lock lock(g_mutex);
  *model = nullptr;
  Stream *stream = find_stream(handle, "aclmdlRICaptureEnd");
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  auto graph = stream->capture;
  if (!graph) {
    return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "aclmdlRICaptureEnd: stream %d is not captured",
                stream->id);
  }
  if (graph->origin != stream) {
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED,
                "aclmdlRICaptureEnd: the capture of graph %d began on stream %d, not on %d",
                graph->id, graph->origin->id, stream->id);
  }
  const std::string unjoined = find_unjoined(*graph);
  const bool open = stream->group != nullptr;
  for (Stream *member : graph->streams) leave_capture(member);
  graph->capturing = false;
  *model = graph.get();
  if (!graph->invalid.empty()) {
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
                "aclmdlRICaptureEnd: the capture of graph %d is invalid: %s", graph->id,
                graph->invalid.c_str());
  }
  if (open) {
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                "aclmdlRICaptureEnd: a task group of graph %d is still open", graph->id);
  }
  if (unjoined.empty()) return 0;
  graph->invalid = "a stream is not joined";
  return fail(ACL_ERROR_RT_STREAM_UNJOINED,
              "aclmdlRICaptureEnd: the capture of graph %d holds %s; stream %d must wait for an "
              "event after it before the capture ends",
              graph->id, unjoined.c_str(), graph->origin->id);
}

SIM_API aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus *status,
                                        aclmdlRI *model) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, "aclmdlRICaptureGetInfo");
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  Graph *graph = stream->capture.get();
  *status = graph ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (graph && !graph->invalid.empty()) *status = ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
  if (model) *model = graph;
  return 0;
}

SIM_API aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
  std::swap(*mode, t_mode);
  return 0;
}

SIM_API aclError aclmdlRIGetId(aclmdlRI model, uint32_t *id) {
  Lock lock(g_mutex);
  auto graph = find_graph(model, "aclmdlRIGetId");
  if (!graph) return ACL_ERROR_RT_PARAM_INVALID;
  *id = graph->id;
  return 0;
}

SIM_API aclError aclmdlRIDestroy(aclmdlRI model) {
  std::shared_ptr<Graph> dead;
  {
    Lock lock(g_mutex);
    dead = find_graph(model, "aclmdlRIDestroy");
    if (!dead) return ACL_ERROR_RT_PARAM_INVALID;
    graphs().erase(dead.get());  // replays that are enqueued keep it
  }
  dead.reset();
  collect_garbage();
  return 0;
}

SIM_API aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, "aclmdlRICaptureTaskGrpBegin");
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (!stream->capture || stream->group) {
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "aclmdlRICaptureTaskGrpBegin: stream %d %s",
                stream->id, stream->group ? "has a task group open" : "is not captured");
  }
  auto group = std::make_unique<TaskGroup>();
  group->id = g_next_group++;
  group->graph = stream->capture.get();
  stream->group = group.get();
  stream->capture->groups.push_back(std::move(group));
  return 0;
}

SIM_API aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp *group) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, "aclmdlRICaptureTaskGrpEnd");
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (!stream->group) {
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                "aclmdlRICaptureTaskGrpEnd: stream %d has no task group open", stream->id);
  }
  ++g_counters.task_groups;
  stream->group->open = false;
  *group = stream->group;
  stream->group = nullptr;
  return 0;
}
