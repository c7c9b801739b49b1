// Devices, contexts and streams.
#include <algorithm>
#include <set>

#include "runtime.h"

namespace sim {
namespace {

thread_local int t_device = -1;
int g_next_stream = 0;

std::map<Stream *, std::unique_ptr<Stream>> &streams() {
  static auto *made = new std::map<Stream *, std::unique_ptr<Stream>>;  // outlives all threads
  return *made;
}

class CallTask : public Task {
 public:
  CallTask(std::function<Outcome(int64_t)> function, int64_t replay)
      : function_(std::move(function)), replay_(replay) {}
  Outcome step() override { return function_(replay_); }

 private:
  std::function<Outcome(int64_t)> function_;
  int64_t replay_;
};

aclError check_device(int number, const char *caller) {
  if (number >= 0 && number < options().devices) return 0;
  return fail(ACL_ERROR_RT_INVALID_DEVICEID,
              "%s: device %d does not exist; there are %d (sim run --devices, "
              "ASCEND_RT_VISIBLE_DEVICES)",
              caller, number, options().devices);
}

}  // namespace

Operation call_operation(std::string name, std::function<Outcome(int64_t)> function) {
  return {std::move(name), [function = std::move(function)](int64_t replay) {
            return TaskPointer(new CallTask(function, replay));
          }};
}

Device &device(int number) {
  static auto *devices = new std::vector<Device>(16);
  Device &it = devices->at(number);
  it.number = number;
  return it;
}

int current_device() { return t_device; }

std::vector<Stream *> all_streams() {
  std::vector<Stream *> found;
  for (auto &entry : streams()) found.push_back(entry.first);
  std::sort(found.begin(), found.end(), [](Stream *a, Stream *b) { return a->id < b->id; });
  return found;
}

Stream *new_stream(int number) {
  auto made = std::make_unique<Stream>();
  made->id = g_next_stream++;
  made->device = number;
  Stream *stream = made.get();
  streams()[stream] = std::move(made);
  return stream;
}

aclError refuse_if_no_stream_is_left(int number, const char *caller) {
  size_t made = 0;
  for (auto &entry : streams()) made += entry.first->device == number;
  const size_t held = captured_streams(number);
  if (made + held < options().streams) return 0;
  return fail(ACL_ERROR_RT_NO_STREAM_RESOURCE,
              "%s: device %d has no stream left: %zu were made and graphs hold %zu, of %zu in all "
              "(sim run --streams)",
              caller, number, made, held, options().streams);
}

Stream *find_stream(aclrtStream handle, const char *caller) {
  if (!handle) {
    if (t_device < 0) {
      fail(ACL_ERROR_RT_CONTEXT_NULL, "%s: this thread has set no device", caller);
      return nullptr;
    }
    Device &it = device(t_device);
    if (!it.default_stream) it.default_stream = new_stream(t_device);
    return it.default_stream;
  }
  auto *stream = static_cast<Stream *>(handle);
  if (streams().count(stream)) return stream;
  fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is no stream, or a destroyed one", caller, handle);
  return nullptr;
}

aclError submit(aclrtStream handle, const char *caller, Operation operation) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, caller);
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  return submit(lock, stream, std::move(operation));
}

aclError submit(Lock &lock, Stream *stream, Operation operation) {
  if (stream->updating) {
    stream->update.push_back(std::move(operation));
    return 0;
  }
  if (stream->capture) {
    add_node(stream, std::move(operation));
    return 0;
  }
  stream->names.push_back(operation.name);
  stream->queue.push_back(operation.make(false));
  ++stream->submitted;
  run_after_submit(lock, stream);
  return 0;
}

}  // namespace sim

using namespace sim;

SIM_API aclError aclrtGetDeviceCount(uint32_t *count) {
  *count = options().devices;
  return 0;
}

SIM_API aclError aclrtSetDevice(int32_t number) {
  if (aclError code = check_device(number, "aclrtSetDevice")) return code;
  Lock lock(g_mutex);
  t_device = number;
  device(number).active = true;
  return 0;
}

SIM_API aclError aclrtResetDevice(int32_t number) {
  if (aclError code = check_device(number, "aclrtResetDevice")) return code;
  Lock lock(g_mutex);
  Device &it = device(number);
  if (python_runs()) drain_device(lock, number, "aclrtResetDevice");
  it.active = false;
  it.error = 0;
  if (t_device == number) t_device = -1;
  return 0;
}

SIM_API aclError aclrtGetDevice(int32_t *number) {
  if (t_device < 0) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetDevice: this thread has set no device");
  }
  *number = t_device;
  return 0;
}

// A device has one context, the primary one: its handle is the device.
SIM_API aclError aclrtGetCurrentContext(aclrtContext *context) {
  if (t_device < 0) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetCurrentContext: this thread has none");
  }
  Lock lock(g_mutex);
  *context = &device(t_device);
  return 0;
}

SIM_API aclError aclrtSetCurrentContext(aclrtContext context) {
  if (!context) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtSetCurrentContext: null");
  return aclrtSetDevice(static_cast<Device *>(context)->number);
}

SIM_API aclError aclrtGetPrimaryCtxState(int32_t number, uint32_t *flags, int32_t *active) {
  if (aclError code = check_device(number, "aclrtGetPrimaryCtxState")) return code;
  Lock lock(g_mutex);
  if (flags) *flags = 0;
  *active = device(number).active;
  return 0;
}

SIM_API aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t from, int32_t to) {
  *can = from != to;
  return 0;
}

// All devices share the host's memory, so peers see each other without more ado.
SIM_API aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t) {
  return check_device(peer, "aclrtDeviceEnablePeerAccess");
}

SIM_API aclError aclrtCreateStream(aclrtStream *stream) {
  Lock lock(g_mutex);
  if (t_device < 0) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtCreateStream: this thread has set no device");
  }
  if (aclError error = refuse_if_no_stream_is_left(t_device, "aclrtCreateStream")) return error;
  *stream = new_stream(t_device);
  return 0;
}

SIM_API aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t) {
  return aclrtCreateStream(stream);
}

SIM_API aclError aclrtDestroyStream(aclrtStream handle) {
  Lock lock(g_mutex);
  Stream *stream = handle ? find_stream(handle, "aclrtDestroyStream") : nullptr;
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (stream->capture) return refuse_captured(stream, "aclrtDestroyStream");
  // At the end of a process Python is gone, and the tasks with it.
  if (python_runs()) drain(lock, stream, "aclrtDestroyStream");
  // Kept, a few hundred bytes: another thread may be going through all streams.
  static auto *graveyard = new std::vector<std::unique_ptr<Stream>>;
  graveyard->push_back(std::move(streams()[stream]));
  streams().erase(stream);
  return 0;
}

SIM_API aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

SIM_API aclError aclrtStreamGetId(aclrtStream handle, int32_t *id) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, "aclrtStreamGetId");
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  *id = stream->id;
  return 0;
}

SIM_API aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus *status) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, "aclrtStreamQuery");
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (stream->capture) return refuse_captured(stream, "aclrtStreamQuery");
  *status = stream->queue.empty() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  give_turn(lock, stream);  // or a host that polls would never see the end
  return device_error(stream->device);
}

SIM_API aclError aclrtSynchronizeStream(aclrtStream handle) {
  Lock lock(g_mutex);
  Stream *stream = find_stream(handle, "aclrtSynchronizeStream");
  if (!stream) return ACL_ERROR_RT_PARAM_INVALID;
  if (stream->capture) return refuse_captured(stream, "aclrtSynchronizeStream");
  return drain(lock, stream, "aclrtSynchronizeStream");
}

SIM_API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) {
  return aclrtSynchronizeStream(stream);
}

SIM_API aclError aclrtSynchronizeDevice() {
  Lock lock(g_mutex);
  if (t_device < 0) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtSynchronizeDevice: this thread has set no device");
  }
  if (aclError code = refuse_device_captured(t_device, "aclrtSynchronizeDevice")) return code;
  if (!python_runs()) return 0;  // the process ends: its tasks end with it
  return drain_device(lock, t_device, "aclrtSynchronizeDevice");
}

SIM_API aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

// Functions of the host, in stream order.
SIM_API aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void *argument) {
  return submit(stream, "aclrtLaunchHostFunc", call_operation("host function", [=](int64_t) {
                  function(argument);
                  return Outcome{};
                }));
}

SIM_API aclError aclrtLaunchCallback(aclrtCallback function, void *argument, aclrtCallbackBlockType,
                                     aclrtStream stream) {
  return aclrtLaunchHostFunc(stream, function, argument);
}
