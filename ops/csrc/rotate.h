// The Walsh-Hadamard transform that C8D applies to keys (ops/quantise.py, rotate): it spreads a
// large channel over all others, so that one scale per token serves them all. Queries are turned
// the same way, which leaves their products with the keys as they were.
#pragma once

#include "simd.h"

namespace ascend {

// Channels that are mixed with each other: the largest power of two that divides head_dim.
inline int rotated_channels(int head_dim) { return head_dim & -head_dim; }

namespace detail {
template <int Stride, size_t... I>
ASCEND_INLINE Vf signs(std::index_sequence<I...>) {
  return Vf{(I & Stride ? -1.0f : 1.0f)...};
}
}  // namespace detail

// One step inside vectors: (a, b) -> (a + b, a - b) for lanes that lie Stride apart.
template <int Stride = 1>
ASCEND_INLINE Vf butterflies(Vf x) {
  if constexpr (Stride == kLanes) {
    return x;
  } else {
    const Vf partner = detail::exchange<Stride>(x, LaneSequence{});
    return butterflies<2 * Stride>(partner + x * detail::signs<Stride>(LaneSequence{}));
  }
}

// The steps across vectors from Stride up to End, in place.
template <int Stride, int End, int Vectors>
ASCEND_INLINE void mix(Vf (&row)[Vectors]) {
  if constexpr (Stride < End) {
    ASCEND_UNROLL
    for (int i = 0; i < Vectors; ++i) {
      if (i & Stride) continue;
      const Vf a = row[i], b = row[i + Stride];
      row[i] = a + b;
      row[i + Stride] = a - b;
    }
    mix<2 * Stride, End>(row);
  }
}

// In place, without normalisation: applied twice it multiplies by rotated_channels(head_dim).
inline void rotate_row(int head_dim, float *row) {
  for (int d = 0; d < head_dim; d += kLanes) store(row + d, butterflies(load<Vf>(row + d)));
  const int channels = rotated_channels(head_dim);
  for (int stride = kLanes; stride < channels; stride *= 2) {
    for (int base = 0; base < head_dim; base += 2 * stride) {
      for (int d = base; d < base + stride; d += kLanes) {
        const Vf a = load<Vf>(row + d), b = load<Vf>(row + d + stride);
        store(row + d, a + b);
        store(row + d + stride, a - b);
      }
    }
  }
}
// The same of a row in registers, whose length is a power of two. kSplit: its vectors hold even and
// odd columns in turn.
template <bool kSplit, int Vectors>
ASCEND_INLINE void rotate_row(Vf (&row)[Vectors]) {
  static_assert((Vectors & -Vectors) == Vectors);
  constexpr int kAcross = kSplit ? 2 : 1;  // from which stride on columns are vectors apart
  mix<1, kAcross>(row);
  ASCEND_UNROLL
  for (Vf &x : row) x = butterflies(x);
  mix<kAcross, Vectors>(row);
}

}  // namespace ascend
