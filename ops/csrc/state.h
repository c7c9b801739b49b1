// What one work item carries from page to page, and the softmax step that all kernels share.
//
// Query rows are worked in groups of R (1, 2, 4 or kLanes). Scores of a group are [token][R], so a
// vector is kLanes / R tokens x R rows, and per-row values are kept replicated in "lane arrays"
// [group][kLanes]. R = kLanes is the wide kernel: one token x kLanes rows, no lane ever mixes.
#pragma once

#include "simd.h"

namespace ascend {

constexpr int kMaxRows = 48;    // query rows of a work item
constexpr int kMaxLanes = 128;  // lane arrays: 8 groups of 4 rows, or kMaxRows rows
constexpr int kMaxHeadDim = 256;
constexpr int kMaxLatentDim = 512;  // MLA: columns of a value, and of a key without its rotary part
constexpr int kMaxRotaryDim = 128;
constexpr int kMaxKeyDim = kMaxLatentDim + kMaxRotaryDim;
constexpr int kMaxPatchSlots = 32;  // C8P: of a pool
constexpr int kTileTokens = 128;    // tokens between two softmax steps
constexpr int kTokenAlign = 16;     // tiles start and end on multiples of this in the page
constexpr float kNoScore = -1e30f;  // running maximum before any key; finite, so m - m is 0

// Tokens [begin, end) of a page, at most kTileTokens, that some row of the item may see. The scores
// cover [first, last), the same rounded outwards; what lies outside [begin, end) may be garbage.
struct Tile {
  const char *k, *v;                  // NZ: [head_dim / C0][block_size][C0]
  const char *next_k, *next_v;        // the same tokens of a run to prefetch, or null
  const float *k_scales, *v_scales;   // C8D: of the page's tokens, else null
  const char *k_patches, *v_patches;  // C8P: the page's pools, else null
  int begin, end;
  int first, last;
  int position;  // of the page's token 0 in its sequence
};

struct Shape {
  int head_dim;
  int64_t plane_bytes;  // block_size * kRowBytes
  float scale;
  float soft_cap;
  int patch_slots;  // C8P
  int patch_code;

  int planes32() const { return (head_dim + 31) / 32; }  // column groups of int8
};

struct alignas(64) State {
  float top[kMaxLanes];    // running maximum
  float sum[kMaxLanes];    // running denominator, still split over the lanes of a row
  float decay[kMaxLanes];  // factor for the output accumulated so far
  float slope[kMaxLanes];  // ALiBi
  int32_t row_position[kMaxLanes];
  int32_t lo[kMaxLanes];  // a row sees the positions [lo, hi)
  int32_t hi[kMaxLanes];
  float query[kMaxRows * kMaxKeyDim];   // kernel's own packing
  float out[kMaxRows * kMaxLatentDim];  // kernel's own packing
  float scores[kMaxRows * kTileTokens];
  uint16_t weights[kMaxRows * kTileTokens];  // bfloat16 kernels: [group][token / 2][R][2]
  float k_stage[kTileTokens * kMaxKeyDim];
  float v_stage[kTileTokens * kMaxLatentDim];
  float query_unit[kMaxLanes];     // int8 kernels: what a unit of an integer score is worth
  int32_t query_bias[kMaxLanes];   // int8 kernels: 128 * sum of the integer query
  float weight_unit[kMaxLanes];    // int8 kernels: what a unit of an integer weight is worth
  int32_t token_sum[kTileTokens];  // int8 latents: sum of a token's codes
  alignas(64) int8_t patch_values[kMaxPatchSlots][kMaxHeadDim];  // C8P: integers of V's patches
  float patch_weights[kMaxPatchSlots][kMaxRows];                 // their tokens' weights, scaled
  int value_patches;                                             // of the tile; 0 without C8P
  int rows, groups;
  int common_lo, common_hi;  // positions that every row sees
  bool biased;               // soft cap or ALiBi
};

// score = cap * tanh(score / cap), then score += slope * (key position - query position), the order
// and sign of vLLM's CPU kernel.
template <int R>
void bias_scores(const Shape &shape, const Tile &tile, const State &state, int group, bool alibi,
                 float *scores) {
  constexpr int kTokens = kLanes / R;
  const Vf slope = load<Vf>(state.slope + group * kLanes);
  Vi distance = lane_tokens<R>() + (tile.position + tile.first) -
                load<Vi>(state.row_position + group * kLanes);
  for (int t = tile.first; t < tile.last; t += kTokens, scores += kLanes) {
    Vf s = load<Vf>(scores);
    if (shape.soft_cap > 0) s = tanh(s / shape.soft_cap) * shape.soft_cap;
    if (alibi) s += slope * __builtin_convertvector(distance, Vf);
    store(scores, s);
    distance += kTokens;
  }
}

// -inf wherever the row does not see the token; replaces, so that garbage keys cannot matter.
template <int R>
void mask_scores(const Tile &tile, const State &state, int group, float *scores) {
  constexpr int kTokens = kLanes / R;
  const Vi lo = load<Vi>(state.lo + group * kLanes);
  const Vi hi = load<Vi>(state.hi + group * kLanes);
  for (int t = tile.first; t < tile.last; t += kTokens, scores += kLanes) {
    const int position = tile.position + t;
    if (position >= state.common_lo && position + kTokens <= state.common_hi) continue;
    const Vi at = lane_tokens<R>() + position;
    const Vi seen = (at >= lo) & (at < hi);
    store(scores, seen ? load<Vf>(scores) : splat(-__builtin_inff()));
  }
}

// Online softmax: scores become weights relative to the new maximum.
template <int R>
void softmax_step(State &state, int group, int vectors, float *scores) {
  float *top_at = state.top + group * kLanes, *sum_at = state.sum + group * kLanes;
  const Vf old_top = load<Vf>(top_at);
  Vf top = old_top, top2 = old_top;
  for (int i = 0; i + 1 < vectors; i += 2) {
    top = vmax(top, load<Vf>(scores + i * kLanes));
    top2 = vmax(top2, load<Vf>(scores + (i + 1) * kLanes));
  }
  if (vectors % 2) top = vmax(top, load<Vf>(scores + (vectors - 1) * kLanes));
  top = max_over_tokens<R>(vmax(top, top2));
  const Vf decay = exp_nonpositive(old_top - top);
  Vf sum = load<Vf>(sum_at) * decay;
  for (int i = 0; i < vectors; ++i) {
    const Vf weight = exp_nonpositive(load<Vf>(scores + i * kLanes) - top);
    sum += weight;
    store(scores + i * kLanes, weight);
  }
  store(top_at, top);
  store(sum_at, sum);
  store(state.decay + group * kLanes, decay);
}

// From raw products q.k in state.scores, one [last - first][R] block per group, to weights.
template <int R>
void weigh(const Shape &shape, const Tile &tile, State &state, bool alibi) {
  const int count = (tile.last - tile.first) * R;
  const int from = tile.position + tile.first, to = tile.position + tile.last;
  const bool edges = from < state.common_lo || to > state.common_hi;
  for (int g = 0; g < state.groups; ++g) {
    float *scores = state.scores + g * count;
    if (state.biased) bias_scores<R>(shape, tile, state, g, alibi, scores);
    if (edges) mask_scores<R>(tile, state, g, scores);
    softmax_step<R>(state, g, count / kLanes, scores);
  }
}

}  // namespace ascend
