// Rows (a token and kv head of K or V) on their way into int8 pages. The arithmetic is that of
// ops/quantise.py, operation by operation, so both give the same bytes.
#pragma once

#include "element.h"
#include "patches.h"

namespace ascend {

// A product that is rounded before it is used: no fused multiply-add.
ASCEND_INLINE Vf rounded(Vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

ASCEND_INLINE Vf magnitude(Vf x) { return (Vf)((Vi)x & 0x7fffffff); }
// NaN stays NaN.
ASCEND_INLINE Vf clamp(Vf x, float limit) { return vmax(splat(-limit), vmin(splat(limit), x)); }

// Nearest integer, ties to even; beyond 2^21, where that matters to nobody, a clamped one.
ASCEND_INLINE Vf round_to_integer(Vf x) {
#if defined(__AVX512F__)
  return (Vf)_mm512_roundscale_ps((__m512)x, 0);
#elif defined(__AVX2__)
  return (Vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vf magic = splat(12582912.0f);
  return rounded(clamp(x, 0x1p21f) + magic) - magic;
#endif
}

// Bits of magnitudes order as the magnitudes do, with NaN on top.
ASCEND_INLINE Vi greater(Vi a, Vi b) {
#if defined(__AVX512F__)
  return (Vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}
inline float greatest_lane(Vi bits) {
  int32_t top = 0;
  for (int i = 0; i < kLanes; ++i) top = top > bits[i] ? top : bits[i];
  float value;
  memcpy(&value, &top, 4);
  return value;
}

// 1 / x as the reference has it: 0 where x is no normal number.
inline float inverse_of(float x) { return x >= 0x1p-126f ? 1.0f / x : 0.0f; }

// Where the codes of one token go: 32 columns here, the next 32 a plane further on. Written in
// place: a copy through a buffer would wait for its small stores.
struct Codes {
  char *page;
  int64_t plane_bytes;
  char *at(int column) const { return page + column / 32 * plane_bytes + column % 32; }
};

// C8D. Returns the scale: NaN, with codes 0, for a row that is not finite.
ASCEND_INLINE float quantise_dynamic(int dim, const float *row, const Codes &codes) {
  Vi bits{};
  for (int d = 0; d < dim; d += kLanes) bits = greater(bits, (Vi)magnitude(load<Vf>(row + d)));
  const float top = greatest_lane(bits);
  float scale = top / 127.0f;
  if (scale < 0x1p-126f) scale = 0.0f;
  if (!(top < __builtin_inff())) scale = __builtin_nanf("");
  const float inverse = inverse_of(scale);  // 0 for NaN
  for (int d = 0; d < dim; d += kLanes) {
    // At most 127 after rounding. 0 times what is not finite is NaN, which becomes 0.
    store(codes.at(d), narrow_to_bytes(load<Vf>(row + d) * inverse));
  }
  return scale;
}

// How far the codes of a row are from it, in units of the values.
struct Loss {
  float error, norm;  // squared
};

// C8S. Returns whether some element lay outside the range of the static scales. Measures the loss
// unless that is null.
template <bool kMeasure>
ASCEND_INLINE bool quantise_static(int dim, const float *row, const float *scales,
                                   const float *inverses, const Codes &codes, Loss *loss) {
  Vi bits{};
  Vf error{}, norm{};
  for (int d = 0; d < dim; d += kLanes) {
    const Vf x = load<Vf>(row + d), y = rounded(x * load<Vf>(inverses + d));
    const Vf integer = round_to_integer(y), code = clamp(integer, 127.0f);
    bits = greater(bits, (Vi)magnitude(integer));
    store(codes.at(d), narrow_to_bytes(code));
    if constexpr (kMeasure) {
      const Vf lost = (y - code) * load<Vf>(scales + d);
      error += lost * lost;
      norm += x * x;
    }
  }
  if constexpr (kMeasure) {
    *loss = {sum_over_tokens<1>(error)[0], sum_over_tokens<1>(norm)[0]};
  }
  return !(greatest_lane(bits) <= 127.0f);
}

// What rounding and saturation took from a row, in units of the channels' scales, in 4-bit codes.
// Returns the scale of the codes.
inline float encode_patch(int dim, int patch_code, const float *row, const float *inverses,
                          const Codes &codes, uint8_t *patch) {
  alignas(64) float residual[kMaxHeadDim];
  alignas(64) int8_t nibbles[kMaxHeadDim];
  Vi bits{};
  for (int d = 0; d < dim; d += kLanes) {
    const Vf y = rounded(load<Vf>(row + d) * load<Vf>(inverses + d));
    const Vf rest = y - Int8::widen(load<Vb>(codes.at(d)));
    bits = greater(bits, (Vi)magnitude(rest));
    store(residual + d, rest);
  }
  const float scale = greatest_lane(bits) / (patch_code == ASCEND_INT4 ? 7.0f : 64.0f);
  const float inverse = inverse_of(scale);
  for (int d = 0; d < dim; d += kLanes) {
    const Vf y = rounded(load<Vf>(residual + d) * inverse);
    Vf code = clamp(round_to_integer(y), 7.0f);
    if (patch_code == ASCEND_E3M0) {
      code = Vf{};
      for (float middle : {0.5f, 1.5f, 3.0f, 6.0f, 12.0f, 24.0f, 48.0f}) {
        code += magnitude(y) > middle ? splat(1.0f) : Vf{};
      }
      code += (y < 0.0f) & (code > 0.0f) ? splat(8.0f) : Vf{};
    }
    store(nibbles + d, narrow_to_bytes(code));
  }
  for (int d = 0; d < dim; d += 2) {
    patch[d / 2] = (uint8_t)((nibbles[d] & 15) | nibbles[d + 1] << 4);
  }
  return scale;
}

}  // namespace ascend
