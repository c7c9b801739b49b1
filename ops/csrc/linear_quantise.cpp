// ascend_cpu_quantise: rows into int8 with a scale each; ascend_cpu_static_quantise: with numbers
// that are known before. The arithmetic of ops/dynamic_quant and ops/static_quant, to the bit.
#include <cmath>
#include <limits>

#include "element.h"
#include "quantise.h"

namespace ascend {
namespace {

constexpr int64_t kSerialElements = 16 << 10;
constexpr int kPart = 512;  // columns that are widened at once

// Up to kPart columns from `k` of a row, padded with 0 to whole vectors; returns how many.
template <class Args>
int widen_part(const Args &a, int64_t row, int64_t k, float *part) {
  const int count = (int)std::min<int64_t>(kPart, a.k - k);
  widen_row(a.dtype, a.x, row * a.x_stride + k, count, part);
  for (int i = count; i % kLanes; ++i) part[i] = 0.0f;
  return count;
}

// Codes of a row: `code` of its elements, from `least` to 127.
template <class Args, class Code>
void encode_row(const Args &a, int64_t row, float least, const Code &code) {
  int8_t *codes = a.codes + row * a.k;
  float part[kPart];
  char bytes[kPart];
  for (int64_t k = 0; k < a.k; k += kPart) {
    const int count = widen_part(a, row, k, part);
    for (int i = 0; i < count; i += kLanes) {
      const Vf inside = vmax(splat(least), vmin(splat(127.0f), code(load<Vf>(part + i))));
      store(bytes + i, narrow_to_bytes(inside));
    }
    memcpy(codes + k, bytes, count);
  }
}

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
    // What is not finite has the inverse 0, and becomes NaN here: narrow_to_bytes gives 0.
    encode_row(a_, number, symmetric ? -127.0f : -128.0f,
               [&](Vf x) { return round_to_integer(rounded(x * inverse)) + zero; });
  }

 private:
  Range find_range(int64_t number) const {
    Vf low{}, high{};
    Vi odd{};  // lanes that saw something not finite
    float part[kPart];
    for (int64_t k = 0; k < a_.k; k += kPart) {
      const int count = widen_part(a_, number, k, part);
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

  const ascend_quantise_args &a_;
};

float number_at(int dtype, const void *source) {
  float number;
  widen_row(dtype, source, 0, 1, &number);
  return number;
}

void encode_static(const ascend_static_quantise_args &a, int64_t row, float factor, float zero) {
  // Clamped to whole numbers before it is rounded to one: the order does not matter.
  encode_row(a, row, -128.0f, [&](Vf x) { return rounded(x * factor) + zero; });
}

// Runs `row` for each of m rows of k columns, on threads where that pays.
template <class Row>
void for_rows(int64_t m, int64_t k, int num_threads, const Row &row) {
  const bool serial = num_threads <= 1 || m * k <= kSerialElements;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (!serial)
  for (int64_t number = 0; number < m; ++number) row(number);
}

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_quantise(const ascend_quantise_args *args) {
  using namespace ascend;
  if (args->k <= 0 || !is_float(args->dtype)) return ASCEND_UNSUPPORTED;
  const Quantiser quantiser(*args);
  for_rows(args->m, args->k, args->num_threads, [&](int64_t row) { quantiser.row(row); });
  return ASCEND_OK;
}

extern "C" int ascend_cpu_static_quantise(const ascend_static_quantise_args *args) {
  using namespace ascend;
  if (args->k <= 0 || !is_float(args->dtype) || !is_float(args->number_dtype)) {
    return ASCEND_UNSUPPORTED;
  }
  const float factor = number_at(args->number_dtype, args->factor);
  const float zero = number_at(args->number_dtype, args->zero);
  for_rows(args->m, args->k, args->num_threads,
           [&](int64_t row) { encode_static(*args, row, factor, zero); });
  return ASCEND_OK;
}
