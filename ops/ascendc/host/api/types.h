// Scalar types and markers of the language.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define __cbuf__
#define __inline__ inline

// A macro in the vendor's headers too: `GM_ADDR a, b;` makes b an integer.
#define GM_ADDR uint8_t*

using half = _Float16;

/// Storage of bfloat16. The vector unit has no arithmetic on it and the scalar unit no conversion
/// but ToFloat and ToBfloat16, so neither has this type.
struct bfloat16_t {
  uint16_t bits;
};

namespace AscendC {

/// Two to a byte; only ever the type of a tensor.
struct int4b_t {
  uint8_t bits;
};

inline float ToFloat(bfloat16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

/// Rounds to nearest, ties to even.
inline bfloat16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bfloat16_t result;
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    result.bits = static_cast<uint16_t>((bits >> 16) | 0x40);
  } else {
    result.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
  return result;
}

}  // namespace AscendC

namespace ascendc_host {

template <class T, class... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

/// Bits of an element in memory.
template <class T>
constexpr uint32_t element_bits = std::is_same_v<T, AscendC::int4b_t> ? 4 : 8 * sizeof(T);

/// Elements of a block of 32 bytes.
template <class T>
constexpr uint32_t block_elements = 256 / element_bits<T>;

template <class T>
constexpr uint64_t bytes_of(uint64_t elements) {
  return (elements * element_bits<T> + 7) / 8;
}

/// Value of an element as float, and back with one rounding (to nearest even).
template <class T>
float to_float(T value) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return AscendC::ToFloat(value);
  } else {
    return static_cast<float>(value);
  }
}

template <class T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return AscendC::ToBfloat16(value);
  } else {
    return static_cast<T>(value);
  }
}

}  // namespace ascendc_host
