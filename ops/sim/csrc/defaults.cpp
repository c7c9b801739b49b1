// Functions that may answer a default: each says why that is no lie.
#include <unistd.h>

#include <cstring>

#include "runtime.h"

using namespace sim;

// Nothing needs to be started or ended.
SIM_API aclError aclInit(const char *) { return 0; }
SIM_API aclError aclFinalize() { return 0; }

// "disable" for every option: torch_npu then calls the aclnn operators, which are simulated,
// instead of compiling single operators.
SIM_API size_t aclGetCompileoptSize(aclCompileOpt) { return 64; }
SIM_API aclError aclGetCompileopt(aclCompileOpt, char *value, size_t length) {
  if (length) strncpy(value, "disable", length);
  return 0;
}
SIM_API aclError aclSetCompileopt(aclCompileOpt, const char *) { return 0; }

// Errors are returned by the call that meets them and kept per device, never per thread.
SIM_API aclError aclrtGetLastError(aclrtLastErrLevel) { return 0; }
SIM_API aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return 0; }

// Time means nothing here; waits without end have a limit of their own (--timeout).
SIM_API aclError aclrtSetOpWaitTimeout(uint32_t) { return 0; }
SIM_API aclError aclrtSetOpExecuteTimeOut(uint32_t) { return 0; }
SIM_API aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t *actual) {
  if (actual) *actual = timeout;
  return 0;
}

// A failed task stops its device in any mode.
SIM_API aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return 0; }

// Operators compute as torch does on the CPU: infinities and NaN stay, the mode of 910B.
SIM_API aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) {
  if (mode == ACL_RT_OVERFLOW_MODE_INFNAN) return 0;
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "aclrtSetDeviceSatMode: mode %d is not simulated; INF_NAN (1) is", mode);
}
SIM_API aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t flag) {
  if (!flag) return 0;
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "overflow detection is not simulated");
}
SIM_API aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t *flag) {
  *flag = 0;
  return 0;
}

// The CANN that torch_npu 2.13.0 is documented with; torch_npu chooses operators by it. The driver
// has no version here, and torch_npu then leaves out what needs a recent one.
constexpr const char *kCannVersion = "9.0.0";
SIM_API aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version) {
  *version = {};
  if (name == ACL_PKG_NAME_DRIVER) {
    return fail(ACL_ERROR_INVALID_FILE, "aclsysGetCANNVersion: there is no driver");
  }
  strncpy(version->version, kCannVersion, sizeof version->version - 1);
  return 0;
}
SIM_API aclError aclsysGetVersionStr(char *, char *version) {
  strcpy(version, kCannVersion);
  return 0;
}

// Caching of operator information serves the profiler alone.
SIM_API aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue *) {
  return 0;
}

// Determinism and the like: everything here is deterministic, so any value is honoured.
static std::atomic<int64_t> g_parameters[16];
SIM_API aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  g_parameters[option & 15] = value;
  return 0;
}
SIM_API aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
  *value = g_parameters[option & 15];
  return 0;
}
SIM_API aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  return aclrtSetSysParamOpt(option, value);
}

// Published figures of the Ascend 910B1: 24 cube cores, 48 vector cores, 192 MiB of L2.
SIM_API aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo what, int64_t *value) {
  switch (what) {
    case ACL_DEVICE_INFO_AI_CORE_NUM:
      *value = 24;
      return 0;
    case ACL_DEVICE_INFO_VECTOR_CORE_NUM:
      *value = 48;
      return 0;
    case ACL_DEVICE_INFO_L2_SIZE:
      *value = 192ll << 20;
      return 0;
    default:
      return fail(ACL_ERROR_INVALID_PARAM, "aclGetDeviceCapability: %d is not simulated", what);
  }
}
SIM_API aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t *value) {
  switch (attribute) {
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM:
      *value = 24;
      return 0;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM:
      *value = 48;
      return 0;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE:
      *value = (int64_t)options().memory;
      return 0;
    case ACL_DEV_ATTR_L2_CACHE_SIZE:
      *value = 192ll << 20;
      return 0;
    default:
      return fail(ACL_ERROR_INVALID_PARAM, "aclrtGetDeviceInfo: %d is not simulated", attribute);
  }
}

// Devices are numbered as the user does; there is no visibility list to go through.
SIM_API aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logic) {
  *logic = user;
  return 0;
}
SIM_API aclError aclrtDeviceGetBareTgid(int32_t *pid) {
  *pid = getpid();
  return 0;
}

// Host functions run where the stream's tasks run, so no thread has to be subscribed to them; a
// report never comes.
SIM_API aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return 0; }
SIM_API aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return 0; }
SIM_API aclError aclrtProcessReport(int32_t milliseconds) {
  usleep((milliseconds > 0 ? milliseconds : 100) * 1000);
  return ACL_ERROR_RT_REPORT_TIMEOUT;
}

// Profiling is off: nothing is registered, nothing reported.
SIM_API int32_t MsprofRegisterCallback(uint32_t, void *) { return 0; }
SIM_API uint64_t MsprofSysCycleTime() { return 0; }
SIM_API uint64_t MsprofGetHashId(const char *, size_t) { return 0; }
SIM_API int32_t MsprofReportApi(uint32_t, const void *) { return 0; }
SIM_API int32_t MsprofReportCompactInfo(uint32_t, const void *, uint32_t) { return 0; }
SIM_API int32_t MsprofReportAdditionalInfo(uint32_t, const void *, uint32_t) { return 0; }

// CANN's own log has no file here.
SIM_API void aclAppLog(aclLogLevel, const char *, const char *, uint32_t, const char *, ...) {}
