// Few query rows (decode, short verification): lanes run along head_dim, so each page row is read
// once, in order, and multiplied with R query rows held in registers or L1.
//
// query: [rows][head_dim]; out: [rows][head_dim]; scores: [group][token][R].
#pragma once

#include "element.h"
#include "state.h"

namespace ascend {

template <class E, int R>
struct Narrow {
  static constexpr int kGroupRows = R;
  static constexpr bool kIntegers = false;   // queries and weights become integers
  static constexpr int kBlock = kLanes / R;  // tokens per register block
  static constexpr int kVectors = R == 4 ? 2 : R == 2 ? 4 : 8;  // output vectors per pass over V

  static void pack_query(const Shape &shape, State &state, int row, const float *query) {
    memcpy(state.query + row * shape.head_dim, query, shape.head_dim * sizeof(float));
  }

  // Dot products of kBlock tokens x R rows = kLanes, reduced together into one vector.
  static ASCEND_INLINE Vf score_block(const Shape &shape, const Tile &tile, const float *query,
                                      int token) {
    Vf acc[kBlock * R] = {};
    for (int d = 0; d < shape.head_dim; d += kLanes) {
      Vf k[kBlock];
      ASCEND_UNROLL
      for (int t = 0; t < kBlock; ++t) {
        k[t] = load_columns<E>(tile.k, shape.plane_bytes, token + t, d);
      }
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vf q = load<Vf>(query + r * shape.head_dim + d);
        ASCEND_UNROLL
        for (int t = 0; t < kBlock; ++t) acc[t * R + r] += k[t] * q;
      }
    }
    return horizontal_sums(acc) * shape.scale;
  }

  static void prefetch_tokens(const Shape &shape, const char *run, int token, int count) {
    if (!run) return;
    const int planes = shape.head_dim / kColumns<E>;
    for (int p = 0; p < planes; ++p) {
      const char *row = run + p * shape.plane_bytes + token * kRowBytes;
      for (int b = 0; b < count * kRowBytes; b += 64) prefetch_l2(row + b);
    }
  }

  static void score(const Shape &shape, const Tile &tile, State &state) {
    const int count = (tile.last - tile.first) * R;
    for (int t = tile.first; t < tile.last; t += kBlock) {
      if (t % 4 == 0) prefetch_tokens(shape, tile.next_k, t, kBlock < 4 ? 4 : kBlock);
      for (int g = 0; g < state.groups; ++g) {
        const float *query = state.query + g * R * shape.head_dim;
        store(state.scores + g * count + (t - tile.first) * R, score_block(shape, tile, query, t));
      }
    }
  }

  template <int N>
  static ASCEND_INLINE void accumulate_columns(const Shape &shape, const Tile &tile, State &state,
                                               int group, int column) {
    const float *weights = state.scores + group * (tile.last - tile.first) * R;
    float *out = state.out + group * R * shape.head_dim + column;
    Vf acc[R][N];
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      const float decay = state.decay[group * kLanes + r];
      ASCEND_UNROLL
      for (int c = 0; c < N; ++c) {
        acc[r][c] = load<Vf>(out + r * shape.head_dim + c * kLanes) * decay;
      }
    }
    for (int t = tile.begin; t < tile.end; ++t) {
      const float *weight = weights + (t - tile.first) * R;
      Vf v[N];
      ASCEND_UNROLL
      for (int c = 0; c < N; ++c) {
        v[c] = load_columns<E>(tile.v, shape.plane_bytes, t, column + c * kLanes);
      }
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) {
        ASCEND_UNROLL
        for (int c = 0; c < N; ++c) acc[r][c] += v[c] * weight[r];
      }
    }
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      ASCEND_UNROLL
      for (int c = 0; c < N; ++c) store(out + r * shape.head_dim + c * kLanes, acc[r][c]);
    }
  }

  static void accumulate(const Shape &shape, const Tile &tile, State &state) {
    constexpr int kStep = kVectors * kLanes;
    int d = 0;
    for (; d + kStep <= shape.head_dim; d += kStep) {
      const int planes_done = d / kColumns<E>;
      if (tile.next_v) {
        for (int p = planes_done; p < (d + kStep) / kColumns<E>; ++p) {
          const char *row = tile.next_v + p * shape.plane_bytes;
          for (int t = tile.first; t < tile.last; t += 2) prefetch_l2(row + t * kRowBytes);
        }
      }
      for (int g = 0; g < state.groups; ++g) {
        accumulate_columns<kVectors>(shape, tile, state, g, d);
      }
    }
    for (; d < shape.head_dim; d += kLanes) {
      for (int g = 0; g < state.groups; ++g) accumulate_columns<1>(shape, tile, state, g, d);
    }
  }

  static void run_tile(const Shape &shape, const Tile &tile, State &state, bool alibi) {
    score(shape, tile, state);
    weigh<R>(shape, tile, state, alibi);
    accumulate(shape, tile, state);
  }

  static float row_sum(const State &state, int row) {
    const float *sum = state.sum + row / R * kLanes;
    float total = 0;
    for (int i = row % R; i < kLanes; i += R) total += sum[i];
    return total;
  }
  static float row_top(const State &state, int row) {
    return state.top[row / R * kLanes + row % R];
  }
  static void unpack_out(const Shape &shape, const State &state, int row, float factor,
                         float *out) {
    const float *from = state.out + row * shape.head_dim;
    for (int d = 0; d < shape.head_dim; ++d) out[d] = from[d] * factor;
  }
};

// Adds the values of `Count` planes of V to all rows. The next page is fetched once, by the first
// group.
template <class Kernel, int Count>
ASCEND_INLINE void accumulate_groups(const Shape &shape, const Tile &tile, State &state,
                                     int plane) {
  if (tile.next_v) {
    Kernel::template accumulate_planes<Count, true>(shape, tile, state, 0, plane);
  } else {
    Kernel::template accumulate_planes<Count, false>(shape, tile, state, 0, plane);
  }
  for (int g = 1; g < state.groups; ++g) {
    Kernel::template accumulate_planes<Count, false>(shape, tile, state, g, plane);
  }
}

// The same of all planes, in passes of Kernel::kPlanes.
template <class Kernel>
void accumulate_all(const Shape &shape, const Tile &tile, State &state, int planes) {
  int p = 0;
  for (; p + Kernel::kPlanes <= planes; p += Kernel::kPlanes) {
    accumulate_groups<Kernel, Kernel::kPlanes>(shape, tile, state, p);
  }
  for (; p < planes; ++p) accumulate_groups<Kernel, 1>(shape, tile, state, p);
}

}  // namespace ascend
