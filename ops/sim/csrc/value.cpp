// Values in device memory that a stream writes, or waits for: torch_npu's external events, which
// tie a captured graph to streams outside of it.
#include "runtime.h"

namespace sim {
namespace {

std::atomic<uint64_t> *cell(void *address) { return static_cast<std::atomic<uint64_t> *>(address); }

bool holds(uint64_t found, uint64_t value, uint32_t flag) {
  switch (flag) {
    case ACL_STREAM_WAIT_VALUE_GEQ:
      return (int64_t)(found - value) >= 0;
    case ACL_STREAM_WAIT_VALUE_EQ:
      return found == value;
    case ACL_STREAM_WAIT_VALUE_AND:
      return (found & value) != 0;
    default:
      return ~(found | value) != 0;
  }
}

class ValueWaitTask : public Task {
 public:
  ValueWaitTask(void *address, uint64_t value, uint32_t flag)
      : address_(address), value_(value), flag_(flag) {}
  Outcome step() override {
    return {holds(*cell(address_), value_, flag_) ? Step::kDone : Step::kBlocked, 0, ""};
  }
  std::string waits_for() const override {
    return format("the value %llu at %p (an external event)", (unsigned long long)value_, address_);
  }

 private:
  void *address_;
  uint64_t value_;
  uint32_t flag_;
};

aclError check_cell(void *address, uint32_t flag, const char *caller) {
  const Found found = find_memory(address);
  if (found.place != Place::kDevice || found.left < 8 || reinterpret_cast<uintptr_t>(address) % 8) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is not 8 aligned bytes of device memory",
                caller, address);
  }
  if (flag <= ACL_STREAM_WAIT_VALUE_NOR) return 0;
  return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: flag %u; allowed are 0 to 3", caller, flag);
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_API aclError aclrtValueWait(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
  if (aclError code = check_cell(address, flag, "aclrtValueWait")) return code;
  return submit(stream, "aclrtValueWait",
                {"value wait",
                 [=](int64_t) { return TaskPointer(new ValueWaitTask(address, value, flag)); }});
}

SIM_API aclError aclrtValueWrite(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
  if (aclError code = check_cell(address, flag, "aclrtValueWrite")) return code;
  return submit(stream, "aclrtValueWrite", call_operation("value write", [=](int64_t) {
                  *cell(address) = value;
                  return Outcome{};
                }));
}
