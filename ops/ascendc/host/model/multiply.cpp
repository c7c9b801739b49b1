#include "multiply.h"

#include <algorithm>

#include "../api/types.h"

namespace ascendc_host {

/// Multiplies one fractal of A with one of B: both have their `depth` elements in rows.
template <class C, class A, class B>
void multiply_fractal(C* sums, const A* a, const B* b, uint32_t depth) {
  constexpr uint32_t C0 = block_elements<A>;
  if constexpr (sizeof(A) == 1) {
    int16_t wide[16 * C0];
    for (uint32_t i = 0; i < 16 * C0; ++i) wide[i] = b[i];
    for (uint32_t m = 0; m < 16; ++m) {
      int16_t row[C0];
      for (uint32_t k = 0; k < C0; ++k) row[k] = k < depth ? a[m * C0 + k] : 0;
      for (uint32_t n = 0; n < 16; ++n) {
        int32_t sum = 0;
        for (uint32_t k = 0; k < C0; ++k) sum += row[k] * wide[n * C0 + k];
        sums[m * 16 + n] =
            static_cast<C>(static_cast<uint32_t>(sums[m * 16 + n]) + static_cast<uint32_t>(sum));
      }
    }
  } else {
    for (uint32_t m = 0; m < 16; ++m) {
      for (uint32_t n = 0; n < 16; ++n) {
        float sum = 0;
        for (uint32_t k = 0; k < depth; ++k) {
          sum += to_float(a[m * C0 + k]) * to_float(b[n * C0 + k]);
        }
        sums[m * 16 + n] += sum;
      }
    }
  }
}

template <class C, class A, class B>
void multiply(C* c, const A* a, const B* b, const MmadShape& shape) {
  constexpr uint32_t C0 = block_elements<A>;
  constexpr uint32_t FRACTAL = 16 * C0;
  for (uint32_t n1 = 0; n1 < shape.n1; ++n1) {
    for (uint32_t m1 = 0; m1 < shape.m1; ++m1) {
      C* sums = c + (uint64_t{n1} * shape.m1 + m1) * 256;
      if (shape.fresh) std::fill(sums, sums + 256, C{0});
      for (uint32_t k1 = 0; k1 < shape.k1; ++k1) {
        multiply_fractal(sums, a + (uint64_t{m1} * shape.k1 + k1) * FRACTAL,
                         b + (uint64_t{k1} * shape.n1 + n1) * FRACTAL,
                         std::min(C0, shape.k - k1 * C0));
      }
    }
  }
}

template void multiply(int32_t*, const int8_t*, const int8_t*, const MmadShape&);
template void multiply(float*, const half*, const half*, const MmadShape&);
template void multiply(float*, const bfloat16_t*, const bfloat16_t*, const MmadShape&);
template void multiply(float*, const float*, const float*, const MmadShape&);

}  // namespace ascendc_host
