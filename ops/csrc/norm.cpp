// ascend_cpu_add_rms_norm: the residual grows by x, and the sum's norm goes to out. The sum is
// normed as it was before it was rounded to the residual's type, and the result is rounded once.
#include <cmath>

#include "element.h"
#include "rows.h"
#include "scratch.h"

namespace ascend {
namespace {

float sum_of_squares(const float *x, int64_t count) {
  Vf sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vf v = load<Vf>(x + i);
    sums += v * v;
  }
  float total = 0.0f;
  for (; i < count; ++i) total += x[i] * x[i];
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
}

void norm_row(const ascend_add_rms_norm_args &a, const float *weight, int64_t row) {
  static thread_local Scratch scratch;
  const int width = (int)a.k;
  float *sum = scratch.get<float>(2 * a.k), *addend = sum + width;
  widen_row(a.dtype, a.x, row * a.x_stride, width, a.residual ? addend : sum);
  if (a.residual) {
    widen_row(a.dtype, a.residual, row * a.residual_stride, width, sum);
    for (int i = 0; i < width; ++i) sum[i] += addend[i];
    round_row(a.dtype, sum, width, a.residual, row * a.residual_stride);
  }
  const float factor = 1.0f / std::sqrt(sum_of_squares(sum, width) / (float)width + a.eps);
  for (int i = 0; i < width; ++i) sum[i] *= factor * weight[i];
  round_row(a.dtype, sum, width, a.out, row * width);
}

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_add_rms_norm(const ascend_add_rms_norm_args *args) {
  using namespace ascend;
  const ascend_add_rms_norm_args &a = *args;
  for (const int dtype : {a.dtype, a.weight_dtype}) {
    if (dtype < ASCEND_FLOAT32 || dtype > ASCEND_BFLOAT16) return ASCEND_UNSUPPORTED;
  }
  if (a.k <= 0 || a.k > INT32_MAX) return ASCEND_UNSUPPORTED;
  static thread_local Scratch scratch;
  float *weight = scratch.get<float>(a.k);
  widen_row(a.weight_dtype, a.weight, 0, (int)a.k, weight);
  share_rows(a.m, a.m * a.k, a.num_threads, [&](int64_t row) { norm_row(a, weight, row); });
  return ASCEND_OK;
}
