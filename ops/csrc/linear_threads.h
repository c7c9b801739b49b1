// How the threads of a linear layer share it: panels of the activations first, then parts of the
// product.
#pragma once

#include <omp.h>

#include <atomic>

#include "linear_panel.h"

namespace ascend {

// Below so many products, waking other threads costs more than it saves.
constexpr int64_t kSerialProducts = 1 << 16;

// Numbers [0, count), taken by threads. Each begins with a range of its own and then helps others:
// a counter for all would travel between processors with every number, and so would what a thread
// wrote for rows that another one reads.
class Numbers {
 public:
  Numbers(int64_t count, int threads)
      : count_(count),
        ranges_(std::max(1, std::min(threads, kMaxRanges))),
        threads_(std::max(1, threads)) {
    for (int r = 0; r < ranges_; ++r) range_[r].next = count * r / ranges_;
  }

  // One thread's view.
  class Taker {
   public:
    Taker(Numbers &numbers, int thread)
        : numbers_(numbers), range_((int)((int64_t)thread * numbers.ranges_ / numbers.threads_)) {}

    // The next number, or `count` when there is none.
    int64_t take() {
      for (; visited_ < numbers_.ranges_; ++visited_) {
        const int r = (range_ + visited_) % numbers_.ranges_;
        const int64_t end = numbers_.count_ * (r + 1) / numbers_.ranges_;
        std::atomic<int64_t> &next = numbers_.range_[r].next;
        if (next.load(std::memory_order_relaxed) >= end) continue;
        const int64_t number = next.fetch_add(1, std::memory_order_relaxed);
        if (number < end) return number;
      }
      return numbers_.count_;
    }

   private:
    Numbers &numbers_;
    const int range_;
    int visited_ = 0;
  };

 private:
  // More would take longer to visit than their counters' travels do.
  static constexpr int kMaxRanges = 8;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
  };

  const int64_t count_;
  const int ranges_, threads_;
  Range range_[kMaxRanges];
};

// fill(panel) for every panel, then work(part) for every part. Where parts of the same rows follow
// each other, those of a thread are of panels that it filled.
template <class Fill, class Work>
void share(const std::vector<Panel> &panels, int64_t parts, int threads, int64_t products,
           const Fill &fill, const Work &work) {
  if (threads <= 1 || products <= kSerialProducts) {
    for (const Panel &panel : panels) fill(panel);
    for (int64_t i = 0; i < parts; ++i) work(i);
    return;
  }
  // One panel is made faster than threads wake.
  const bool together = panels.size() > 1;
  if (!together) fill(panels[0]);
  Numbers numbers(parts, threads);
#pragma omp parallel num_threads(threads)
  {
    if (together) {
#pragma omp for schedule(static)
      for (size_t i = 0; i < panels.size(); ++i) fill(panels[i]);
    }
    Numbers::Taker taker(numbers, omp_get_thread_num());
    for (int64_t i = taker.take(); i < parts; i = taker.take()) work(i);
  }
}

}  // namespace ascend
