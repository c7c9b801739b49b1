// Errors of a kernel: thrown where they are seen, reported by the launch.
#pragma once

#include <string>

namespace ascendc_host {

/// A kernel broke a rule of the chip; the text names the API, the values and what is allowed.
struct KernelError {
  std::string text;
};

/// Throws a KernelError with a printf-formatted text.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace ascendc_host

/// Fails with the formatted text unless `condition` holds.
#define HOST_CHECK(condition, ...)                       \
  do {                                                   \
    if (!(condition)) ::ascendc_host::fail(__VA_ARGS__); \
  } while (false)
