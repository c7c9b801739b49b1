// How the threads of a linear layer share it: panels of the activations first, then chunks of
// columns from a counter.
#pragma once

#include <atomic>

#include "linear_panel.h"

namespace ascend {

// Below so many products, waking other threads costs more than it saves.
constexpr int64_t kSerialProducts = 1 << 16;

// fill(panel) for every panel, then work(chunk) for every chunk.
template <class Fill, class Work>
void share(const std::vector<Panel> &panels, int64_t chunks, int threads, int64_t products,
           const Fill &fill, const Work &work) {
  if (threads <= 1 || products <= kSerialProducts) {
    for (const Panel &panel : panels) fill(panel);
    for (int64_t i = 0; i < chunks; ++i) work(i);
    return;
  }
  // One panel is made faster than threads wake.
  const bool together = panels.size() > 1;
  if (!together) fill(panels[0]);
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    if (together) {
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < panels.size(); ++i) fill(panels[i]);
    }
    for (int64_t i = next++; i < chunks; i = next++) work(i);
  }
}

}  // namespace ascend
