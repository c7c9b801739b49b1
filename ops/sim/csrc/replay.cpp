// Replay of captured graphs, and the update of task groups.
//
// Only the edges order the nodes. The lazy schedule prefers the stream on which the capture began,
// so that work of a stream that was not joined properly comes too late to be right by luck.
#include <algorithm>
#include <cstdio>
#include <set>

#include "graph.h"

namespace sim {
namespace {

class ReplayTask : public Task {
 public:
  explicit ReplayTask(std::shared_ptr<Graph> graph) : graph_(std::move(graph)) {}

  Outcome step() override {
    if (!started_) start();
    bool blocked = false;
    for (const int node : order_ready()) {
      Outcome outcome = run(node);
      if (outcome.step == Step::kBlocked) {
        blocked = true;
        blocked_ = node;
        if (options().schedule == Schedule::kLazy) continue;
      } else if (outcome.step == Step::kFailed) {
        outcome.text = format("node %d (%s) of graph %d: ", node, name(node).c_str(), graph_->id) +
                       outcome.text;
        return outcome;
      } else {
        return {left_ ? Step::kProgress : Step::kDone, 0, ""};
      }
    }
    return {blocked ? Step::kBlocked : Step::kDone, 0, ""};
  }

  std::string waits_for() const override {
    auto it = tasks_.find(blocked_);
    return format("node %d of graph %d, which waits for ", blocked_, graph_->id) +
           (it == tasks_.end() ? "its turn" : it->second->waits_for());
  }

  bool remote() const override {
    const auto &nodes = graph_->nodes;
    return std::any_of(nodes.begin(), nodes.end(),
                       [](const Node &node) { return node.operation.remote; });
  }

 private:
  void start() {
    Lock lock(g_mutex);
    started_ = true;
    number_ = ++graph_->replays;
    ++g_counters.replays;
    const auto &nodes = graph_->nodes;
    left_ = nodes.size();
    missing_.assign(nodes.size(), 0);
    followers_.assign(nodes.size(), {});
    for (size_t i = 0; i < nodes.size(); ++i) {
      missing_[i] = (int)nodes[i].needs.size();
      for (int need : nodes[i].needs) followers_[need].push_back((int)i);
      if (!missing_[i]) ready_.insert((int)i);
    }
  }

  std::vector<int> order_ready() {
    std::vector<int> order(ready_.begin(), ready_.end());
    Lock lock(g_mutex);
    const auto &nodes = graph_->nodes;
    if (options().schedule == Schedule::kLazy) {
      std::stable_sort(order.begin(), order.end(),
                       [&](int a, int b) { return nodes[a].lane < nodes[b].lane; });
    } else if (options().schedule == Schedule::kRandom && !order.empty()) {
      std::rotate(order.begin(), order.begin() + draw() % order.size(), order.end());
    }
    return order;
  }

  Outcome run(int node) {
    auto it = tasks_.find(node);
    if (it == tasks_.end()) {
      // Made at the last moment: an update of the task group may just have replaced it.
      Lock lock(g_mutex);
      it = tasks_.emplace(node, graph_->nodes[node].operation.make(number_)).first;
    }
    Outcome outcome = it->second->step();
    if (outcome.step == Step::kBlocked || outcome.step == Step::kProgress) return outcome;
    {
      TaskPointer dead = std::move(it->second);
      Lock lock(g_mutex);
      tasks_.erase(it);
    }
    if (outcome.step == Step::kFailed) return outcome;
    ready_.erase(node);
    --left_;
    for (int follower : followers_[node]) {
      if (!--missing_[follower]) ready_.insert(follower);
    }
    return outcome;
  }

  std::string name(int node) {
    Lock lock(g_mutex);
    return graph_->nodes[node].operation.name;
  }

  std::shared_ptr<Graph> graph_;
  bool started_ = false;
  int64_t number_ = 0;
  size_t left_ = 0;
  int blocked_ = -1;
  std::set<int> ready_;
  std::vector<int> missing_;
  std::vector<std::vector<int>> followers_;
  std::map<int, TaskPointer> tasks_;
};

// In stream order, so an update that is not waited for comes too late for a replay.
Operation update_operation(TaskGroup *group, std::vector<Operation> operations) {
  auto graph = group->graph->shared_from_this();
  auto nodes = group->nodes;
  auto made = std::make_shared<std::vector<Operation>>(std::move(operations));
  return call_operation(format("update of task group %d", group->id), [=](int64_t) {
    std::vector<Operation> old;  // destroyed after the lock is given back
    Lock lock(g_mutex);
    ++g_counters.updates;
    for (size_t i = 0; i < nodes.size(); ++i) {
      old.push_back(std::move(graph->nodes[nodes[i]].operation));
      graph->nodes[nodes[i]].operation = (*made)[i];
    }
    lock.unlock();
    return Outcome{};
  });
}

aclError check_update(const TaskGroup &group, const std::vector<Operation> &update) {
  if (update.size() != group.nodes.size()) {
    return fail(ACL_ERROR_RT_MODEL_UPDATE_FAILED,
                "aclmdlRICaptureTaskUpdateEnd: %zu tasks for task group %d, which holds %zu",
                update.size(), group.id, group.nodes.size());
  }
  for (size_t i = 0; i < update.size(); ++i) {
    const std::string &captured = group.graph->nodes[group.nodes[i]].operation.name;
    if (captured != update[i].name) {
      return fail(ACL_ERROR_RT_MODEL_UPDATE_FAILED,
                  "aclmdlRICaptureTaskUpdateEnd: task %zu of group %d is %s, its update is %s; an "
                  "update must repeat the captured calls",
                  i, group.id, captured.c_str(), update[i].name.c_str());
    }
  }
  return 0;
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_API aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream handle) {
  Lock lock(g_mutex);
  auto graph = find_graph(model, "aclmdlRIExecuteAsync");
  Stream *stream = graph ? find_stream(handle, "aclmdlRIExecuteAsync") : nullptr;
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (graph->capturing || !graph->invalid.empty()) {
    return fail(ACL_ERROR_RT_MODEL_CAPTURED, "aclmdlRIExecuteAsync: graph %d %s", graph->id,
                graph->capturing ? "is still being captured" : "was not captured with success");
  }
  if (stream->capture) {
    return fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
                "aclmdlRIExecuteAsync: stream %d is captured; a graph cannot hold another one",
                stream->id);
  }
  return submit(lock, stream, {format("replay of graph %d", graph->id), [=](int64_t) {
                                 return TaskPointer(new ReplayTask(graph));
                               }});
}

SIM_API aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group_handle) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, "aclmdlRICaptureTaskUpdateBegin");
  TaskGroup *group = stream ? find_group(group_handle, "aclmdlRICaptureTaskUpdateBegin") : nullptr;
  if (!group) return ACL_ERROR_STREAM_TASK_GROUP_STATUS;
  if (stream->capture || stream->updating || group->open) {
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                "aclmdlRICaptureTaskUpdateBegin: %s; use a stream that is neither captured nor "
                "updating, and a group that has ended",
                group->open ? "the task group is open" : "the stream is busy");
  }
  stream->updating = group;
  stream->update.clear();
  return 0;
}

SIM_API aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, "aclmdlRICaptureTaskUpdateEnd");
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (!stream->updating) {
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                "aclmdlRICaptureTaskUpdateEnd: stream %d updates no task group", stream->id);
  }
  TaskGroup *group = stream->updating;
  std::vector<Operation> update = std::move(stream->update);
  stream->updating = nullptr;
  stream->update.clear();
  if (aclError code = check_update(*group, update)) return code;
  return submit(lock, stream, update_operation(group, std::move(update)));
}

SIM_API aclError aclmdlRIDebugJsonPrint(aclmdlRI model, const char *path, uint32_t) {
  Lock lock(g_mutex);
  auto graph = find_graph(model, "aclmdlRIDebugJsonPrint");
  if (!graph) return ACL_ERROR_RT_PARAM_INVALID;
  FILE *file = fopen(path, "w");
  if (!file) {
    return fail(ACL_ERROR_RT_FILE_OPEN, "aclmdlRIDebugJsonPrint: %s cannot be written", path);
  }
  fprintf(file, "[\n");
  for (size_t i = 0; i < graph->nodes.size(); ++i) {
    const Node &node = graph->nodes[i];
    fprintf(file, "  {\"node\": %zu, \"name\": \"%s\", \"stream\": %d, \"needs\": [", i,
            node.operation.name.c_str(), node.lane);
    for (size_t k = 0; k < node.needs.size(); ++k) {
      fprintf(file, "%s%d", k ? ", " : "", node.needs[k]);
    }
    fprintf(file, "]}%s\n", i + 1 < graph->nodes.size() ? "," : "");
  }
  fprintf(file, "]\n");
  return fclose(file) ? ACL_ERROR_RT_FILE_WRITE : 0;
}

// Counts for tests and reports: nodes and task groups of a graph.
SIM_API int64_t sim_graph_nodes(void *model) {
  Lock lock(g_mutex);
  auto graph = find_graph(model, "sim_graph_nodes");
  return graph ? (int64_t)graph->nodes.size() : -1;
}

SIM_API int64_t sim_graph_groups(void *model) {
  Lock lock(g_mutex);
  auto graph = find_graph(model, "sim_graph_groups");
  return graph ? (int64_t)graph->groups.size() : -1;
}

SIM_API int64_t sim_graph_replays(void *model) {
  Lock lock(g_mutex);
  auto graph = find_graph(model, "sim_graph_replays");
  return graph ? graph->replays : -1;
}
