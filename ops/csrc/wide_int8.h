// The wide kernel for int8 pages with AVX512-BF16: integers up to 127 are exact in bfloat16, so a
// tile is staged as bfloat16 NZ without its scales, once for 48 query rows. Scales of tokens meet
// the scores and the weights; patches are further rows.
#pragma once

#include "patches.h"
#include "wide.h"

#if defined(__AVX512BF16__)

namespace ascend {

// 32 integers -> 32 bfloat16, in order.
ASCEND_INLINE __m512i widen_to_bf16(const void *integers) {
  const __m512 low = (__m512)Int8::widen(load<Vb>(integers));
  const __m512 high = (__m512)Int8::widen(load<Vb>((const char *)integers + 16));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

struct Int8Source {
  using Core = Bf16Core;
  static constexpr bool kInt8 = true;
  static constexpr int64_t kPlane = kTileTokens * kRowBytes;

  // Rows [from, to) of a column group into two planes of 16 columns.
  static ASCEND_INLINE void stage_key_group(const char *rows, int from, int to, char *out) {
    for (int t = from; t < to; ++t) {
      const __m512i pair = widen_to_bf16(rows + t * kRowBytes);
      _mm256_store_si256((__m256i *)(out + t * kRowBytes), _mm512_castsi512_si256(pair));
      _mm256_store_si256((__m256i *)(out + t * kRowBytes + kPlane),
                         _mm512_extracti64x4_epi64(pair, 1));
    }
  }

  static Operand keys(const Shape &shape, const Tile &tile, State &state) {
    char *stage = (char *)state.k_stage;
    for (int p = 0; p < shape.planes32(); ++p) {
      stage_key_group(tile.k + p * shape.plane_bytes + tile.first * kRowBytes,
                      tile.begin - tile.first, tile.end - tile.first, stage + 2 * p * kPlane);
    }
    return {stage, kPlane};
  }

  // Two token rows of 16 columns -> 16 pairs. Weights of tokens out of sight are 0.
  static Operand values(const Shape &shape, const Tile &tile, State &state) {
    const __m512i interleave = _mm512_load_si512(kPairTables.interleave);
    for (int d = 0; d < shape.head_dim; d += 16) {
      const char *from = tile.v + d / 32 * shape.plane_bytes + d % 32;
      char *to = (char *)state.v_stage + d / 16 * kPlane;
      for (int t = tile.begin & ~1; t < tile.end; t += 2) {
        const __m512 even = (__m512)Int8::widen(load<Vb>(from + t * kRowBytes));
        const __m512 odd = (__m512)Int8::widen(load<Vb>(from + (t + 1) * kRowBytes));
        const __m512i rows = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        _mm512_store_si512(to + (t - tile.first) * kRowBytes,
                           _mm512_permutexvar_epi16(interleave, rows));
      }
    }
    return {(const char *)state.v_stage, kPlane};
  }
};

struct WideInt8 : Wide<Int8, Int8Source> {
  using Base = Wide<Int8, Int8Source>;

  // [token][row] of every group, times the token's scale. A weight of 0 stays 0: the row does not
  // see the token, whose scale may be anything. Scores out of sight are masked later.
  template <bool kWeights>
  static void scale_tokens(const Tile &tile, State &state, const float *scales) {
    const int tokens = tile.last - tile.first;
    for (int g = 0; g < state.groups; ++g) {
      for (int t = tile.begin; t < tile.end; ++t) {
        float *at = state.scores + (g * tokens + t - tile.first) * kLanes;
        const Vf s = load<Vf>(at), scaled = s * scales[t];
        if constexpr (kWeights) {
          store(at, s == 0.0f ? Vf{} : scaled);
        } else {
          store(at, scaled);
        }
      }
    }
  }

  // Adds what the patches of K contribute: their rows are scored like those of a page.
  static void patch_scores(const Shape &shape, const Tile &tile, State &state) {
    Patch patches[kMaxPatchSlots];
    const int found = find_patches(shape, tile.k_patches, tile.begin, tile.end, patches);
    if (!found) return;
    // The stage of V is free until the values are staged: patch rows, then their scores.
    char *rows = (char *)state.v_stage;
    float *added = state.v_stage + kTileTokens * kMaxHeadDim / 2;
    alignas(64) int8_t values[kMaxHeadDim];
    for (int i = 0; i < found; ++i) {
      decode_patch(shape, patches[i].codes, values);
      for (int p = 0; p < shape.planes32(); ++p) {
        Int8Source::stage_key_group((const char *)values + p * kRowBytes, 0, 1,
                                    rows + 2 * p * Int8Source::kPlane + i * kRowBytes);
      }
    }
    const Operand k{rows, Int8Source::kPlane};
    const int tokens = tile.last - tile.first, rounded = (found + kBlock - 1) / kBlock * kBlock;
    for (int t = 0; t < found; t += kBlock) score_groups(shape, k, state, t, rounded, added);
    for (int g = 0; g < state.groups; ++g) {
      for (int i = 0; i < found; ++i) {
        float *at = state.scores + (g * tokens + patches[i].token - tile.first) * kLanes;
        const Vf more = load<Vf>(added + (g * rounded + i) * kLanes);
        store(at, load<Vf>(at) + more * patches[i].scale);
      }
    }
  }

  // Adds what the patches of V contribute, with the float weights.
  static void patch_values(const Shape &shape, const Tile &tile, State &state) {
    Patch patches[kMaxPatchSlots];
    const int found = find_patches(shape, tile.v_patches, tile.begin, tile.end, patches);
    const int tokens = tile.last - tile.first, stride = state.groups * kLanes;
    alignas(64) int8_t values[kMaxHeadDim];
    for (int i = 0; i < found; ++i) {
      decode_patch(shape, patches[i].codes, values);
      for (int g = 0; g < state.groups; ++g) {
        const float *weights = state.scores + (g * tokens + patches[i].token - tile.first) * kLanes;
        const Vf weight = load<Vf>(weights) * patches[i].scale;
        float *out = state.out + g * kLanes;
        for (int d = 0; d < shape.head_dim; ++d, out += stride) {
          store(out, load<Vf>(out) + weight * (float)values[d]);
        }
      }
    }
  }

  static void run_tile(const Shape &shape, const Tile &tile, State &state, bool alibi) {
    score(shape, tile, state);
    if (tile.k_scales) scale_tokens<false>(tile, state, tile.k_scales);
    if (tile.k_patches) patch_scores(shape, tile, state);
    weigh<kLanes>(shape, tile, state, alibi);
    if (tile.v_scales) scale_tokens<true>(tile, state, tile.v_scales);
    Core::finish_weights(state, state.groups * (tile.last - tile.first) * kLanes);
    accumulate(shape, tile, state);
    if (tile.v_patches) patch_values(shape, tile, state);
  }
};

}  // namespace ascend

#endif  // __AVX512BF16__
