// A kernel's scalar program on a stack of its own, so that cores can wait for each other.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>

namespace ascendc_host {

class Fiber {
 public:
  /// Prepares `body`; it must not let exceptions out.
  explicit Fiber(std::function<void()> body);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Runs the body until it yields or ends.
  void resume();

  /// Returns to whoever resumed; called inside the body.
  void yield();

  bool started() const { return started_; }
  bool finished() const { return finished_; }

 private:
  static void enter(unsigned low, unsigned high);

  std::function<void()> body_;
  void* stack_ = nullptr;
  ucontext_t own_{};
  ucontext_t caller_{};
  bool started_ = false;
  bool finished_ = false;
};

}  // namespace ascendc_host
