// ascend_cpu_hadamard: blocks of columns times base (x) Sylvester's matrix, in float32.
#include "linear_panel.h"
#include "rotate.h"

namespace ascend {
namespace {

constexpr int64_t kSerialElements = 16 << 10;

// In place, `count` a power of two.
void sylvester(float *x, int64_t count) {
  if (count >= kLanes) {
    for (int64_t i = 0; i < count; i += kLanes) store(x + i, butterflies(load<Vf>(x + i)));
  }
  for (int64_t stride = count >= kLanes ? kLanes : 1; stride < count; stride *= 2) {
    for (int64_t first = 0; first < count; first += 2 * stride) {
      for (int64_t i = first; i < first + stride; ++i) {
        const float a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
    }
  }
}

// One block: rows of `inner` floats, mixed inside and then with each other.
void rotate_block(const ascend_hadamard_args &a, float *x, float *mixed) {
  const int64_t inner = a.block / a.order;
  for (int64_t i = 0; i < a.order; ++i) sylvester(x + i * inner, inner);
  if (!a.base) {
    for (int64_t i = 0; i < a.block; ++i) x[i] *= a.scale;
    return;
  }
  for (int64_t to = 0; to < a.order; ++to) {
    float *row = mixed + to * inner;
    memset(row, 0, sizeof(float) * inner);
    for (int64_t from = 0; from < a.order; ++from) {
      const float factor = a.base[to * a.order + from] * a.scale;
      const float *other = x + from * inner;
      for (int64_t i = 0; i < inner; ++i) row[i] += factor * other[i];
    }
  }
  memcpy(x, mixed, sizeof(float) * a.block);
}

void rotate(const ascend_hadamard_args &a, int64_t row) {
  static thread_local Scratch scratch;
  float *x = scratch.get<float>(2 * a.block);
  for (int64_t first = 0; first < a.d; first += a.block) {
    widen_row(a.dtype, a.x, row * a.x_stride + first, (int)a.block, x);
    rotate_block(a, x, x + a.block);
    round_row(a.dtype, x, (int)a.block, a.out, row * a.d + first);
  }
}

bool supported(const ascend_hadamard_args &a) {
  if (a.block <= 0 || a.order <= 0 || a.d % a.block || a.block % a.order) return false;
  const int64_t inner = a.block / a.order;
  return (inner & (inner - 1)) == 0 && (a.base || a.order == 1) && a.dtype >= 0 &&
         a.dtype <= ASCEND_BFLOAT16;
}

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_hadamard(const ascend_hadamard_args *args) {
  using namespace ascend;
  if (!supported(*args)) return ASCEND_UNSUPPORTED;
  const bool serial = args->num_threads <= 1 || args->m * args->d <= kSerialElements;
#pragma omp parallel for num_threads(args->num_threads) schedule(static) if (!serial)
  for (int64_t row = 0; row < args->m; ++row) rotate(*args, row);
  return ASCEND_OK;
}
