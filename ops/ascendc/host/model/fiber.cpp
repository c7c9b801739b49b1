#include "fiber.h"

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace ascendc_host {
namespace {

constexpr size_t STACK_BYTES = 256 * 1024;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Stack = std::unique_ptr<void, Free>;

/// Stacks are kept: mapping and touching fresh ones would cost more than a small kernel.
std::vector<Stack>& spare_stacks() {
  static thread_local std::vector<Stack> stacks;
  return stacks;
}

}  // namespace

Fiber::Fiber(std::function<void()> body) : body_(std::move(body)) {
  if (!spare_stacks().empty()) {
    stack_ = spare_stacks().back().release();
    spare_stacks().pop_back();
  } else {
    stack_ = std::aligned_alloc(64, STACK_BYTES);
    if (stack_ == nullptr) throw std::bad_alloc();
  }
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = STACK_BYTES;
  own_.uc_link = nullptr;
  const auto self = reinterpret_cast<uintptr_t>(this);
  makecontext(&own_, reinterpret_cast<void (*)()>(&Fiber::enter), 2,
              static_cast<unsigned>(self & 0xffffffffu), static_cast<unsigned>(self >> 32));
}

Fiber::~Fiber() { spare_stacks().emplace_back(stack_); }

void Fiber::enter(unsigned low, unsigned high) {
  auto* self = reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low);
  self->body_();
  self->finished_ = true;
  swapcontext(&self->own_, &self->caller_);
}

void Fiber::resume() {
  started_ = true;
  swapcontext(&caller_, &own_);
}

void Fiber::yield() { swapcontext(&own_, &caller_); }

}  // namespace ascendc_host
