// Products of float rows with integer weights, on any instruction set: weights are widened to
// floats in registers, kLanes columns at a time.
#pragma once

#include "linear_panel.h"
#include "linear_weights.h"

namespace ascend {

struct NibbleFloats {
  static constexpr int kStep = 8;  // k of a word
  // k number `I` of a word: even ones in the lower half.
  template <int I>
  static ASCEND_INLINE Vf widen(Vi word) {
    constexpr int kBit = I / 2 * 4 + I % 2 * 16;
    return __builtin_convertvector((word << (28 - kBit)) >> 28, Vf);
  }
};

struct ByteFloats {
  static constexpr int kStep = 4;
  template <int I>
  static ASCEND_INLINE Vf widen(Vi word) {
    return __builtin_convertvector((word << (24 - 8 * I)) >> 24, Vf);
  }
};

// Weights that are floats already: [k][32].
struct TileFloats {
  static constexpr int kStep = 1;
  template <int I>
  static ASCEND_INLINE Vf widen(Vi word) {
    return (Vf)word;
  }
};

constexpr int64_t kWordsBytes = 4 * kBlockColumns;  // a word of all columns of a block

template <class Source, int R, int V>
struct FloatBlock {
  Vf acc[R][V];

  template <int I>
  ASCEND_INLINE void step(const Vi *words, const float *x) {
    if constexpr (I < Source::kStep) {
      Vf w[V];
      ASCEND_UNROLL
      for (int v = 0; v < V; ++v) w[v] = Source::template widen<I>(words[v]);
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vf value = splat(x[I * R + r]);
        ASCEND_UNROLL
        for (int v = 0; v < V; ++v) acc[r][v] += w[v] * value;
      }
      step<I + 1>(words, x);
    }
  }

  ASCEND_INLINE void run(const float *x, const char *weights, int64_t steps) {
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      ASCEND_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = Vf{};
    }
    for (int64_t i = 0; i < steps; ++i) {
      if (Source::kStep > 1) __builtin_prefetch(weights + kPrefetchBytes);
      Vi words[V];
      ASCEND_UNROLL
      for (int v = 0; v < V; ++v) words[v] = load<Vi>(weights + v * sizeof(Vi));
      step<0>(words, x);
      weights += kWordsBytes;
      x += Source::kStep * R;
    }
  }
};

// V vectors of columns from vector `first`; as bf16_block in linear_bf16.h.
template <class Source, int R, int V>
ASCEND_INLINE void float_columns(const BlockWork &work, const float *x, const float *sums,
                                 int first, float *totals) {
  const char *weights = work.weights + first * (int64_t)sizeof(Vi);
  for (int64_t k = work.begin; k < work.end;) {
    const int64_t next = work.group_end(k), group = work.group_of(k);
    const int64_t steps = (next - k) / Source::kStep;
    FloatBlock<Source, R, V> block;
    block.run(x, weights, steps);
    x += (next - k) * R;
    weights += steps * kWordsBytes;
    ASCEND_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vf scale = work.scale(group, first + v);
      const bool shifted = sums && work.begins_group(k);
      const Vf zero = shifted ? work.zero(group, first + v) : Vf{};
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) {
        float *total = totals + r * kBlockColumns + (first + v) * kLanes;
        Vf product = block.acc[r][v];
        if (shifted) product -= zero * sums[group * R + r];
        store(total, load<Vf>(total) + product * scale);
      }
    }
    k = next;
  }
}

template <class Source, int R>
void float_block(const BlockWork &work, const void *panel, const float *sums, float *totals) {
  constexpr int kVectors = 2;
  const float *x = (const float *)panel + work.begin * R;
  for (int first = 0; first < kBlockColumns / kLanes; first += kVectors) {
    float_columns<Source, R, kVectors>(work, x, sums, first, totals);
  }
}

namespace detail {
template <class Source, int I>
ASCEND_INLINE void widen_words(const char *weights, float *out) {
  if constexpr (I < Source::kStep) {
    for (int v = 0; v < kBlockColumns / kLanes; ++v) {
      store(out + I * kBlockColumns + v * kLanes,
            Source::template widen<I>(load<Vi>(weights + v * sizeof(Vi))));
    }
    widen_words<Source, I + 1>(weights, out);
  }
}
}  // namespace detail

// `count` k of a block as floats, for TileFloats.
template <class Source>
void float_tile(const char *weights, int64_t count, void *out) {
  float *to = (float *)out;
  for (int64_t k = 0; k < count; k += Source::kStep, weights += kWordsBytes) {
    detail::widen_words<Source, 0>(weights, to);
    to += Source::kStep * kBlockColumns;
  }
}

}  // namespace ascend
