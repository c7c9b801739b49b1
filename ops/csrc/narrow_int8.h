// The narrow kernel for int8 pages with AVX512-VNNI. Queries and weights become integers as well:
// 16 bits in two 8-bit halves (exact: the error is invisible beside that of the page), or 8 bits.
//
// vpdpbusd multiplies unsigned by signed bytes. Scores: K xor 0x80 is unsigned, and 128 times the
// sum of the query is subtracted after the reduction. Values: weights are unsigned, V is signed.
//
// query: [row][column group][2: high, low][64] (each 32-byte piece twice, once per token);
// weights: [2: high, low][group][token / 4][R][4].
#pragma once

#include <math.h>

#include "narrow_bf16.h"
#include "patches.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)

namespace ascend {

// Two 64-byte pieces of V, 4 tokens x 32 columns -> 16 columns x 4 tokens, for columns 0 and 16.
// Weights: lane (token, row) -> byte [token / 4][row][token % 4].
struct QuadTables {
  alignas(64) uint8_t columns[2][64];
  constexpr QuadTables() : columns() {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 64; ++i) {
        const int column = half * 16 + i / 4, token = i % 4;
        columns[half][i] = (uint8_t)(token / 2 * 64 + token % 2 * 32 + column);
      }
    }
  }
};
constexpr QuadTables kQuadTables;

template <int R>
struct WeightTable {
  alignas(16) uint8_t bytes[16];
  constexpr WeightTable() : bytes() {
    for (int o = 0; o < 16; ++o) {
      const int quad = o / (4 * R), row = o % (4 * R) / 4, token = o % 4;
      bytes[o] = (uint8_t)((quad * 4 + token) * R + row);
    }
  }
};
template <int R>
constexpr WeightTable<R> kWeightTable;

ASCEND_INLINE __m512i fold32(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
ASCEND_INLINE __m512i fold64(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
ASCEND_INLINE __m512i fold_eight(const __m512i *a) {
  const __m512i x = fold64(fold32(a[0], a[1]), fold32(a[2], a[3]));
  const __m512i y = fold64(fold32(a[4], a[5]), fold32(a[6], a[7]));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xDD));
}

ASCEND_INLINE int32_t sum_of_lanes(__m256i v) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  x = _mm_add_epi32(x, _mm_unpackhi_epi64(x, x));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 1)));
}

// Scales of 16 / R tokens, each for R rows. Reads no byte beyond them.
template <int R>
ASCEND_INLINE __m512 spread_scales(const float *scales) {
  const __m512 packed = _mm512_maskz_loadu_ps((__mmask16)((1u << (16 / R)) - 1), scales);
  return _mm512_permutexvar_ps((__m512i)lane_tokens<R>(), packed);
}

template <int R, bool kExact, bool kTokenScales>
struct NarrowInt8 : Narrow<Float32, R> {
  static constexpr bool kIntegers = true;
  static constexpr int kPairs = R == 4 ? 4 : 8;  // token pairs per register block
  static constexpr int kPlanes = 4 / R;          // V column groups per pass
  static constexpr int kParts = kExact ? 2 : 1;  // bytes of an integer
  static constexpr int64_t kWeightBytes = kMaxRows * kTileTokens;

  static void pack_query(const Shape &shape, State &state, int row, const float *query) {
    constexpr float kLimit = kExact ? 32512.0f : 127.0f;  // high half at most 127
    float top = 0, poison = 0;
    for (int d = 0; d < shape.head_dim; ++d) {
      top = std::max(top, fabsf(query[d]));
      poison += query[d] * 0.0f;  // NaN if anything is not finite
    }
    const float inverse = top >= 0x1p-100f && top < 0x1p120f ? kLimit / top : 0.0f;
    int8_t *out = (int8_t *)state.query + (int64_t)row * shape.planes32() * 128;
    uint32_t sum = 0;
    for (int d = 0; d < shape.head_dim; ++d) {
      const int value = (int)lrintf(query[d] * inverse);
      const int low = kExact ? (int8_t)value : 0;
      int8_t *at = out + d / 32 * 128 + d % 32;
      at[0] = at[32] = (int8_t)(kExact ? (value - low) >> 8 : value);
      at[64] = at[96] = (int8_t)low;
      sum += (uint32_t)value;
    }
    for (int i = row % R; i < kLanes; i += R) {
      state.query_bias[row / R * kLanes + i] = (int32_t)(128 * sum);
      state.query_unit[row / R * kLanes + i] = top / kLimit * shape.scale + poison;
    }
  }

  // Scores of 2 * kPairs tokens from `token` on, for the R rows of a group.
  template <bool kPrefetch>
  static ASCEND_INLINE void score_block(const Shape &shape, const State &state, const char *k,
                                        int64_t plane_bytes, const char *next, const float *scales,
                                        int group, float *scores) {
    __m512i acc[kPairs * R];
    ASCEND_UNROLL
    for (int i = 0; i < kPairs * R; ++i) acc[i] = _mm512_setzero_si512();
    const int planes = shape.planes32();
    const int8_t *query = (const int8_t *)state.query + (int64_t)group * R * planes * 128;
    ASCEND_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if (part == 1) {
        ASCEND_UNROLL
        for (int i = 0; i < kPairs * R; ++i) acc[i] = _mm512_slli_epi32(acc[i], 8);
      }
      for (int p = 0; p < planes; ++p) {
        __m512i rows[kPairs];
        ASCEND_UNROLL
        for (int i = 0; i < kPairs; ++i) {
          rows[i] = _mm512_xor_si512(_mm512_loadu_si512(k + p * plane_bytes + i * 64),
                                     _mm512_set1_epi8((char)0x80));
          if (kPrefetch && part == 0) prefetch_l2(next + p * plane_bytes + i * 64);
        }
        ASCEND_UNROLL
        for (int r = 0; r < R; ++r) {
          const __m512i q = _mm512_load_si512(query + (r * planes + p) * 128 + part * 64);
          ASCEND_UNROLL
          for (int i = 0; i < kPairs; ++i) {
            acc[i * R + r] = _mm512_dpbusd_epi32(acc[i * R + r], rows[i], q);
          }
        }
      }
    }
    const __m512i order = _mm512_load_si512(kGroupTables<R>.order);
    const __m512i bias = _mm512_load_si512(state.query_bias + group * kLanes);
    const __m512 unit = _mm512_load_ps(state.query_unit + group * kLanes);
    ASCEND_UNROLL
    for (int i = 0; i < kPairs * R / 8; ++i) {
      __m512i sums = fold_eight(acc + 8 * i);
      if constexpr (R != 4) sums = _mm512_permutexvar_epi32(order, sums);
      __m512 s = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, bias)), unit);
      if (kTokenScales && scales) s = _mm512_mul_ps(s, spread_scales<R>(scales + i * (16 / R)));
      _mm512_storeu_ps(scores + 16 * i, s);
    }
  }

  static void score(const Shape &shape, const Tile &tile, State &state) {
    const int count = (tile.last - tile.first) * R;
    for (int t = tile.first; t < tile.last; t += 2 * kPairs) {
      float *scores = state.scores + (t - tile.first) * R;
      const char *k = tile.k + t * kRowBytes, *next = tile.next_k + t * kRowBytes;
      const float *scales = kTokenScales ? tile.k_scales + t : nullptr;
      if (tile.next_k) {
        score_block<true>(shape, state, k, shape.plane_bytes, next, scales, 0, scores);
      } else {
        score_block<false>(shape, state, k, shape.plane_bytes, nullptr, scales, 0, scores);
      }
      for (int g = 1; g < state.groups; ++g) {
        score_block<false>(shape, state, k, shape.plane_bytes, nullptr, scales, g,
                           scores + g * count);
      }
    }
  }

  // Products of 32 columns of a patch, plus 128, with the R rows of a group.
  static ASCEND_INLINE void add_patch_products(const int8_t *query, int planes, __m256i columns,
                                               __m256i (&sums)[kParts][R]) {
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      ASCEND_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const int8_t *at = query + r * planes * 128 + part * 64;
        sums[part][r] =
            _mm256_dpbusd_epi32(sums[part][r], columns, _mm256_load_si256((const __m256i *)at));
      }
    }
  }

  // Adds what a patch of K contributes to its token's scores.
  static ASCEND_INLINE void score_patch(const Shape &shape, const State &state, const Patch &patch,
                                        const int8_t *values, int group, float *scores) {
    const int planes = shape.planes32();
    const int8_t *query = (const int8_t *)state.query + (int64_t)group * R * planes * 128;
    __m256i sums[kParts][R];
    ASCEND_UNROLL
    for (int i = 0; i < kParts * R; ++i) (&sums[0][0])[i] = _mm256_setzero_si256();
    for (int p = 0; p < planes; ++p) {
      const __m256i columns = _mm256_xor_si256(_mm256_load_si256((const __m256i *)values + p),
                                               _mm256_set1_epi8((char)0x80));
      add_patch_products(query + p * 128, planes, columns, sums);
    }
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      __m256i sum = sums[0][r];
      if constexpr (kExact) sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 8), sums[1][r]);
      const int at = group * kLanes + r;
      const int32_t product = sum_of_lanes(sum) - state.query_bias[at];
      scores[r] += (float)product * state.query_unit[at] * patch.scale;
    }
  }

  static void patch_scores(const Shape &shape, const Tile &tile, State &state) {
    Patch patches[kMaxPatchSlots];
    const int found = find_patches(shape, tile.k_patches, tile.begin, tile.end, patches);
    const int count = (tile.last - tile.first) * R;
    alignas(64) int8_t values[kMaxHeadDim];
    for (int i = 0; i < found; ++i) {
      decode_patch(shape, patches[i].codes, values);
      float *scores = state.scores + (patches[i].token - tile.first) * R;
      for (int g = 0; g < state.groups; ++g) {
        score_patch(shape, state, patches[i], values, g, scores + g * count);
      }
    }
  }

  // Float weights of a group times their tokens' scales, as integers relative to the greatest.
  static void quantise_weights(const Tile &tile, State &state, int group) {
    constexpr float kLimit = kExact ? 65535.0f : 255.0f;
    const int count = (tile.last - tile.first) * R;
    float *weights = state.scores + group * count;
    __m512 top = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) {
      __m512 w = _mm512_load_ps(weights + i);
      if constexpr (kTokenScales) {
        // A token nobody sees has weight 0; its scale may be anything.
        const __mmask16 seen = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        w = _mm512_maskz_mul_ps(seen, w, spread_scales<R>(tile.v_scales + tile.first + i / R));
        _mm512_store_ps(weights + i, w);
      }
      top = _mm512_max_ps(top, w);
      poison = _mm512_fmadd_ps(w, _mm512_setzero_ps(), poison);  // NaN if a weight is
    }
    top = (__m512)max_over_tokens<R>((Vf)_mm512_max_ps(top, _mm512_set1_ps(1e-30f)));
    poison = (__m512)sum_over_tokens<R>((Vf)poison);
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(kLimit), top);
    _mm512_store_ps(state.weight_unit + group * kLanes,
                    _mm512_add_ps(_mm512_mul_ps(top, _mm512_set1_ps(1.0f / kLimit)), poison));
    const __m128i table = _mm_load_si128((const __m128i *)kWeightTable<R>.bytes);
    uint8_t *high = (uint8_t *)state.weights + group * count, *low = high + kWeightBytes;
    for (int i = 0; i < count; i += 16) {
      __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(weights + i), inverse));
      v = _mm512_min_epi32(v, _mm512_set1_epi32((int)kLimit));
      if constexpr (kExact) {
        const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(v), table);
        _mm_storeu_si128((__m128i *)(low + i), bytes);
        v = _mm512_srli_epi32(v, 8);
      }
      const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(v), table);
      _mm_storeu_si128((__m128i *)(high + i), bytes);
    }
  }

  // Columns of N column groups, 4 tokens at a time. Weights of tokens out of sight are 0.
  template <int N, bool kPrefetch>
  static ASCEND_INLINE void accumulate_planes(const Shape &shape, const Tile &tile, State &state,
                                              int group, int plane) {
    const uint8_t *weights = (const uint8_t *)state.weights + group * (tile.last - tile.first) * R;
    const char *base = tile.v + plane * shape.plane_bytes;
    const char *next = tile.next_v + plane * shape.plane_bytes;
    const __m512i left = _mm512_load_si512(kQuadTables.columns[0]);
    const __m512i right = _mm512_load_si512(kQuadTables.columns[1]);
    __m512i acc[kParts][R][2 * N];
    ASCEND_UNROLL
    for (int i = 0; i < kParts * R * 2 * N; ++i) (&acc[0][0][0])[i] = _mm512_setzero_si512();
    for (int t = tile.begin / 4 * 4; t < tile.end; t += 4) {
      __m512i v[2 * N];
      ASCEND_UNROLL
      for (int c = 0; c < N; ++c) {
        const int64_t at = c * shape.plane_bytes + t * kRowBytes;
        const __m512i a = _mm512_loadu_si512(base + at), b = _mm512_loadu_si512(base + at + 64);
        v[2 * c] = _mm512_permutex2var_epi8(a, left, b);
        v[2 * c + 1] = _mm512_permutex2var_epi8(a, right, b);
        if constexpr (kPrefetch) prefetch_l2(next + at), prefetch_l2(next + at + 64);
      }
      const uint8_t *weight = weights + (t - tile.first) * R;
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) {
        ASCEND_UNROLL
        for (int part = 0; part < kParts; ++part) {
          const __m512i w = broadcast_pair(weight + part * kWeightBytes + 4 * r);
          ASCEND_UNROLL
          for (int c = 0; c < 2 * N; ++c) {
            acc[part][r][c] = _mm512_dpbusd_epi32(acc[part][r][c], w, v[c]);
          }
        }
      }
    }
    add_products<N>(shape, state, group, plane, acc);
  }

  template <int N>
  static ASCEND_INLINE void add_products(const Shape &shape, State &state, int group, int plane,
                                         __m512i (&acc)[kParts][R][2 * N]) {
    float *out = state.out + group * R * shape.head_dim + plane * 32;
    const int vectors = std::min(2 * N, (shape.head_dim - plane * 32) / kLanes);
    __m512 totals[R][2 * N];
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512 decay = _mm512_set1_ps(state.decay[group * kLanes + r]);
      const __m512 unit = _mm512_set1_ps(state.weight_unit[group * kLanes + r]);
      ASCEND_UNROLL
      for (int c = 0; c < 2 * N; ++c) {  // in vain beyond head_dim: what is there is not stored
        __m512i sum = acc[0][r][c];
        if constexpr (kExact) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), acc[1][r][c]);
        const __m512 old = _mm512_loadu_ps(out + r * shape.head_dim + c * kLanes);
        totals[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), unit, _mm512_mul_ps(old, decay));
      }
    }
    for (int i = 0; i < state.value_patches; ++i) {
      const float *weights = state.patch_weights[i] + group * R;
      ASCEND_UNROLL
      for (int c = 0; c < 2 * N; ++c) {
        const Vb codes = load<Vb>(state.patch_values[i] + plane * 32 + c * kLanes);
        const __m512 values = (__m512)Int8::widen(codes);
        ASCEND_UNROLL
        for (int r = 0; r < R; ++r) {
          totals[r][c] = _mm512_fmadd_ps(values, _mm512_set1_ps(weights[r]), totals[r][c]);
        }
      }
    }
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      ASCEND_UNROLL
      for (int c = 0; c < 2 * N; ++c) {
        if (c == vectors) break;
        _mm512_storeu_ps(out + r * shape.head_dim + c * kLanes, totals[r][c]);
      }
    }
  }

  // Prepares what the patches of V contribute, with the float weights.
  static void stage_value_patches(const Shape &shape, const Tile &tile, State &state) {
    Patch patches[kMaxPatchSlots];
    const int found = find_patches(shape, tile.v_patches, tile.begin, tile.end, patches);
    const int count = (tile.last - tile.first) * R;
    for (int i = 0; i < found; ++i) {
      decode_patch(shape, patches[i].codes, state.patch_values[i]);
      const float *tokens = state.scores + (patches[i].token - tile.first) * R;
      for (int g = 0; g < state.groups; ++g) {
        for (int r = 0; r < R; ++r) {
          state.patch_weights[i][g * R + r] = tokens[g * count + r] * patches[i].scale;
        }
      }
    }
    state.value_patches = found;
  }

  static void run_tile(const Shape &shape, const Tile &tile, State &state, bool alibi) {
    score(shape, tile, state);
    if (tile.k_patches) patch_scores(shape, tile, state);
    weigh<R>(shape, tile, state, alibi);
    for (int g = 0; g < state.groups; ++g) quantise_weights(tile, state, g);
    if (tile.v_patches) stage_value_patches(shape, tile, state);
    accumulate_all<NarrowInt8>(shape, tile, state, shape.planes32());
  }
};

}  // namespace ascend

#endif  // AVX512-VNNI, VBMI and BF16
