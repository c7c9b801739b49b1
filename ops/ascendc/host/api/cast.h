// Cast: conversions between element types, with the pairs and rounding modes of the chip.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "vector.h"

namespace AscendC {

enum class RoundMode {
  CAST_NONE = 0,
  CAST_RINT,
  CAST_FLOOR,
  CAST_CEIL,
  CAST_ROUND,
  CAST_TRUNC,
  CAST_ODD,
};

}  // namespace AscendC

namespace ascendc_host {

using AscendC::int4b_t;
using AscendC::RoundMode;

constexpr uint32_t mode_bit(RoundMode mode) { return 1u << static_cast<int>(mode); }
constexpr uint32_t NO_ROUNDING = mode_bit(RoundMode::CAST_NONE);
constexpr uint32_t ANY_ROUNDING = mode_bit(RoundMode::CAST_RINT) | mode_bit(RoundMode::CAST_FLOOR) |
                                  mode_bit(RoundMode::CAST_CEIL) | mode_bit(RoundMode::CAST_ROUND) |
                                  mode_bit(RoundMode::CAST_TRUNC);

/// Rounding modes that the chip has for `source` to `target`, a bit each; 0 if it has no such Cast.
/// From the table for Atlas A2 in the documentation of Cast.
template <class D, class S>
constexpr uint32_t cast_modes() {
  if constexpr (is_one_of<S, int4b_t, int8_t, uint8_t>) {
    return is_one_of<D, half> ? NO_ROUNDING : 0;
  } else if constexpr (is_one_of<S, int16_t>) {
    if (is_one_of<D, half>) return ANY_ROUNDING | NO_ROUNDING;
    return is_one_of<D, float> ? NO_ROUNDING : 0;
  } else if constexpr (is_one_of<S, half>) {
    if (is_one_of<D, int4b_t, int8_t, uint8_t>) return ANY_ROUNDING | NO_ROUNDING;
    if (is_one_of<D, int16_t, int32_t>) return ANY_ROUNDING;
    return is_one_of<D, float> ? NO_ROUNDING : 0;
  } else if constexpr (is_one_of<S, bfloat16_t>) {
    if (is_one_of<D, int32_t>) return ANY_ROUNDING;
    return is_one_of<D, float> ? NO_ROUNDING : 0;
  } else if constexpr (is_one_of<S, int32_t>) {
    if (is_one_of<D, half>) return ~0u;  // SetDeqScale decides, the mode has no effect
    if (is_one_of<D, float>) return ANY_ROUNDING | NO_ROUNDING;
    return is_one_of<D, int16_t, int64_t> ? NO_ROUNDING : 0;
  } else if constexpr (is_one_of<S, float>) {
    if (is_one_of<D, half>) return ANY_ROUNDING | NO_ROUNDING | mode_bit(RoundMode::CAST_ODD);
    return is_one_of<D, int16_t, bfloat16_t, int32_t, float, int64_t> ? ANY_ROUNDING : 0;
  } else if constexpr (is_one_of<S, int64_t>) {
    if (is_one_of<D, int32_t>) return NO_ROUNDING;
    return is_one_of<D, float> ? ANY_ROUNDING : 0;
  }
  return 0;
}

inline double round_value(double value, RoundMode mode) {
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return std::floor(value);
    case RoundMode::CAST_CEIL:
      return std::ceil(value);
    case RoundMode::CAST_ROUND:
      return std::round(value);
    case RoundMode::CAST_TRUNC:
      return std::trunc(value);
    default:
      return std::nearbyint(value);
  }
}

/// `value` rounded and saturated to integer type D; NaN becomes 0.
template <class D>
D to_integer(double value, RoundMode mode) {
  if (std::isnan(value)) return 0;
  const double rounded = round_value(value, mode);
  constexpr double LOW = static_cast<double>(std::numeric_limits<D>::min());
  constexpr double HIGH = static_cast<double>(std::numeric_limits<D>::max());
  if (rounded <= LOW) return std::numeric_limits<D>::min();
  if (rounded >= HIGH) return std::numeric_limits<D>::max();
  return static_cast<D>(rounded);
}

/// `value` as half or bfloat16_t in another mode than nearest-even.
template <class D>
D to_narrow(float value, RoundMode mode) {
  const D nearest = from_float<D>(value);
  const float as_float = to_float(nearest);
  if (mode == RoundMode::CAST_RINT || mode == RoundMode::CAST_NONE || !std::isfinite(value) ||
      as_float == value) {
    return nearest;
  }
  uint16_t bits;
  std::memcpy(&bits, &nearest, sizeof bits);
  // The neighbours in magnitude: `low` is the value cut off, `high` one step further from zero.
  const uint16_t low = std::fabs(as_float) > std::fabs(value) ? bits - 1 : bits;
  const uint16_t high = low + 1;
  D cut, next;
  std::memcpy(&cut, &low, sizeof cut);
  std::memcpy(&next, &high, sizeof next);
  const bool negative = std::signbit(value);
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return negative ? next : cut;
    case RoundMode::CAST_CEIL:
      return negative ? cut : next;
    case RoundMode::CAST_TRUNC:
      return cut;
    case RoundMode::CAST_ODD:
      return (low & 1) != 0 ? cut : next;
    default: {  // CAST_ROUND: ties away from zero
      const double middle = (double{to_float(cut)} + to_float(next)) / 2;
      return std::fabs(value) >= std::fabs(middle) ? next : cut;
    }
  }
}

/// One element of a Cast, int4b_t apart.
template <class D, class S>
D cast_element(S value, RoundMode mode, float deq_scale) {
  if constexpr (is_one_of<S, int32_t> && is_one_of<D, half>) {
    return static_cast<half>(static_cast<float>(value) * deq_scale);
  } else if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
    constexpr int64_t LOW = std::numeric_limits<D>::min();
    constexpr int64_t HIGH = std::numeric_limits<D>::max();
    const int64_t wide = value;
    return static_cast<D>(wide < LOW ? LOW : wide > HIGH ? HIGH : wide);
  } else if constexpr (std::is_integral_v<D>) {
    return to_integer<D>(to_float(value), mode);
  } else if constexpr (is_one_of<S, float> && is_one_of<D, float>) {
    return static_cast<float>(round_value(value, mode));
  } else if constexpr (is_one_of<S, float, int16_t> && sizeof(D) == 2) {
    return to_narrow<D>(to_float(value), mode);
  } else {
    return from_float<D>(to_float(value));  // exact, or int32_t and int64_t to float, to nearest
  }
}

template <class T>
T load_element(const T* data, uint64_t index) {
  return data[index];
}
inline int8_t load_element(const int4b_t* data, uint64_t index) {
  const uint8_t byte = data[index / 2].bits;
  const int nibble = index % 2 == 0 ? byte & 15 : byte >> 4;  // the first is the low one
  return static_cast<int8_t>(nibble >= 8 ? nibble - 16 : nibble);
}
template <class T>
void store_element(T* data, uint64_t index, T value) {
  data[index] = value;
}
inline void store_element(int4b_t* data, uint64_t index, int8_t value) {
  uint8_t& byte = data[index / 2].bits;
  const int nibble = std::min<int>(7, std::max<int>(-8, value)) & 15;
  byte = static_cast<uint8_t>(index % 2 == 0 ? (byte & 0xf0) | nibble : (byte & 15) | nibble << 4);
}

template <class T>
using CastElement = std::conditional_t<std::is_same_v<T, int4b_t>, int8_t, T>;

template <class D, class S>
void run_cast(const AscendC::LocalTensor<D>& dst, const AscendC::LocalTensor<S>& src,
              RoundMode mode, const Lanes& lanes, const AscendC::UnaryRepeatParams& params) {
  constexpr uint32_t MODES = cast_modes<D, S>();
  static_assert(MODES != 0,
                "Cast: the chip (dav-2201) has no conversion between these types; "
                "int8_t converts to and from half only");
  constexpr const char* API = "Cast";
  HOST_CHECK((MODES & mode_bit(mode)) != 0,
             "Cast: RoundMode %d is not available between these types (allowed modes: bits 0x%x)",
             static_cast<int>(mode), MODES);
  const Stride target{params.dstBlkStride, params.dstRepStride};
  const Stride source{params.srcBlkStride, params.srcRepStride};
  D* to = operand(API, dst, lanes, target);
  const S* from = operand(API, src, lanes, source);
  check_overlap(API, dst, src, lanes);
  HOST_CHECK(
      !lanes.contiguous() || dst.offset() != src.offset() || element_bits<D> <= element_bits<S>,
      "Cast: in place, the wider results would overwrite sources not read yet");
  Accesses accesses;
  accesses.reserve(2);
  add_access(accesses, src, lanes, source, false);
  add_access(accesses, dst, lanes, target, true);
  const float scale = core().deq_scale;
  const auto convert = [=](uint64_t d, uint64_t s) {
    using Source = CastElement<S>;
    using Target = CastElement<D>;
    const Source value = load_element(from, s);
    if constexpr (is_one_of<D, int4b_t>) {
      const int8_t wide = to_integer<int8_t>(to_float(value), mode);
      store_element(to, d, wide);
    } else {
      store_element(to, d, cast_element<Target, Source>(value, mode, scale));
    }
  };
  issue_vector(
      API,
      [=] {
        if (lanes.contiguous()) {
          for (uint32_t i = 0; i < lanes.count; ++i) convert(i, i);
          return;
        }
        for_each_lane(lanes, [&](uint32_t repeat, uint32_t lane) {
          convert(lane_offset<D>(target, repeat, lane), lane_offset<S>(source, repeat, lane));
        });
      },
      std::move(accesses), vector_cycles(lanes, std::max(sizeof(D), sizeof(S)), 1));
}

}  // namespace ascendc_host

namespace AscendC {

/// Scale of a Cast from int32_t to half.
inline void SetDeqScale(half scale) { ascendc_host::core().deq_scale = static_cast<float>(scale); }

template <class T, class U>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode,
          const uint32_t count) {
  ascendc_host::run_cast(dst, src, mode, ascendc_host::lanes_of_count("Cast", count), {});
}

/// `mask` counts lanes of the wider of the two types.
template <class T, class U, bool isSetMask = true>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode,
          const uint64_t mask, const uint8_t repeatTime, const UnaryRepeatParams& params) {
  using Widest = std::conditional_t<(sizeof(T) > sizeof(U)), T, U>;
  ascendc_host::run_cast(dst, src, mode,
                         ascendc_host::masked<Widest, isSetMask>("Cast", mask, repeatTime), params);
}
template <class T, class U, bool isSetMask = true>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode,
          const uint64_t mask[], const uint8_t repeatTime, const UnaryRepeatParams& params) {
  using Widest = std::conditional_t<(sizeof(T) > sizeof(U)), T, U>;
  ascendc_host::run_cast(dst, src, mode,
                         ascendc_host::masked<Widest, isSetMask>("Cast", mask, repeatTime), params);
}

}  // namespace AscendC
