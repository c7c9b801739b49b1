// Tasks that move the parts of a collective through the mailboxes, chunk by chunk.
#include <algorithm>
#include <cstring>

#include "communicator.h"

namespace sim {
namespace {

struct State {
  size_t moved = 0;
  uint64_t chunks = 0;
  bool owns = false, done = false;
};

class CollectiveTask : public Task {
 public:
  explicit CollectiveTask(Collective work) : work_(std::move(work)), states_(work_.parts.size()) {}

  ~CollectiveTask() override { release_all(); }

  Outcome step() override {
    // Looked at before the mailboxes: a peer that is gone has left everything it sent there.
    const auto trouble = look_at_peers();
    bool progress = false, left = false;
    for (size_t i = 0; i < states_.size(); ++i) {
      if (states_[i].done) continue;
      std::string error;
      progress |= advance(work_.parts[i], states_[i], error);
      if (!error.empty()) return give_up(work_.parts[i], error);
      left |= !states_[i].done;
    }
    if (!left) {
      if (work_.finish) work_.finish();
      return {};
    }
    if (progress) return {Step::kProgress, 0, ""};
    if (trouble.first >= 0) return give_up(work_.parts[trouble.first], trouble.second);
    return {Step::kBlocked, 0, ""};
  }

  bool remote() const override { return true; }

  std::string waits_for() const override {
    for (size_t i = 0; i < states_.size(); ++i) {
      if (states_[i].done) continue;
      const Part &part = work_.parts[i];
      return format("rank %u of communicator %s (%zu of %zu bytes %s)", part.peer,
                    part.communicator->name.c_str(), states_[i].moved, part.bytes,
                    part.send ? "sent" : "received");
    }
    return "nothing";
  }

 private:
  bool advance(Part &part, State &state, std::string &error) {
    Communicator &comm = *part.communicator;
    std::lock_guard<std::mutex> guard(comm.mutex);
    const void *&owner = part.send ? comm.sending[part.peer] : comm.receiving[part.peer];
    if (owner && owner != this) return false;  // an earlier task of another stream
    if (owner == this && !state.owns) return false;
    owner = this;
    state.owns = true;
    const bool moved = part.send ? send(comm, part, state) : receive(comm, part, state, error);
    if (state.done) {
      owner = nullptr;
      state.owns = false;
    }
    return moved;
  }

  // Done when the peer has taken the last chunk: no send ends before its receive.
  bool send(Communicator &comm, Part &part, State &state) {
    Mailbox &box = comm.box(comm.rank, part.peer);
    if (box.taken != box.ready) return false;
    if (state.chunks && state.moved == part.bytes) return state.done = true;
    box.total = part.bytes;
    box.size = std::min(kChunk, part.bytes - state.moved);
    snprintf(box.what, kTextBytes, "%s", part.what.c_str());
    if (box.size) memcpy(box.data, part.data + state.moved, box.size);
    state.moved += box.size;
    ++state.chunks;
    ++box.ready;
    return true;
  }

  bool receive(Communicator &comm, Part &part, State &state, std::string &error) {
    Mailbox &box = comm.box(part.peer, comm.rank);
    if (box.taken == box.ready) return false;
    if (part.what.substr(0, kTextBytes - 1) != box.what || box.total != part.bytes) {
      error = format("rank %u calls %s with %zu bytes for it, rank %u calls %s with %llu bytes",
                     comm.rank, part.what.c_str(), part.bytes, part.peer, box.what,
                     (unsigned long long)box.total);
      return false;
    }
    if (box.size) memcpy(part.data + state.moved, box.data, box.size);
    state.moved += box.size;
    ++box.taken;
    state.done = state.moved == part.bytes;
    return true;
  }

  // The first part that cannot go on, and why; -1 if there is none.
  std::pair<int, std::string> look_at_peers() {
    for (size_t i = 0; i < states_.size(); ++i) {
      if (states_[i].done) continue;
      Communicator &comm = *work_.parts[i].communicator;
      std::lock_guard<std::mutex> guard(comm.mutex);
      const std::string trouble = comm.trouble(work_.parts[i].peer);
      if (!trouble.empty()) return {(int)i, trouble};
    }
    return {-1, ""};
  }

  Outcome give_up(const Part &part, const std::string &error) {
    const std::string text = work_.name + ": " + error;
    part.communicator->report_failure(text);
    release_all();
    return failed(HCCL_E_REMOTE, text);
  }

  void release_all() {
    for (size_t i = 0; i < states_.size(); ++i) {
      if (!states_[i].owns) continue;
      const Part &part = work_.parts[i];
      std::lock_guard<std::mutex> guard(part.communicator->mutex);
      auto &comm = *part.communicator;
      (part.send ? comm.sending : comm.receiving)[part.peer] = nullptr;
      states_[i].owns = false;
    }
  }

  Collective work_;
  std::vector<State> states_;
};

struct Pending {
  std::string name;
  MakeCollective make;
  aclrtStream stream;
};

thread_local int t_group_depth = 0;
thread_local std::vector<Pending> *t_pending = nullptr;

HcclResult enqueue(const std::string &name, MakeCollective make, aclrtStream stream) {
  Operation operation{
      name, [make = std::move(make)](int64_t) { return TaskPointer(new CollectiveTask(make())); }};
  operation.remote = true;
  start_background_progress();
  {
    Lock lock(g_mutex);
    ++g_counters.collectives;
  }
  return (HcclResult)submit(stream, name.c_str(), std::move(operation));
}

Collective merge(const std::vector<MakeCollective> &makes) {
  Collective merged;
  std::vector<std::function<void()>> ends;
  for (const auto &make : makes) {
    Collective one = make();
    merged.name += (merged.name.empty() ? "" : " + ") + one.name;
    merged.parts.insert(merged.parts.end(), one.parts.begin(), one.parts.end());
    merged.buffers.insert(merged.buffers.end(), one.buffers.begin(), one.buffers.end());
    if (one.finish) ends.push_back(one.finish);
  }
  merged.finish = [ends] {
    for (const auto &end : ends) end();
  };
  return merged;
}

}  // namespace

void drain_remote(const char *what) {
  if (!python_runs()) return;
  Lock lock(g_mutex);
  for (Stream *stream : all_streams()) {
    const bool remote = std::any_of(stream->queue.begin(), stream->queue.end(),
                                    [](const TaskPointer &task) { return task->remote(); });
    if (remote && !stream->capture) drain(lock, stream, what);
  }
}

HcclResult launch(const std::string &name, MakeCollective make, aclrtStream stream) {
  if (!t_group_depth) return enqueue(name, std::move(make), stream);
  if (!t_pending) t_pending = new std::vector<Pending>;
  t_pending->push_back({name, std::move(make), stream});
  return HCCL_SUCCESS;
}

}  // namespace sim

using namespace sim;

SIM_API HcclResult HcclGroupStart() {
  ++t_group_depth;
  return HCCL_SUCCESS;
}

// The calls of a group run together: two ranks may first send to each other, then receive.
SIM_API HcclResult HcclGroupEnd() {
  if (!t_group_depth) return (HcclResult)fail(HCCL_E_PARA, "HcclGroupEnd: no group is open");
  if (--t_group_depth || !t_pending) return HCCL_SUCCESS;
  std::vector<Pending> pending;
  pending.swap(*t_pending);
  std::map<aclrtStream, std::vector<MakeCollective>> streams;
  for (auto &one : pending) streams[one.stream].push_back(one.make);
  for (auto &entry : streams) {
    auto makes = entry.second;
    const HcclResult code = enqueue("HCCL group", [makes] { return merge(makes); }, entry.first);
    if (code) return code;
  }
  return HCCL_SUCCESS;
}
