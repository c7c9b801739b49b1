// Events: a wait waits for the record that was the latest when the wait was enqueued.
#include <algorithm>

#include "runtime.h"

namespace sim {
namespace {

using EventPointer = std::shared_ptr<Event>;
int g_next_event = 0;

std::map<Event *, EventPointer> &events() {
  static auto *made = new std::map<Event *, EventPointer>;
  return *made;
}

EventPointer find_event(aclrtEvent handle, const char *caller) {
  auto it = events().find(static_cast<Event *>(handle));
  if (it != events().end()) return it->second;
  fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is no event, or a destroyed one", caller, handle);
  return nullptr;
}

void complete(Event &event, uint64_t record) {
  Lock lock(g_mutex);
  event.completed = std::max(event.completed, record);
  event.time_ms = now_seconds() * 1e3;
}

class RecordTask : public Task {
 public:
  RecordTask(EventPointer event, uint64_t record) : event_(std::move(event)), record_(record) {}
  Outcome step() override {
    complete(*event_, record_);
    return {};
  }
  void cancel() override { complete(*event_, record_); }

 private:
  EventPointer event_;
  uint64_t record_;
};

class WaitTask : public Task {
 public:
  WaitTask(EventPointer event, uint64_t record) : event_(std::move(event)), record_(record) {}
  Outcome step() override {
    Lock lock(g_mutex);
    const bool there = record_ > 0 && event_->completed >= record_;
    return {there ? Step::kDone : Step::kBlocked, 0, ""};
  }
  std::string waits_for() const override {
    if (record_ == 0) return format("event %d, which was never recorded", event_->id);
    return format("event %d", event_->id);
  }
  Stream *producer() const override { return event_->stream; }

 private:
  EventPointer event_;
  uint64_t record_;
};

aclError refuse_captured_event(const Event &event, const char *caller) {
  auto graph = event.capture.lock();
  if (!graph || !graph->capturing) return 0;
  graph->invalid = format("%s of event %d, which belongs to the capture", caller, event.id);
  return fail(ACL_ERROR_RT_EVENT_CAPTURED,
              "%s: event %d was recorded in the capture of graph %d; it marks a place in the graph "
              "and cannot be waited for or asked by the host",
              caller, event.id, graph->id);
}

aclError create(aclrtEvent *handle, uint32_t flag, const char *caller) {
  if (flag & (ACL_EVENT_IPC | ACL_EVENT_EXTERNAL)) {
    return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                "%s: events between processes (0x40) and external events without value writes "
                "(0x20) are not simulated; flag 0x%x",
                caller, flag);
  }
  Lock lock(g_mutex);
  auto event = std::make_shared<Event>();
  event->id = g_next_event++;
  event->flag = flag;
  *handle = event.get();
  events()[event.get()] = event;
  return 0;
}

// In a capture a record names the stream's last node, and a wait is an edge to it.
aclError wait_in_capture(Stream *stream, const EventPointer &event) {
  auto graph = event->capture.lock();
  if (!graph || !graph->capturing || (stream->capture && stream->capture != graph)) {
    if (stream->capture) {
      stream->capture->invalid =
          format("stream %d waits for event %d of outside the capture", stream->id, event->id);
    }
    return fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                "aclrtStreamWaitEvent: stream %d is captured, and event %d was not recorded in "
                "that capture; record it there, or use an external event",
                stream->id, event->id);
  }
  if (!stream->capture) join_capture(stream, graph);
  if (event->node >= 0) stream->waits.push_back(event->node);
  return 0;
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_API aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) {
  return create(event, flag, "aclrtCreateEventWithFlag");
}

SIM_API aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) {
  return create(event, flag, "aclrtCreateEventExWithFlag");
}

SIM_API aclError aclrtDestroyEvent(aclrtEvent handle) {
  Lock lock(g_mutex);
  if (!find_event(handle, "aclrtDestroyEvent")) return ACL_ERROR_RT_PARAM_INVALID;
  events().erase(static_cast<Event *>(handle));  // tasks that are left keep it
  return 0;
}

SIM_API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  Lock lock(g_mutex);
  EventPointer event = find_event(handle, "aclrtRecordEvent");
  Stream *stream = event ? find_stream(stream_handle, "aclrtRecordEvent") : nullptr;
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (stream->capture) {
    event->capture = stream->capture;
    // An empty node, so that the event also stands for what the stream waited for.
    event->node = add_node(stream, call_operation(format("record of event %d", event->id),
                                                  [](int64_t) { return Outcome{}; }));
    return 0;
  }
  event->capture.reset();
  event->stream = stream;
  const uint64_t record = ++event->requested;
  return submit(lock, stream, {format("record of event %d", event->id), [=](int64_t) {
                                 return TaskPointer(new RecordTask(event, record));
                               }});
}

SIM_API aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
  Lock lock(g_mutex);
  EventPointer event = find_event(handle, "aclrtStreamWaitEvent");
  Stream *stream = event ? find_stream(stream_handle, "aclrtStreamWaitEvent") : nullptr;
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  auto graph = event->capture.lock();
  if (stream->capture || (graph && graph->capturing)) return wait_in_capture(stream, event);
  const uint64_t record = event->requested;
  return submit(lock, stream, {format("wait for event %d", event->id), [=](int64_t) {
                                 return TaskPointer(new WaitTask(event, record));
                               }});
}

SIM_API aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream) {
  Lock lock(g_mutex);
  EventPointer event = find_event(handle, "aclrtResetEvent");
  if (!event) return ACL_ERROR_RT_PARAM_INVALID;
  if (aclError code = refuse_captured_event(*event, "aclrtResetEvent")) return code;
  (void)stream;  // records are numbered, so a wait never sees an older one
  event->requested = event->completed = 0;
  event->capture.reset();
  return 0;
}

SIM_API aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  Lock lock(g_mutex);
  EventPointer event = find_event(handle, "aclrtSynchronizeEvent");
  if (!event) return ACL_ERROR_RT_PARAM_INVALID;
  if (aclError code = refuse_captured_event(*event, "aclrtSynchronizeEvent")) return code;
  if (!event->requested || !event->stream) return 0;  // as torch's events: nothing to wait for
  const uint64_t record = event->requested;
  return drive(
      lock, event->stream, [=] { return event->completed >= record; }, "aclrtSynchronizeEvent");
}

SIM_API aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus *status) {
  Lock lock(g_mutex);
  EventPointer event = find_event(handle, "aclrtQueryEventStatus");
  if (!event) return ACL_ERROR_RT_PARAM_INVALID;
  if (aclError code = refuse_captured_event(*event, "aclrtQueryEventStatus")) return code;
  const bool done = event->completed >= event->requested;
  *status = done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  if (!done) give_turn(lock, event->stream);  // or a host that polls would never see the end
  return 0;
}

SIM_API aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus *status) {
  aclrtEventRecordedStatus recorded;
  const aclError code = aclrtQueryEventStatus(handle, &recorded);
  *status = recorded == ACL_EVENT_RECORDED_STATUS_COMPLETE ? ACL_EVENT_WAIT_STATUS_COMPLETE
                                                           : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return code;
}

SIM_API aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
  Lock lock(g_mutex);
  EventPointer first = find_event(start, "aclrtEventElapsedTime");
  EventPointer last = first ? find_event(end, "aclrtEventElapsedTime") : nullptr;
  if (!last) return ACL_ERROR_RT_PARAM_INVALID;
  if (!first->completed || !last->completed) {
    return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID,
                "aclrtEventElapsedTime: events %d and %d must both be recorded and reached",
                first->id, last->id);
  }
  *ms = (float)(last->time_ms - first->time_ms);
  return 0;
}

SIM_API aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t *microseconds) {
  Lock lock(g_mutex);
  EventPointer event = find_event(handle, "aclrtEventGetTimestamp");
  if (!event) return ACL_ERROR_RT_PARAM_INVALID;
  if (!event->completed) {
    return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID,
                "aclrtEventGetTimestamp: event %d has not been reached", event->id);
  }
  *microseconds = (uint64_t)(event->time_ms * 1e3);
  return 0;
}
