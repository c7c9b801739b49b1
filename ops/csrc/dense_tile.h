// One tile of a dense layer: some rows of x by some rows of weights, both read along k.
#pragma once

#include <utility>

#include "element.h"

namespace ascend {

// Rows of weights and of x of a tile. With 32 registers 24 hold sums, and what is loaded serves 4
// or 6 products; with 16 registers 8 do.
constexpr int kTileColumns = 4;
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif

// How elements along k enter sums: widened to floats, on any instruction set.
template <class E>
struct WideLanes {
  using Element = E;
  using Storage = typename E::Storage;
  using Vector = Vf;
  static constexpr int kDepth = kLanes;  // k of a vector

  static ASCEND_INLINE Vector load(const Storage *p) {
    if constexpr (sizeof(Storage) == 4) {
      return ascend::load<Vf>(p);
    } else {
      return E::widen(ascend::load<Vh>(p));
    }
  }
  // `count` elements, then zeros. Never reads beyond them: they may end a page.
  static ASCEND_INLINE Vector load_tail(const Storage *p, int count) {
    Storage padded[kDepth] = {};
    memcpy(padded, p, count * sizeof(Storage));
    return load(padded);
  }
  static ASCEND_INLINE Vf add_products(Vf sums, Vector a, Vector b) { return sums + a * b; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16.
struct PairLanes {
  using Element = Bfloat16;
  using Storage = uint16_t;
  using Vector = __m512i;
  static constexpr int kDepth = 32;

  static ASCEND_INLINE Vector load(const Storage *p) { return _mm512_loadu_si512(p); }
  static ASCEND_INLINE Vector load_tail(const Storage *p, int count) {
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static ASCEND_INLINE Vf add_products(Vf sums, Vector a, Vector b) {
    return (Vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
  }
};
using Bfloat16Lanes = PairLanes;
#else
using Bfloat16Lanes = WideLanes<Bfloat16>;
#endif

struct DenseTile {
  int64_t row, column;  // first ones of x and of weights
  int64_t ahead;        // bytes from these weights to those that the thread needs next
  int pass, passes;     // of the passes over these weights, each fetches a part of the next ones
};

namespace detail {

template <class Lanes, int W, int R>
ASCEND_INLINE void add_step(Vf *sums, const typename Lanes::Vector *w,
                            const typename Lanes::Vector *x) {
  ASCEND_UNROLL
  for (int r = 0; r < R; ++r) {
    ASCEND_UNROLL
    for (int i = 0; i < W; ++i) {
      sums[r * W + i] = Lanes::add_products(sums[r * W + i], w[i], x[r]);
    }
  }
}

// sums: [R][W] vectors.
template <class Lanes, int W, int R>
ASCEND_INLINE void add_rows(const ascend_dense_args &a, const DenseTile &tile, Vf *sums) {
  using Storage = typename Lanes::Storage;
  const auto *weights = (const Storage *)a.weights + tile.column * a.weight_stride;
  const auto *rows = (const Storage *)a.x + tile.row * a.x_stride;
  typename Lanes::Vector w[W], x[R];
  int countdown = tile.pass;
  int64_t k = 0;
  for (; k + Lanes::kDepth <= a.k; k += Lanes::kDepth) {
    if (countdown-- == 0) {
      countdown = tile.passes - 1;
      ASCEND_UNROLL
      for (int i = 0; i < W; ++i) {
        prefetch_l2((const char *)(weights + i * a.weight_stride + k) + tile.ahead);
      }
    }
    ASCEND_UNROLL
    for (int i = 0; i < W; ++i) w[i] = Lanes::load(weights + i * a.weight_stride + k);
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) x[r] = Lanes::load(rows + r * a.x_stride + k);
    add_step<Lanes, W, R>(sums, w, x);
  }
  if (k == a.k) return;
  const int count = (int)(a.k - k);
  ASCEND_UNROLL
  for (int i = 0; i < W; ++i) w[i] = Lanes::load_tail(weights + i * a.weight_stride + k, count);
  ASCEND_UNROLL
  for (int r = 0; r < R; ++r) x[r] = Lanes::load_tail(rows + r * a.x_stride + k, count);
  add_step<Lanes, W, R>(sums, w, x);
}

}  // namespace detail

// Rows [row, row + R) of x by weights [column, column + W), with bias, rounded to `out`.
template <class Lanes, int W, int R>
void dense_tile(const ascend_dense_args &a, const DenseTile &tile) {
  using E = typename Lanes::Element;
  constexpr int kSums = (W * R + kLanes - 1) / kLanes * kLanes;
  Vf sums[kSums] = {};
  detail::add_rows<Lanes, W, R>(a, tile, sums);
  float totals[kSums], addends[kSums] = {};
  ASCEND_UNROLL
  for (int i = 0; i < kSums; i += kLanes) store(totals + i, horizontal_sums(sums + i));
  if (a.bias) {
    const auto *bias = (const typename E::Storage *)a.bias + tile.column;
    for (int i = 0; i < W; ++i) addends[i] = E::widen(bias[i]);
    for (int r = 1; r < R; ++r) memcpy(addends + r * W, addends, sizeof(float) * W);
  }
  typename E::Storage rounded[kSums];  // all in one loop, which the compiler makes vectors of
  for (int i = 0; i < kSums; ++i) rounded[i] = E::round(totals[i] + addends[i]);
  auto *out = (typename E::Storage *)a.out + tile.row * a.out_stride + tile.column;
  for (int r = 0; r < R; ++r) memcpy(out + r * a.out_stride, rounded + r * W, sizeof(*out) * W);
}

using DenseTileFunction = void (*)(const ascend_dense_args &, const DenseTile &);

// Functions for 1 to kTileRows rows of x.
struct DenseTiles {
  DenseTileFunction by_rows[kTileRows];
};

namespace detail {
template <class Lanes, int W, size_t... I>
constexpr DenseTiles dense_tiles(std::index_sequence<I...>) {
  return {{dense_tile<Lanes, W, (int)I + 1>...}};
}
}  // namespace detail

template <class Lanes, int W>
constexpr DenseTiles kDenseTiles =
    detail::dense_tiles<Lanes, W>(std::make_index_sequence<kTileRows>{});

}  // namespace ascend
