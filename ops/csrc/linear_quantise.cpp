// ascend_cpu_quantise: rows into int8 with a scale each; the arithmetic of ops/dynamic_quant, to
// the bit.
#include <cmath>
#include <limits>

#include "element.h"
#include "quantise.h"

namespace ascend {
namespace {

constexpr int64_t kSerialElements = 16 << 10;
constexpr int kPart = 512;  // columns that are widened at once

struct Range {
  float low = 0.0f, high = 0.0f;
  bool finite = true;
};

class Quantiser {
 public:
  explicit Quantiser(const ascend_quantise_args &args) : a_(args) {}

  void row(int64_t number) const {
    const Range range = find_range(number);
    const bool symmetric = !a_.zeros;
    const float greatest = std::max(range.high, -range.low);
    const float wanted = symmetric ? greatest / 127.0f : range.high / 255.0f - range.low / 255.0f;
    const float inverse = range.finite ? inverse_of(wanted) : 0.0f;
    const float scale = inverse == 0.0f ? 0.0f : wanted;
    a_.scales[number] = range.finite ? scale : std::numeric_limits<float>::quiet_NaN();
    float zero = 0.0f;
    if (!symmetric) {
      zero = range.finite ? -128.0f - std::nearbyint(range.low * inverse) : 0.0f;
      a_.zeros[number] = (int32_t)zero;
    }
    encode(number, inverse, zero, symmetric ? -127.0f : -128.0f);
  }

 private:
  Range find_range(int64_t number) const {
    Vf low{}, high{};
    Vi odd{};  // lanes that saw something not finite
    float part[kPart];
    for (int64_t k = 0; k < a_.k; k += kPart) {
      const int count = widen(number, k, part);
      for (int i = 0; i < count; i += kLanes) {
        const Vf x = load<Vf>(part + i);
        low = vmin(x, low);
        high = vmax(x, high);
        odd |= (Vi)(((Vi)x & 0x7f800000) == 0x7f800000);
      }
    }
    Range range;
    for (int i = 0; i < kLanes; ++i) {
      range.low = std::min(range.low, low[i]);
      range.high = std::max(range.high, high[i]);
      range.finite = range.finite && !odd[i];
    }
    return range;
  }

  // Up to kPart columns from `k`, padded with 0 to whole vectors.
  int widen(int64_t number, int64_t k, float *part) const {
    const int count = (int)std::min<int64_t>(kPart, a_.k - k);
    widen_row(a_.dtype, a_.x, number * a_.x_stride + k, count, part);
    for (int i = count; i % kLanes; ++i) part[i] = 0.0f;
    return count;
  }

  void encode(int64_t number, float inverse, float zero, float least) const {
    int8_t *codes = a_.codes + number * a_.k;
    float part[kPart];
    char bytes[kPart];
    for (int64_t k = 0; k < a_.k; k += kPart) {
      const int count = widen(number, k, part);
      for (int i = 0; i < count; i += kLanes) {
        // What is not finite has the inverse 0, and becomes NaN here: narrow_to_bytes gives 0.
        const Vf wanted = round_to_integer(rounded(load<Vf>(part + i) * inverse)) + zero;
        const Vf inside = vmax(splat(least), vmin(splat(127.0f), wanted));
        store(bytes + i, narrow_to_bytes(inside));
      }
      memcpy(codes + k, bytes, count);
    }
  }

  const ascend_quantise_args &a_;
};

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_quantise(const ascend_quantise_args *args) {
  using namespace ascend;
  if (args->k <= 0 || args->dtype < 0 || args->dtype > ASCEND_BFLOAT16) return ASCEND_UNSUPPORTED;
  const Quantiser quantiser(*args);
  const bool serial = args->num_threads <= 1 || args->m * args->k <= kSerialElements;
#pragma omp parallel for num_threads(args->num_threads) schedule(static) if (!serial)
  for (int64_t row = 0; row < args->m; ++row) quantiser.row(row);
  return ASCEND_OK;
}
