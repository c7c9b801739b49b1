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
template <class V>  // of 16-bit numbers
ASCEND_INLINE V greater(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_max_epu16((__m512i)a, (__m512i)b);
  if constexpr (sizeof(V) == 32) return (V)_mm256_max_epu16((__m256i)a, (__m256i)b);
#endif
  return a > b ? a : b;
}
namespace detail {
template <int Step = kLanes / 2>
ASCEND_INLINE Vi greatest_of_lanes(Vi bits) {
  if constexpr (Step > 0) {
    bits = greater(bits, (Vi)exchange<Step>((Vf)bits, LaneSequence{}));
    return greatest_of_lanes<Step / 2>(bits);
  }
  return bits;
}
}  // namespace detail
// In every lane.
ASCEND_INLINE Vf greatest_lane(Vi bits) { return (Vf)detail::greatest_of_lanes(bits); }
// Lane i of the result is the greatest lane of v[i].
ASCEND_INLINE Vf greatest_lanes(const Vi *v) {
  Vf floats[kLanes];
  ASCEND_UNROLL
  for (int i = 0; i < kLanes; ++i) floats[i] = (Vf)v[i];
  return across_lanes(floats, [](Vf a, Vf b) { return (Vf)greater((Vi)a, (Vi)b); });
}

// 1 / x as the reference has it: 0 where x is no normal number.
ASCEND_INLINE Vf inverse_of(Vf x) { return x >= 0x1p-126f ? 1.0f / x : Vf{}; }
ASCEND_INLINE float inverse_of(float x) { return x >= 0x1p-126f ? 1.0f / x : 0.0f; }

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

// Rows of bfloat16 are taken apart: pairs of vectors have even and odd columns. That is one
// instruction less for each, and putting codes together again takes none more.
#if defined(__AVX512VBMI__)
template <class From, int kDim>
constexpr bool kSplit = From::kDtype == ASCEND_BFLOAT16 && kDim != 0 && kDim % (2 * kLanes) == 0;
#else
template <class From, int kDim>
constexpr bool kSplit = false;
#endif
namespace detail {
template <int Odd, size_t... I>
ASCEND_INLINE Vf every_second(Vf a, Vf b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * (int)I + Odd)...);
}
}  // namespace detail

template <class From, bool kSplit = false>
ASCEND_INLINE void widen_vectors(const char *source, int vectors, Vf *row) {
  const auto *from = (const typename From::Storage *)source;
  ASCEND_UNROLL_ROW
  for (int i = 0; i < vectors; ++i) {
    if constexpr (kSplit) {
      const Vu pairs = load<Vu>(from + i / 2 * 2 * kLanes);
      row[i] = (Vf)(i % 2 ? pairs & 0xffff0000u : pairs << 16);
    } else if constexpr (sizeof(*from) == 2) {
      row[i] = From::widen(load<Vh>(from + i * kLanes));
    } else {
      row[i] = load<Vf>(from + i * kLanes);
    }
  }
}

// Of numbers that round to -127 to 127; NaN becomes 0.
template <bool kSplit = false>
ASCEND_INLINE void store_codes(const Vf *row, int vectors, const Codes &codes) {
  constexpr int kTogether = kRowBytes / kLanes;
  const int together = vectors / kTogether * kTogether;
  ASCEND_UNROLL_ROW
  for (int i = 0; i < together; i += kTogether) {
    narrow<kTogether, kSplit>(row + i, codes.at(i * kLanes));
  }
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

// The same of a row in memory, which is copied on the way. 16-bit numbers need not be widened:
// their bits order as those of floats do.
template <class From>
ASCEND_INLINE Vi copy_and_compare(const char *source, int vectors, char *copy) {
  if constexpr (sizeof(typename From::Storage) == 2) {
    Vhh bits{};
    ASCEND_UNROLL_ROW
    for (int i = 0; i < vectors / 2; ++i) {
      const Vhh both = load<Vhh>(source + i * sizeof(Vhh));
      store(copy + i * sizeof(Vhh), both);
      bits = greater(bits, both & 0x7fff);
    }
    Vh greatest =
        greater(detail::half<0>(bits, LaneSequence{}), detail::half<1>(bits, LaneSequence{}));
    if (vectors % 2) {
      const Vh rest = load<Vh>(source + vectors / 2 * sizeof(Vhh));
      store(copy + vectors / 2 * sizeof(Vhh), rest);
      greatest = greater(greatest, rest & 0x7fff);
    }
    return (Vi)From::widen(greatest);
  } else {
    Vf row[kMaxVectors<0>];
    widen_vectors<From>(source, vectors, row);
    memcpy(copy, source, vectors * sizeof(Vf));
    return magnitudes(row, vectors);
  }
}

// C8D: NaN, with codes 0, for a row that is not finite.
ASCEND_INLINE Vf dynamic_scale(Vf greatest) {
  const Vf scale = greatest / 127.0f;
  const Vf normal = scale < 0x1p-126f ? Vf{} : scale;
  return greatest < __builtin_inff() ? normal : splat(__builtin_nanf(""));
}

// By the inverse of the scale, which is 0 for NaN. At most 127 after rounding. 0 times what is not
// finite is NaN, which becomes 0.
template <bool kSplit = false>
ASCEND_INLINE void quantise_dynamic(Vf *row, int vectors, float inverse, const Codes &codes) {
  ASCEND_UNROLL_ROW
  for (int i = 0; i < vectors; ++i) row[i] *= inverse;
  store_codes<kSplit>(row, vectors, codes);
}

// C8S. Returns the greatest magnitudes in units of the scales: where that rounds to more than 127,
// or is NaN, the row left the range, and has wrong codes unless they are clamped.
template <bool kClamped, bool kSplit = false>
ASCEND_INLINE Vi quantise_static(Vf *row, int vectors, const float *inverses, const Codes &codes) {
  Vi bits{};
  ASCEND_UNROLL_ROW
  for (int i = 0; i < vectors; ++i) {
    const Vf y = row[i] * load<Vf>(inverses + i * kLanes);
    bits = greater(bits, (Vi)magnitude(y));
    row[i] = kClamped ? clamp(y, 127.0f) : y;
  }
  store_codes<kSplit>(row, vectors, codes);
  return bits;
}
ASCEND_INLINE Vi left_range(Vf greatest) { return ~(greatest < 127.5f); }  // ties to even

// To be added up.
ASCEND_INLINE Vf squares(const Vf *row, int vectors) {
  Vf sum{};
  ASCEND_UNROLL_ROW
  for (int i = 0; i < vectors; ++i) sum += row[i] * row[i];
  return sum;
}

// The same of numbers in memory, from which the row was read; subnormal ones may be missing.
template <class From>
ASCEND_INLINE Vf squares_of(const char *source, const Vf *row, int vectors) {
#if defined(__AVX512BF16__)
  if constexpr (From::kDtype == ASCEND_BFLOAT16) {
    if (vectors % 4 == 0) {
      __m512 sums[2] = {};
      ASCEND_UNROLL_ROW
      for (int i = 0; i < vectors / 2; ++i) {
        const __m512bh pairs = (__m512bh)_mm512_loadu_si512(source + i * 64);
        sums[i % 2] = _mm512_dpbf16_ps(sums[i % 2], pairs, pairs);
      }
      return (Vf)_mm512_add_ps(sums[0], sums[1]);
    }
  }
#endif
  return squares(row, vectors);
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

  Residual(const Vf *row, int vectors, const float *scales) {
    Vi bits{};
    Vf error{};
    for (int i = 0; i < vectors; ++i) {
      const Vf scale = load<Vf>(scales + i * kLanes);
      const Vf y = rounded(row[i] * (1.0f / scale));
      const Vf rest = y - clamp(round_to_integer(y), 127.0f);
      const Vf lost = rest * scale;
      bits = greater(bits, (Vi)magnitude(rest));
      error += lost * lost;
      store(units + i * kLanes, rest);
    }
    greatest = greatest_lane(bits)[0];
    square_error = sum_over_tokens<1>(error)[0];
    square_norm = sum_over_tokens<1>(squares(row, vectors))[0];
  }
};

// Of numbers up to 64: the middles between values are 0.5, and 1.5 times powers of two.
ASCEND_INLINE Vf e3m0_code(Vf y) {
  const Vf size = magnitude(y);
  const Vi above = ((Vi)size - (Vi)splat(1.5f) - 1) >> 23;  // doublings of 1.5 below y
  const Vi code = size > 1.5f ? above + 2 : (size > 0.5f ? splat(1) : Vi{});
  return __builtin_convertvector(code + ((y < 0.0f) & (code > 0) & 8), Vf);
}

// A residual in 4-bit codes. Returns their scale.
inline float encode_patch(int dim, int patch_code, const Residual &residual, uint8_t *patch) {
  alignas(64) int8_t nibbles[kMaxHeadDim] = {};
  const float scale = residual.greatest / (patch_code == ASCEND_INT4 ? 7.0f : 64.0f);
  const float inverse = inverse_of(scale);
  for (int d = 0; d < dim; d += kLanes) {
    const Vf y = rounded(load<Vf>(residual.units + d) * inverse);
    const Vf code = clamp(round_to_integer(y), 7.0f);
    store(nibbles + d, narrow_to_bytes(patch_code == ASCEND_E3M0 ? e3m0_code(y) : code));
  }
  for (int d = 0; d < dim; d += 2 * kLanes) {
    const Vh pairs = load<Vh>(nibbles + d);
    store(patch + d / 2, __builtin_convertvector((pairs & 15) | (pairs >> 4 & 0xf0), Vb));
  }
  return scale;
}

}  // namespace ascend
