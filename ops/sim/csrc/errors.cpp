// Error texts of a thread, and the answer of everything that is not simulated.
#include <cxxabi.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "runtime.h"

namespace sim {
namespace {

// Callers keep the pointer that aclGetRecentErrMsg answers while they make further calls, so the
// last texts stay where they are.
constexpr int kKept = 16;
thread_local std::string t_errors[kKept];
thread_local int t_latest = 0;

std::string format_list(const char *text, va_list arguments) {
  char buffer[2048];
  vsnprintf(buffer, sizeof buffer, text, arguments);
  return buffer;
}

std::string unsimulated_text(const char *name) {
  int status = 0;
  char *readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string text = std::string("ascend-plugin simulator: ") +
                     (status == 0 && readable ? readable : name) + " is not simulated";
  free(readable);
  return text;
}

}  // namespace

void set_error(const std::string &text) {
  const std::string made = text;  // it may be one of the kept ones
  t_latest = (t_latest + 1) % kKept;
  t_errors[t_latest] = made;
}
const std::string &last_error() { return t_errors[t_latest]; }

std::string format(const char *text, ...) {
  va_list arguments;
  va_start(arguments, text);
  std::string made = format_list(text, arguments);
  va_end(arguments);
  return made;
}

aclError fail(aclError code, const char *text, ...) {
  va_list arguments;
  va_start(arguments, text);
  set_error("ascend-plugin simulator: " + format_list(text, arguments));
  va_end(arguments);
  return code;
}

Outcome failed(aclError code, const std::string &text) { return {Step::kFailed, code, text}; }

}  // namespace sim

SIM_API const char *aclGetRecentErrMsg() { return sim::last_error().c_str(); }

SIM_API void sim_set_error(const char *text) { sim::set_error(text); }

// Many callers look at neither code nor message, so the name goes to stderr too, once.
SIM_API long sim_unsimulated(const char *name) {
  static std::mutex mutex;
  static std::set<std::string> told;
  sim::set_error(sim::unsimulated_text(name));
  std::lock_guard<std::mutex> guard(mutex);
  if (told.insert(name).second) fprintf(stderr, "%s\n", sim::last_error().c_str());
  return ACL_ERROR_RT_FEATURE_NOT_SUPPORT;
}

SIM_API long sim_unsimulated_abort(const char *name) {
  fprintf(stderr, "%s; it would have to return a C++ object, so the process ends here\n",
          sim::unsimulated_text(name).c_str());
  abort();
}
