// Many query rows (prefill, longer verification): lanes run along the query rows, a K or V element
// is broadcast to all of them. Scores come out as [token][row], so softmax is vertical and nothing
// is ever reduced across lanes.
//
// The unit of work is 4 bytes: one float, or a pair of bfloat16 for vdpbf16ps. Either way a plane
// of K is [token][8 units], so one loop serves both; a Core says how to multiply units.
//
// query: [unit][group][kLanes]; out: [column][group][kLanes]; scores: [group][token][kLanes].
#pragma once

#include "narrow_bf16.h"

namespace ascend {

constexpr int kUnits = 8;  // units of a plane row

struct FloatCore {
  static constexpr int kPerUnit = 1;  // elements of head_dim in a unit of K
  static constexpr int kVUnits = 8;   // units of a V row
  static constexpr int kVTokens = 1;  // tokens of a V row
  static ASCEND_INLINE Vf madd(Vf acc, Vf a, Vf b) { return acc + a * b; }
  static ASCEND_INLINE Vf broadcast(const char *p) { return splat(load<float>(p)); }
  static const float *units(const float *q, int, float *) { return q; }
  static const char *weights(const State &state) { return (const char *)state.scores; }
  static void finish_weights(State &, int) {}
};

#if defined(__AVX512BF16__)
struct Bf16Core {
  static constexpr int kPerUnit = 2;
  static constexpr int kVUnits = 16;
  static constexpr int kVTokens = 2;
  static ASCEND_INLINE Vf madd(Vf acc, Vf a, Vf b) {
    return (Vf)dot_pairs((__m512)acc, (__m512i)a, (__m512i)b);
  }
  static ASCEND_INLINE Vf broadcast(const char *p) { return (Vf)broadcast_pair(p); }
  // Pairs of bfloat16, rounded aside.
  static const float *units(const float *q, int dim, float *out) {
    for (int d = 0; d < dim; d += 16) {
      const __m256i pairs = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(q + d));
      _mm256_storeu_si256((__m256i *)(out + d / 2), pairs);
    }
    return out;
  }
  static const char *weights(const State &state) { return (const char *)state.weights; }
  static void finish_weights(State &state, int count) {
    round_weights<16>(state.scores, count, state.weights);
  }
};
#endif

// Rows of units: the page itself where it already has the Core's units, else a staged copy.
struct Operand {
  const char *base;  // of the tile's first token
  int64_t plane_bytes;
};

// kLanes columns from `column` on into a row of float NZ, planes of kUnits columns `plane` floats
// apart.
ASCEND_INLINE void store_columns(float *row, int64_t plane, int column, Vf x) {
  float *out = row + column / kUnits * plane;
  if constexpr (kLanes == 16) {
    memcpy(out, &x, 32);
    memcpy(out + plane, (const char *)&x + 32, 32);
  } else {
    store(out + column % kUnits, x);
  }
}

// Widen tokens [begin, end) of an NZ run into float NZ (planes of 8 columns).
template <class E>
Operand stage_floats(const Shape &shape, const Tile &tile, const char *run, float *stage) {
  constexpr int64_t kPlane = kTileTokens * kUnits;  // floats
  for (int d = 0; d < shape.head_dim; d += kLanes) {
    for (int t = tile.begin; t < tile.end; ++t) {
      const Vf x = load_columns<E>(run, shape.plane_bytes, t, d);
      store_columns(stage + (t - tile.first) * kUnits, kPlane, d, x);
    }
  }
  return {(const char *)stage, kPlane * 4};
}

template <class E>
struct FloatSource {
  using Core = FloatCore;
  static constexpr bool kInt8 = false;
  static Operand stage(const Shape &shape, const Tile &tile, const char *run, float *stage) {
    if constexpr (sizeof(typename E::Storage) == 4) {
      return {run + tile.first * kRowBytes, shape.plane_bytes};
    } else {
      return stage_floats<E>(shape, tile, run, stage);
    }
  }
  static Operand keys(const Shape &shape, const Tile &tile, State &state) {
    return stage(shape, tile, tile.k, state.k_stage);
  }
  static Operand values(const Shape &shape, const Tile &tile, State &state) {
    return stage(shape, tile, tile.v, state.v_stage);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Source {
  using Core = Bf16Core;
  static constexpr bool kInt8 = false;
  static Operand keys(const Shape &shape, const Tile &tile, State &) {
    return {tile.k + tile.first * kRowBytes, shape.plane_bytes};
  }
  // Two token rows of 16 columns -> 16 pairs; tokens outside [begin, end) become 0.
  static Operand values(const Shape &shape, const Tile &tile, State &state) {
    constexpr int64_t kPlane = kTileTokens * kRowBytes;
    const __m512i interleave = _mm512_load_si512(kPairTables.interleave);
    for (int p = 0; p < shape.head_dim / 16; ++p) {
      const char *from = tile.v + p * shape.plane_bytes;
      char *to = (char *)state.v_stage + p * kPlane;
      for (int t = tile.begin & ~1; t < tile.end; t += 2) {
        const int mask = (t < tile.begin ? 0xff00 : 0xffff) & (t + 1 < tile.end ? 0xffff : 0x00ff);
        const __m512i rows = _mm512_maskz_loadu_epi32((__mmask16)mask, from + t * kRowBytes);
        _mm512_store_si512(to + (t - tile.first) * kRowBytes,
                           _mm512_permutexvar_epi16(interleave, rows));
      }
    }
    return {(const char *)state.v_stage, kPlane};
  }
};
#endif

template <class E, class Source>
struct Wide {
  using Core = typename Source::Core;
  static constexpr int kGroupRows = kLanes;
  static constexpr bool kIntegers = false;
  static constexpr int kBlockGroups = 3;               // groups of rows in registers
  static constexpr int kBlock = kLanes == 16 ? 8 : 4;  // tokens, or columns, in registers
  // The same where there is only one group of rows.
  static constexpr int kLoneTokens = 2 * kBlock;
  static constexpr int kLoneColumns = 2 * kBlock < Core::kVUnits ? 2 * kBlock : Core::kVUnits;

  static void pack_query(const Shape &shape, State &state, int row, const float *query) {
    float *out = state.query + row / kLanes * kLanes + row % kLanes;
    const int stride = state.groups * kLanes, count = shape.head_dim / Core::kPerUnit;
    alignas(64) float aside[kMaxKeyDim];
    const float *units = Core::units(query, shape.head_dim, aside);
    for (int u = 0; u < count; ++u, out += stride) *out = units[u];
  }

  // acc[group][i] += left[group] * broadcast(right[i]) over `units` of 4 bytes.
  template <int N, int kTokens = kBlock>
  static ASCEND_INLINE void score_block(const Shape &shape, const Operand &k, State &state,
                                        int group, int token, int tokens, float *all_scores) {
    Vf acc[N][kTokens] = {};
    const int stride = state.groups * kLanes;
    const float *query = state.query + group * kLanes;
    const char *row = k.base + token * kRowBytes;
    const int planes = shape.head_dim / Core::kPerUnit / kUnits;
    for (int p = 0; p < planes; ++p, row += k.plane_bytes) {
      ASCEND_UNROLL
      for (int u = 0; u < kUnits; ++u, query += stride) {
        Vf q[N];
        ASCEND_UNROLL
        for (int g = 0; g < N; ++g) q[g] = load<Vf>(query + g * kLanes);
        ASCEND_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const Vf b = Core::broadcast(row + t * kRowBytes + u * 4);
          ASCEND_UNROLL
          for (int g = 0; g < N; ++g) acc[g][t] = Core::madd(acc[g][t], q[g], b);
        }
      }
    }
    ASCEND_UNROLL
    for (int g = 0; g < N; ++g) {
      float *scores = all_scores + ((group + g) * tokens + token) * kLanes;
      ASCEND_UNROLL
      for (int t = 0; t < kTokens; ++t) store(scores + t * kLanes, acc[g][t] * shape.scale);
    }
  }

  static void prefetch_tokens(const Shape &shape, const char *run, int token) {
    if (!run) return;
    for (int p = 0; p * kColumns<E> < shape.head_dim; ++p) {
      const char *row = run + p * shape.plane_bytes + token * kRowBytes;
      for (int b = 0; b < kBlock * kRowBytes; b += 64) prefetch_l2(row + b);
    }
  }

  // Scores of kBlock rows of `k`, of `tokens` in all, for every group.
  static ASCEND_INLINE void score_groups(const Shape &shape, const Operand &k, State &state,
                                         int token, int tokens, float *scores) {
    int g = 0;
    for (; g + 3 <= state.groups; g += 3) score_block<3>(shape, k, state, g, token, tokens, scores);
    if (state.groups - g == 2) score_block<2>(shape, k, state, g, token, tokens, scores);
    if (state.groups - g == 1) score_block<1>(shape, k, state, g, token, tokens, scores);
  }

  static void score(const Shape &shape, const Tile &tile, State &state) {
    const Operand k = Source::keys(shape, tile, state);
    const int tokens = tile.last - tile.first;
    for (int t = 0; t < tokens; t += kBlock) {
      prefetch_tokens(shape, tile.next_k, tile.first + t);
      prefetch_tokens(shape, tile.next_v, tile.first + t);
      if (state.groups > 1) {
        score_groups(shape, k, state, t, tokens, state.scores);
      } else if (t % kLoneTokens == 0) {
        score_block<1, kLoneTokens>(shape, k, state, 0, t, tokens, state.scores);
      }
    }
  }

  // kCount columns of the output of N groups, over all steps (rows of V) of the tile.
  template <int N, int kCount = kBlock>
  static ASCEND_INLINE void accumulate_block(const Tile &tile, const Operand &v, State &state,
                                             int group, int column) {
    const int stride = state.groups * kLanes;
    float *out = state.out + column * stride + group * kLanes;
    Vf acc[N][kCount];
    ASCEND_UNROLL
    for (int g = 0; g < N; ++g) {
      const Vf decay = load<Vf>(state.decay + (group + g) * kLanes);
      ASCEND_UNROLL
      for (int c = 0; c < kCount; ++c) {
        acc[g][c] = load<Vf>(out + c * stride + g * kLanes) * decay;
      }
    }
    constexpr int kVBytes = Core::kVUnits * 4, kStep = Core::kVTokens;
    const int steps = (tile.last - tile.first) / kStep;
    const int from = (tile.begin - tile.first) / kStep;
    const int to = (tile.end - tile.first + kStep - 1) / kStep;
    const char *weights = Core::weights(state) + (group * steps) * (int64_t)sizeof(Vf);
    const char *row = v.base + column / Core::kVUnits * v.plane_bytes + column % Core::kVUnits * 4 +
                      from * kVBytes;
    for (int s = from; s < to; ++s, row += kVBytes) {
      Vf w[N];
      ASCEND_UNROLL
      for (int g = 0; g < N; ++g) w[g] = load<Vf>(weights + (g * steps + s) * sizeof(Vf));
      ASCEND_UNROLL
      for (int c = 0; c < kCount; ++c) {
        const Vf b = Core::broadcast(row + c * 4);
        ASCEND_UNROLL
        for (int g = 0; g < N; ++g) acc[g][c] = Core::madd(acc[g][c], w[g], b);
      }
    }
    ASCEND_UNROLL
    for (int g = 0; g < N; ++g) {
      ASCEND_UNROLL
      for (int c = 0; c < kCount; ++c) store(out + c * stride + g * kLanes, acc[g][c]);
    }
  }

  static void accumulate(const Shape &shape, const Tile &tile, State &state) {
    const Operand v = Source::values(shape, tile, state);
    if (state.groups == 1) {
      for (int d = 0; d < shape.head_dim; d += kLoneColumns) {
        accumulate_block<1, kLoneColumns>(tile, v, state, 0, d);
      }
      return;
    }
    for (int d = 0; d < shape.head_dim; d += kBlock) {
      int g = 0;
      for (; g + 3 <= state.groups; g += 3) accumulate_block<3>(tile, v, state, g, d);
      if (state.groups - g == 2) accumulate_block<2>(tile, v, state, g, d);
      if (state.groups - g == 1) accumulate_block<1>(tile, v, state, g, d);
    }
  }

  static void run_tile(const Shape &shape, const Tile &tile, State &state, bool alibi) {
    score(shape, tile, state);
    weigh<kLanes>(shape, tile, state, alibi);
    Core::finish_weights(state, state.groups * (tile.last - tile.first) * kLanes);
    accumulate(shape, tile, state);
  }

  static float row_sum(const State &state, int row) { return state.sum[row]; }
  static float row_top(const State &state, int row) { return state.top[row]; }
  static void unpack_out(const Shape &shape, const State &state, int row, float factor,
                         float *out) {
    const int stride = state.groups * kLanes;
    for (int d = 0; d < shape.head_dim; ++d) out[d] = state.out[d * stride + row] * factor;
  }
};

}  // namespace ascend
