// The narrow kernel for bfloat16 pages with AVX512-BF16. A 64-byte load is two tokens x 16 columns
// of NZ, the operand of one vdpbf16ps: 2 bytes per multiply, no conversion.
//
// query: [row][head_dim / 16][2][16] bfloat16 (each 32-byte piece twice, once per token).
#pragma once

#include "narrow.h"

#if defined(__AVX512BF16__)

namespace ascend {

struct PairTables {
  alignas(64) uint16_t interleave[32];  // two rows of 16 columns -> 16 column pairs
  constexpr PairTables() : interleave() {
    for (int i = 0; i < 32; ++i) interleave[i] = (uint16_t)(i % 2 * 16 + i / 2);
  }
};
constexpr PairTables kPairTables;

// Score lanes out of the reduction tree -> [token][R]; weights [token][R] -> [token / 2][R][2].
template <int R>
struct GroupTables {
  alignas(64) int32_t order[16];
  alignas(64) uint16_t pairs[32];
  constexpr GroupTables() : order(), pairs() {
    for (int o = 0; o < 16; ++o) {
      const int token = o / R % 16, acc = token / 2 * R + o % R;
      order[o] = (acc / 4 * 2 + token % 2) * 4 + acc % 4;
    }
    for (int o = 0; o < 32; ++o) {
      const int pair = o / (2 * R), row = o % (2 * R) / 2;
      pairs[o] = (uint16_t)((2 * pair + o % 2) * R + row);
    }
  }
};
template <int R>
constexpr GroupTables<R> kGroupTables;

ASCEND_INLINE __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
ASCEND_INLINE __m512i broadcast_pair(const void *p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

// weights [token][R] float -> [token / 2][R][2] bfloat16.
template <int R>
void round_weights(const float *weights, int count, uint16_t *out) {
  const __m512i table = _mm512_load_si512(kGroupTables<R>.pairs);
  if constexpr (R == 16) {
    for (int i = 0; i < count; i += 32) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(weights + i + 16),
                                                        _mm512_loadu_ps(weights + i));
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(table, both));
    }
  } else {
    for (int i = 0; i < count; i += 16) {
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights + i));
      _mm256_storeu_si256((__m256i *)(out + i),
                          _mm256_permutexvar_epi16(_mm512_castsi512_si256(table), half));
    }
  }
}

ASCEND_INLINE __m512 fold32(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
ASCEND_INLINE __m512 fold64(__m512 a, __m512 b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
// Eight accumulators, each two tokens x 8 partial sums -> 16 scores (lane order: GroupTables).
ASCEND_INLINE __m512 fold_eight(const __m512 *a) {
  const __m512 x = fold64(fold32(a[0], a[1]), fold32(a[2], a[3]));
  const __m512 y = fold64(fold32(a[4], a[5]), fold32(a[6], a[7]));
  return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
}

template <int R>
struct NarrowBf16 : Narrow<Bfloat16, R> {
  static constexpr int kPairs = R == 4 ? 4 : 8;                // token pairs per register block
  static constexpr int kPlanes = R == 4 ? 2 : R == 2 ? 4 : 8;  // V planes per pass

  static void pack_query(const Shape &shape, State &state, int row, const float *query) {
    uint16_t *out = (uint16_t *)state.query + row * shape.head_dim * 2;
    for (int d = 0; d < shape.head_dim; d += 16, out += 32) {
      const __m256i q = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(query + d));
      _mm512_storeu_si512(out, _mm512_broadcast_i64x4(q));
    }
  }

  template <bool kPrefetch>
  static ASCEND_INLINE void score_block(const Shape &shape, const Tile &tile, const uint16_t *query,
                                        int token, float *scores) {
    __m512 acc[kPairs * R];
    ASCEND_UNROLL
    for (int i = 0; i < kPairs * R; ++i) acc[i] = _mm512_setzero_ps();
    const int planes = shape.head_dim / 16;
    const char *row = tile.k + token * kRowBytes, *next = tile.next_k + token * kRowBytes;
    for (int p = 0; p < planes; ++p, row += shape.plane_bytes, next += shape.plane_bytes) {
      __m512i k[kPairs];
      ASCEND_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        k[i] = _mm512_loadu_si512(row + i * 64);
        if constexpr (kPrefetch) prefetch_l2(next + i * 64);
      }
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512i q = _mm512_load_si512(query + (r * planes + p) * 32);
        ASCEND_UNROLL
        for (int i = 0; i < kPairs; ++i) acc[i * R + r] = dot_pairs(acc[i * R + r], k[i], q);
      }
    }
    const __m512i order = _mm512_load_si512(kGroupTables<R>.order);
    ASCEND_UNROLL
    for (int i = 0; i < kPairs * R / 8; ++i) {
      __m512 s = fold_eight(acc + 8 * i);
      if constexpr (R != 4) s = _mm512_permutexvar_ps(order, s);
      _mm512_storeu_ps(scores + 16 * i, _mm512_mul_ps(s, _mm512_set1_ps(shape.scale)));
    }
  }

  static void score(const Shape &shape, const Tile &tile, State &state) {
    const int count = (tile.last - tile.first) * R;
    for (int t = tile.first; t < tile.last; t += 2 * kPairs) {
      float *scores = state.scores + (t - tile.first) * R;
      const uint16_t *query = (const uint16_t *)state.query;
      if (tile.next_k) {
        score_block<true>(shape, tile, query, t, scores);
      } else {
        score_block<false>(shape, tile, query, t, scores);
      }
      for (int g = 1; g < state.groups; ++g) {
        score_block<false>(shape, tile, query + g * R * shape.head_dim * 2, t, scores + g * count);
      }
    }
  }

  // Columns of N planes, 2 tokens at a time. Edge pairs load with a mask: a weight of 0 does not
  // cancel a NaN in a slot nobody wrote.
  template <int N, bool kPrefetch>
  static ASCEND_INLINE void accumulate_planes(const Shape &shape, const Tile &tile, State &state,
                                              int group, int plane) {
    const uint16_t *weights = state.weights + group * (tile.last - tile.first) * R;
    float *out = state.out + group * R * shape.head_dim + plane * 16;
    const char *base = tile.v + plane * shape.plane_bytes;
    const char *next = tile.next_v + plane * shape.plane_bytes;
    const __m512i interleave = _mm512_load_si512(kPairTables.interleave);
    __m512 acc[R][N];
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512 decay = _mm512_set1_ps(state.decay[group * kLanes + r]);
      ASCEND_UNROLL
      for (int c = 0; c < N; ++c) {
        acc[r][c] = _mm512_mul_ps(decay, _mm512_loadu_ps(out + r * shape.head_dim + c * 16));
      }
    }
    const auto step = [&](int t, __mmask16 mask) __attribute__((always_inline)) {
      __m512i v[N];
      ASCEND_UNROLL
      for (int c = 0; c < N; ++c) {
        const int64_t at = c * shape.plane_bytes + t * kRowBytes;
        v[c] = _mm512_permutexvar_epi16(interleave, _mm512_maskz_loadu_epi32(mask, base + at));
        if constexpr (kPrefetch) prefetch_l2(next + at);
      }
      const uint16_t *weight = weights + (t - tile.first) * R;
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512i w = broadcast_pair(weight + 2 * r);
        ASCEND_UNROLL
        for (int c = 0; c < N; ++c) acc[r][c] = dot_pairs(acc[r][c], w, v[c]);
      }
    };
    int t = tile.begin;
    if (t % 2) step(t - 1, 0xff00), ++t;
    for (; t + 1 < tile.end; t += 2) step(t, 0xffff);
    if (t < tile.end) step(t, 0x00ff);
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      ASCEND_UNROLL
      for (int c = 0; c < N; ++c) _mm512_storeu_ps(out + r * shape.head_dim + c * 16, acc[r][c]);
    }
  }

  static void run_tile(const Shape &shape, const Tile &tile, State &state, bool alibi) {
    score(shape, tile, state);
    weigh<R>(shape, tile, state, alibi);
    round_weights<R>(state.scores, state.groups * (tile.last - tile.first) * R, state.weights);
    accumulate_all<NarrowBf16>(shape, tile, state, shape.head_dim / 16);
  }
};

}  // namespace ascend

#endif  // __AVX512BF16__
