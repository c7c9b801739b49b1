// int8 pages for kernels of float rows: a tile is widened into float NZ in cache, with the scales
// and patches of its tokens applied, once for all query rows of the item.
#pragma once

#include "patches.h"
#include "wide.h"

namespace ascend {

// Widened tokens [begin, end) of an int8 run: NZ with planes of 8 columns, token `first` in front.
inline void stage_int8(const Shape &shape, const Tile &tile, const char *run, const float *scales,
                       const char *pool, const char *next, float *stage) {
  constexpr int64_t kPlane = kTileTokens * kUnits;  // floats
  for (int t = tile.begin; t < tile.end; ++t) {
    const float scale = scales ? scales[t] : 1.0f;
    for (int d = 0; d < shape.head_dim; d += kLanes) {
      const Vf x = load_columns<Int8>(run, shape.plane_bytes, t, d) * scale;
      store_columns(stage + (t - tile.first) * kUnits, kPlane, d, x);
      if (next && d % 32 == 0) prefetch_l2(next + d / 32 * shape.plane_bytes + t * kRowBytes);
    }
  }
  if (!pool) return;
  Patch patches[kMaxPatchSlots];
  const int found = find_patches(shape, pool, tile.begin, tile.end, patches);
  alignas(64) int8_t values[kMaxHeadDim];
  for (int i = 0; i < found; ++i) {
    decode_patch(shape, patches[i].codes, values);
    float *row = stage + (patches[i].token - tile.first) * kUnits;
    for (int d = 0; d < shape.head_dim; ++d) {
      row[d / kUnits * kPlane + d % kUnits] += values[d] * patches[i].scale;
    }
  }
}

// Base: a kernel of float32 pages.
template <class Base>
struct StagedInt8 : Base {
  static void run_tile(const Shape &shape, const Tile &tile, State &state, bool alibi) {
    stage_int8(shape, tile, tile.k, tile.k_scales, tile.k_patches, tile.next_k, state.k_stage);
    stage_int8(shape, tile, tile.v, tile.v_scales, tile.v_patches, tile.next_v, state.v_stage);
    Tile staged{};
    staged.k = (const char *)state.k_stage;
    staged.v = (const char *)state.v_stage;
    staged.begin = tile.begin - tile.first;
    staged.end = tile.end - tile.first;
    staged.last = tile.last - tile.first;
    staged.position = tile.position + tile.first;
    Shape floats = shape;
    floats.plane_bytes = kTileTokens * kRowBytes;
    Base::run_tile(floats, staged, state, alibi);
  }
};

}  // namespace ascend
