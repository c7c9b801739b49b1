// Element-wise arithmetic of the vector unit: half, float, int16_t and int32_t; no bfloat16_t.
#pragma once

#include <cmath>
#include <cstdlib>

#include "lanes.h"

namespace ascendc_host {

/// `a op b` with one rounding; integers wrap.
template <class T>
using Wide = std::conditional_t<std::is_integral_v<T>, int64_t, float>;

template <class T, class F>
T compute(F f, T a, T b) {
  return static_cast<T>(f(static_cast<Wide<T>>(a), static_cast<Wide<T>>(b)));
}

template <class T>
T reciprocal(T value) {
  return static_cast<T>(1.0f / static_cast<float>(value));
}

}  // namespace ascendc_host

// Each instruction has three forms: a count of elements, a mask of lanes, and a mask of bits.
#define ASCENDC_HOST_BINARY(NAME, TYPES_TEXT, FACTOR, EXPRESSION, ...)                             \
  namespace ascendc_host {                                                                         \
  template <class T>                                                                               \
  void run_##NAME(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src0,         \
                  const AscendC::LocalTensor<T>& src1, const Lanes& lanes,                         \
                  const AscendC::BinaryRepeatParams& params) {                                     \
    static_assert(is_one_of<T, __VA_ARGS__>, #NAME ": the chip supports " TYPES_TEXT " only");     \
    vector_binary(                                                                                 \
        #NAME, dst, src0, src1, lanes, params,                                                     \
        [](T x, T y) { return compute([](auto a, auto b) { return EXPRESSION; }, x, y); },         \
        FACTOR);                                                                                   \
  }                                                                                                \
  }                                                                                                \
  namespace AscendC {                                                                              \
  template <class T>                                                                               \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,     \
            const int32_t& count) {                                                                \
    ascendc_host::run_##NAME(dst, src0, src1, ascendc_host::lanes_of_count(#NAME, count), {});     \
  }                                                                                                \
  template <class T, bool isSetMask = true>                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,     \
            uint64_t mask, const uint8_t repeatTime, const BinaryRepeatParams& params) {           \
    ascendc_host::run_##NAME(dst, src0, src1,                                                      \
                             ascendc_host::masked<T, isSetMask>(#NAME, mask, repeatTime), params); \
  }                                                                                                \
  template <class T, bool isSetMask = true>                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,     \
            uint64_t mask[], const uint8_t repeatTime, const BinaryRepeatParams& params) {         \
    ascendc_host::run_##NAME(dst, src0, src1,                                                      \
                             ascendc_host::masked<T, isSetMask>(#NAME, mask, repeatTime), params); \
  }                                                                                                \
  }

#define ASCENDC_HOST_UNARY(NAME, TYPES_TEXT, FACTOR, EXPRESSION, ...)                              \
  namespace ascendc_host {                                                                         \
  template <class T>                                                                               \
  void run_##NAME(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,          \
                  const Lanes& lanes, const AscendC::UnaryRepeatParams& params) {                  \
    static_assert(is_one_of<T, __VA_ARGS__>, #NAME ": the chip supports " TYPES_TEXT " only");     \
    vector_unary(                                                                                  \
        #NAME, dst, src, lanes, params,                                                            \
        [](T x) {                                                                                  \
          const auto a = static_cast<Wide<T>>(x);                                                  \
          return static_cast<T>(EXPRESSION);                                                       \
        },                                                                                         \
        FACTOR);                                                                                   \
  }                                                                                                \
  }                                                                                                \
  namespace AscendC {                                                                              \
  template <class T>                                                                               \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count) {          \
    ascendc_host::run_##NAME(dst, src, ascendc_host::lanes_of_count(#NAME, count), {});            \
  }                                                                                                \
  template <class T, bool isSetMask = true>                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask,                   \
            const uint8_t repeatTime, const UnaryRepeatParams& params) {                           \
    ascendc_host::run_##NAME(dst, src,                                                             \
                             ascendc_host::masked<T, isSetMask>(#NAME, mask, repeatTime), params); \
  }                                                                                                \
  template <class T, bool isSetMask = true>                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask[],                 \
            const uint8_t repeatTime, const UnaryRepeatParams& params) {                           \
    ascendc_host::run_##NAME(dst, src,                                                             \
                             ascendc_host::masked<T, isSetMask>(#NAME, mask, repeatTime), params); \
  }                                                                                                \
  }

// With a scalar of the element's type; READS_TARGET where the destination is an operand too.
#define ASCENDC_HOST_SCALAR(NAME, TYPES_TEXT, READS_TARGET, FUNCTION, ...)                         \
  namespace ascendc_host {                                                                         \
  template <class T>                                                                               \
  void run_##NAME(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,          \
                  const T& scalar, const Lanes& lanes, const AscendC::UnaryRepeatParams& params) { \
    static_assert(is_one_of<T, __VA_ARGS__>, #NAME ": the chip supports " TYPES_TEXT " only");     \
    vector_unary<READS_TARGET>(#NAME, dst, src, lanes, params, FUNCTION);                          \
  }                                                                                                \
  }                                                                                                \
  namespace AscendC {                                                                              \
  template <class T>                                                                               \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar,                 \
            const int32_t& count) {                                                                \
    ascendc_host::run_##NAME(dst, src, scalar, ascendc_host::lanes_of_count(#NAME, count), {});    \
  }                                                                                                \
  template <class T, bool isSetMask = true>                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, uint64_t mask,  \
            const uint8_t repeatTime, const UnaryRepeatParams& params) {                           \
    ascendc_host::run_##NAME(dst, src, scalar,                                                     \
                             ascendc_host::masked<T, isSetMask>(#NAME, mask, repeatTime), params); \
  }                                                                                                \
  template <class T, bool isSetMask = true>                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar,                 \
            uint64_t mask[], const uint8_t repeatTime, const UnaryRepeatParams& params) {          \
    ascendc_host::run_##NAME(dst, src, scalar,                                                     \
                             ascendc_host::masked<T, isSetMask>(#NAME, mask, repeatTime), params); \
  }                                                                                                \
  }

namespace ascendc_host {

/// Lanes of a masked instruction.
template <class T, bool isSetMask>
Lanes masked(const char* api, uint64_t mask, uint32_t repeats) {
  static_assert(isSetMask, "masks of SetVectorMask are not modelled; pass the mask");
  return lanes_of_mask(api, mask, repeats, lanes_per_repeat<T>);
}
template <class T, bool isSetMask>
Lanes masked(const char* api, const uint64_t mask[], uint32_t repeats) {
  static_assert(isSetMask, "masks of SetVectorMask are not modelled; pass the mask");
  return lanes_of_bits(api, mask, repeats, lanes_per_repeat<T>);
}

}  // namespace ascendc_host

#define ASCENDC_HOST_NUMBERS half, float, int16_t, int32_t

ASCENDC_HOST_BINARY(Add, "half, float, int16_t and int32_t", 1, a + b, ASCENDC_HOST_NUMBERS)
ASCENDC_HOST_BINARY(Sub, "half, float, int16_t and int32_t", 1, a - b, ASCENDC_HOST_NUMBERS)
ASCENDC_HOST_BINARY(Mul, "half, float, int16_t and int32_t", 1, a* b, ASCENDC_HOST_NUMBERS)
ASCENDC_HOST_BINARY(Max, "half, float, int16_t and int32_t", 1, (a > b ? a : b),
                    ASCENDC_HOST_NUMBERS)
ASCENDC_HOST_BINARY(Min, "half, float, int16_t and int32_t", 1, (a < b ? a : b),
                    ASCENDC_HOST_NUMBERS)
ASCENDC_HOST_BINARY(Div, "half and float", ascendc_host::SLOW_VECTOR_FACTOR, a / b, half, float)
ASCENDC_HOST_BINARY(And, "int16_t and uint16_t", 1, a& b, int16_t, uint16_t)
ASCENDC_HOST_BINARY(Or, "int16_t and uint16_t", 1, a | b, int16_t, uint16_t)

ASCENDC_HOST_UNARY(Abs, "half and float", 1, std::fabs(a), half, float)
ASCENDC_HOST_UNARY(Exp, "half and float", ascendc_host::SLOW_VECTOR_FACTOR, std::exp(a), half,
                   float)
ASCENDC_HOST_UNARY(Ln, "half and float", ascendc_host::SLOW_VECTOR_FACTOR, std::log(a), half, float)
ASCENDC_HOST_UNARY(Sqrt, "half and float", ascendc_host::SLOW_VECTOR_FACTOR, std::sqrt(a), half,
                   float)
ASCENDC_HOST_UNARY(Rsqrt, "half and float", ascendc_host::SLOW_VECTOR_FACTOR, 1.0f / std::sqrt(a),
                   half, float)
ASCENDC_HOST_UNARY(Reciprocal, "half and float", ascendc_host::SLOW_VECTOR_FACTOR, 1.0f / a, half,
                   float)
ASCENDC_HOST_UNARY(Relu, "half, float and int32_t", 1, (a > 0 ? a : 0), half, float, int32_t)
ASCENDC_HOST_UNARY(Not, "int16_t and uint16_t", 1, ~a, int16_t, uint16_t)

ASCENDC_HOST_SCALAR(Adds, "half, float, int16_t and int32_t", false, ([scalar](T x) {
                      return compute([](auto a, auto b) { return a + b; }, x, scalar);
                    }),
                    ASCENDC_HOST_NUMBERS)
ASCENDC_HOST_SCALAR(Muls, "half, float, int16_t and int32_t", false, ([scalar](T x) {
                      return compute([](auto a, auto b) { return a * b; }, x, scalar);
                    }),
                    ASCENDC_HOST_NUMBERS)
ASCENDC_HOST_SCALAR(Maxs, "half, float, int16_t and int32_t", false,
                    ([scalar](T x) { return x > scalar ? x : scalar; }), ASCENDC_HOST_NUMBERS)
ASCENDC_HOST_SCALAR(Mins, "half, float, int16_t and int32_t", false,
                    ([scalar](T x) { return x < scalar ? x : scalar; }), ASCENDC_HOST_NUMBERS)
ASCENDC_HOST_SCALAR(LeakyRelu, "half and float", false, ([scalar](T x) {
                      const float a = static_cast<float>(x);
                      return static_cast<T>(a > 0 ? a : a * static_cast<float>(scalar));
                    }),
                    half, float)
ASCENDC_HOST_SCALAR(ShiftLeft, "uint16_t, uint32_t, int16_t and int32_t", false, ([scalar](T x) {
                      return scalar >= T(8 * sizeof(T))
                                 ? T{0}
                                 : static_cast<T>(static_cast<uint64_t>(x) << scalar);
                    }),
                    uint16_t, uint32_t, int16_t, int32_t)

#undef ASCENDC_HOST_NUMBERS
