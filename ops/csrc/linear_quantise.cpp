// ascend_cpu_quantise: rows into int8 with a scale each; ascend_cpu_static_quantise: with numbers
// that are known before. The arithmetic of ops/dynamic_quant and ops/static_quant, to the bit.
#include <cmath>
#include <limits>
#include <type_traits>

#include "element.h"
#include "quantise.h"

namespace ascend {
namespace {

constexpr int64_t kSerialElements = 16 << 10;

template <class E>
const typename E::Storage *elements(const void *x, int64_t offset) {
  return (const typename E::Storage *)x + offset;
}

// Codes of k elements: code(x) is within [-128, 127], or NaN.
template <class E, class Code>
ASCEND_INLINE void encode(const typename E::Storage *x, int64_t k, int8_t *codes,
                          const Code &code) {
#if defined(__AVX512VBMI__)
  constexpr bool kSplit = E::kDtype == ASCEND_BFLOAT16;
#else
  constexpr bool kSplit = false;
#endif
  int64_t i = 0;
  for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
    Vf pair[2];
    widen_vectors<E, kSplit>((const char *)(x + i), 2, pair);
    pair[0] = code(pair[0]);
    pair[1] = code(pair[1]);
    narrow<2, kSplit>(pair, (char *)codes + i);
  }
  for (; i < k; i += kLanes) {
    const Vb bytes = narrow_to_bytes(code(load_lanes<E>(x + i, k - i)));
    memcpy(codes + i, &bytes, std::min<int64_t>(kLanes, k - i));
  }
}

// The greatest magnitude of k elements, or what is not finite: as integers, magnitudes order as
// they do as numbers, with infinity and NaN on top.
template <class E>
float greatest_magnitude(const typename E::Storage *x, int64_t k) {
  constexpr bool kWide = sizeof *x == 4;
  using V = std::conditional_t<kWide, Vi, Vhh>;
  constexpr int kCount = sizeof(V) / sizeof *x, kVectors = 4;
  const V magnitude = V{} + (kWide ? 0x7fffffff : 0x7fff);
  V greatest[kVectors] = {};  // several: one would wait for itself
  int64_t i = 0;
  for (; i + kVectors * kCount <= k; i += kVectors * kCount) {
    ASCEND_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      greatest[v] = greater(greatest[v], load<V>(x + i + v * kCount) & magnitude);
    }
  }
  for (; i < k; i += kCount) {
    V rest{};
    memcpy(&rest, x + i, sizeof *x * std::min<int64_t>(kCount, k - i));
    greatest[0] = greater(greatest[0], rest & magnitude);
  }
  for (int v = 1; v < kVectors; ++v) greatest[0] = greater(greatest[0], greatest[v]);
  auto most = greatest[0][0];
  for (int lane = 1; lane < kCount; ++lane) most = std::max(most, greatest[0][lane]);
  typename E::Storage bits;
  memcpy(&bits, &most, sizeof bits);
  return E::widen(bits);
}

struct Range {
  float low = 0.0f, high = 0.0f;
  bool finite = true;
};

template <class E>
Range find_range(const typename E::Storage *x, int64_t k) {
  Vf low{}, high{};
  Vi odd{};  // lanes that saw something not finite
  for (int64_t i = 0; i < k; i += kLanes) {
    const Vf v = load_lanes<E>(x + i, k - i);
    low = vmin(v, low);
    high = vmax(v, high);
    odd |= (Vi)(((Vi)v & 0x7f800000) == 0x7f800000);
  }
  Range range;
  for (int i = 0; i < kLanes; ++i) {
    range.low = std::min(range.low, low[i]);
    range.high = std::max(range.high, high[i]);
    range.finite = range.finite && !odd[i];
  }
  return range;
}

// A step between codes, and how many go into 1; of rows that are not finite NaN and 0.
struct Step {
  float scale, inverse;
  Step(float wanted, bool finite) {
    inverse = finite ? inverse_of(wanted) : 0.0f;
    scale = !finite ? std::numeric_limits<float>::quiet_NaN() : inverse == 0.0f ? 0.0f : wanted;
  }
};

// What is not finite has the inverse 0, and becomes NaN here: its code is 0.
template <class E>
void quantise_row(const ascend_quantise_args &a, int64_t row) {
  const auto *x = elements<E>(a.x, row * a.x_stride);
  int8_t *codes = a.codes + row * a.k;
  if (!a.zeros) {
    const float greatest = greatest_magnitude<E>(x, a.k);
    const Step step(greatest / 127.0f, std::isfinite(greatest));
    a.scales[row] = step.scale;
    return encode<E>(x, a.k, codes, [&](Vf v) { return v * step.inverse; });
  }
  const Range range = find_range<E>(x, a.k);
  const Step step(range.high / 255.0f - range.low / 255.0f, range.finite);
  const float zero = range.finite ? -128.0f - std::nearbyint(range.low * step.inverse) : 0.0f;
  a.scales[row] = step.scale;
  a.zeros[row] = (int32_t)zero;
  encode<E>(x, a.k, codes, [&](Vf v) {
    const Vf code = round_to_integer(rounded(v * step.inverse)) + zero;
    return vmax(splat(-128.0f), vmin(splat(127.0f), code));
  });
}

float number_at(int dtype, const void *source) {
  float number;
  widen_row(dtype, source, 0, 1, &number);
  return number;
}

template <class E>
void encode_static(const ascend_static_quantise_args &a, int64_t row, float factor, float zero) {
  encode<E>(elements<E>(a.x, row * a.x_stride), a.k, a.codes + row * a.k, [&](Vf v) {
    // Clamped to whole numbers before it is rounded to one: the order does not matter.
    return vmax(splat(-128.0f), vmin(splat(127.0f), rounded(v * factor) + zero));
  });
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
  with_element(args->dtype, [&](auto element) {
    using E = decltype(element);
    for_rows(args->m, args->k, args->num_threads,
             [&](int64_t row) { quantise_row<E>(*args, row); });
  });
  return ASCEND_OK;
}

extern "C" int ascend_cpu_static_quantise(const ascend_static_quantise_args *args) {
  using namespace ascend;
  if (args->k <= 0 || !is_float(args->dtype) || !is_float(args->number_dtype)) {
    return ASCEND_UNSUPPORTED;
  }
  const float factor = number_at(args->number_dtype, args->factor);
  const float zero = number_at(args->number_dtype, args->zero);
  with_element(args->dtype, [&](auto element) {
    using E = decltype(element);
    for_rows(args->m, args->k, args->num_threads,
             [&](int64_t row) { encode_static<E>(*args, row, factor, zero); });
  });
  return ASCEND_OK;
}
