// Rows (a token and kv head of K or V) on their way into int8 pages. The arithmetic is that of
// ops/quantise.py, operation by operation, so both give the same bytes.
#pragma once

#include "element.h"
#include "patches.h"
#include "rotate.h"

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
namespace detail {
template <int Step = kLanes / 2>
ASCEND_INLINE Vi greatest_lanes(Vi bits) {
  if constexpr (Step > 0) {
    bits = greater(bits, (Vi)exchange<Step>((Vf)bits, LaneSequence{}));
    return greatest_lanes<Step / 2>(bits);
  }
  return bits;
}
}  // namespace detail
inline float greatest_lane(Vi bits) {
  bits = detail::greatest_lanes(bits);
  return ((Vf)bits)[0];
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

// A row is `vectors` vectors of float. Where that is a constant once inlined, and the row an array
// of that length, it stays in registers. Those of 4 lanes are too small for that, and unrolling
// would only take the compiler's time.
#if defined(__AVX2__)
constexpr bool kRowsInRegisters = true;
#define ASCEND_UNROLL_ROW ASCEND_UNROLL
#else
constexpr bool kRowsInRegisters = false;
#define ASCEND_UNROLL_ROW
#endif

template <int kDim>
constexpr int kMaxVectors = (kDim ? kDim : kMaxHeadDim) / kLanes;

template <class From>
ASCEND_INLINE void widen_vectors(const char *source, int vectors, Vf *row) {
  const auto *from = (const typename From::Storage *)source;
  ASCEND_UNROLL_ROW
  for (int i = 0; i < vectors; ++i) {
    if constexpr (sizeof(*from) == 2) {
      row[i] = From::widen(load<Vh>(from + i * kLanes));
    } else {
      row[i] = load<Vf>(from + i * kLanes);
    }
  }
}

// Of numbers that round to -127 to 127; NaN becomes 0.
ASCEND_INLINE void store_codes(const Vf *row, int vectors, const Codes &codes) {
  constexpr int kTogether = kRowBytes / kLanes;
  const int together = vectors / kTogether * kTogether;
  ASCEND_UNROLL_ROW
  for (int i = 0; i < together; i += kTogether) narrow<kTogether>(row + i, codes.at(i * kLanes));
  ASCEND_UNROLL_ROW
  for (int i = together; i < vectors; ++i) narrow<1>(row + i, codes.at(i * kLanes));
}

// In each lane the greatest magnitude, as bits.
ASCEND_INLINE Vi magnitudes(const Vf *row, int vectors) {
  Vi bits{};
  ASCEND_UNROLL_ROW
  for (int i = 0; i < vectors; ++i) bits = greater(bits, (Vi)magnitude(row[i]));
  return bits;
}

// C8D: NaN, with codes 0, for a row that is not finite.
ASCEND_INLINE float dynamic_scale(float greatest) {
  const float scale = greatest / 127.0f;
  if (!(greatest < __builtin_inff())) return __builtin_nanf("");
  return scale < 0x1p-126f ? 0.0f : scale;
}

ASCEND_INLINE void quantise_dynamic(Vf *row, int vectors, float scale, const Codes &codes) {
  const float inverse = inverse_of(scale);  // 0 for NaN
  // At most 127 after rounding. 0 times what is not finite is NaN, which becomes 0.
  ASCEND_UNROLL_ROW
  for (int i = 0; i < vectors; ++i) row[i] *= inverse;
  store_codes(row, vectors, codes);
}

// C8S. Returns the greatest magnitudes in units of the scales: where that rounds to more than 127,
// or is NaN, the row left the range.
ASCEND_INLINE Vi quantise_static(Vf *row, int vectors, const float *inverses, const Codes &codes) {
  Vi bits{};
  ASCEND_UNROLL_ROW
  for (int i = 0; i < vectors; ++i) {
    const Vf y = row[i] * load<Vf>(inverses + i * kLanes);
    bits = greater(bits, (Vi)magnitude(y));
    row[i] = clamp(y, 127.0f);
  }
  store_codes(row, vectors, codes);
  return bits;
}
ASCEND_INLINE bool left_range(Vi bits) { return !(greatest_lane(bits) < 127.5f); }  // ties to even

ASCEND_INLINE float square_sum(const Vf *row, int vectors) {
  Vf sum{};
  ASCEND_UNROLL_ROW
  for (int i = 0; i < vectors; ++i) sum += row[i] * row[i];
  return sum_over_tokens<1>(sum)[0];
}

// The greatest square error of a row inside the range: rounding takes half a scale. With margins
// for how sums are rounded, and for subnormal ones.
inline float error_bound_of(const float *scales, int dim) {
  Vf sum{};
  for (int d = 0; d < dim; d += kLanes) {
    const Vf half = load<Vf>(scales + d) * 0.5f;
    sum += half * half;
  }
  return sum_over_tokens<1>(sum)[0] * 1.001f + 0x1p-120f;
}

// What rounding and saturation took from a row.
struct Residual {
  alignas(64) float units[kMaxHeadDim];  // of the channels' scales
  float greatest;                        // magnitude of those
  float square_error, square_norm;       // of the row, in units of the values

  Residual(const Vf *row, int vectors, const float *scales, const float *inverses) {
    Vi bits{};
    Vf error{};
    for (int i = 0; i < vectors; ++i) {
      const Vf y = rounded(row[i] * load<Vf>(inverses + i * kLanes));
      const Vf rest = y - clamp(round_to_integer(y), 127.0f);
      const Vf lost = rest * load<Vf>(scales + i * kLanes);
      bits = greater(bits, (Vi)magnitude(rest));
      error += lost * lost;
      store(units + i * kLanes, rest);
    }
    greatest = greatest_lane(bits);
    square_error = sum_over_tokens<1>(error)[0];
    square_norm = square_sum(row, vectors);
  }
};

// A residual in 4-bit codes. Returns their scale.
inline float encode_patch(int dim, int patch_code, const Residual &residual, uint8_t *patch) {
  alignas(64) int8_t nibbles[kMaxHeadDim];
  const float scale = residual.greatest / (patch_code == ASCEND_INT4 ? 7.0f : 64.0f);
  const float inverse = inverse_of(scale);
  for (int d = 0; d < dim; d += kLanes) {
    const Vf y = rounded(load<Vf>(residual.units + d) * inverse);
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
