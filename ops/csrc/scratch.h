// Memory that threads keep from call to call.
#pragma once

#include <cstdint>
#include <memory>

namespace ascend {

// Memory that grows and is not initialised; one cache line more than asked for is readable.
class Scratch {
 public:
  template <class T>
  T *get(int64_t count) {
    const int64_t bytes = count * (int64_t)sizeof(T) + 64;
    if (bytes > bytes_) {
      data_.reset(new char[bytes + 64]);
      bytes_ = bytes;
    }
    return (T *)(((uintptr_t)data_.get() + 63) & ~(uintptr_t)63);
  }

 private:
  std::unique_ptr<char[]> data_;
  int64_t bytes_ = 0;
};

}  // namespace ascend
