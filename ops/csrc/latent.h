// Kernels over pages of latents (multi-head latent attention): all query heads share one key, the
// latent and its rotary part, and one value, the latent. 16 to 128 heads make enough rows for the
// wide kernels, whose lanes run along query rows.
//
// Where latents and rotary parts have one type their planes lie one behind the other: a key is the
// whole page, a value its first latent_dim columns.
#pragma once

#include "staged_int8.h"
#include "wide.h"

namespace ascend {

struct LatentTile : Tile {
  const char *rotary;  // NZ: [rotary_dim / C0][block_size][C0]
};

struct LatentShape {
  Shape latent;  // head_dim: latent_dim
  Shape rotary;  // head_dim: rotary_dim

  Shape key() const {
    Shape shape = latent;
    shape.head_dim += rotary.head_dim;
    return shape;
  }
};

// As FloatSource; what was widened as keys serves as values.
template <class E>
struct LatentSource : FloatSource<E> {
  static Operand values(const Shape &shape, const Tile &tile, State &state) {
    if constexpr (sizeof(typename E::Storage) == 4) {
      return FloatSource<E>::values(shape, tile, state);
    } else {
      return {(const char *)state.k_stage, kTileTokens * kUnits * 4};
    }
  }
};

// Base: a wide kernel.
template <class Base>
struct LatentWide : Base {
  // query: latent_dim columns, then rotary_dim.
  static void pack_query(const LatentShape &shape, State &state, int row, const float *query) {
    Base::pack_query(shape.key(), state, row, query);
  }

  static void run_tile(const LatentShape &shape, const LatentTile &tile, State &state) {
    Base::score(shape.key(), tile, state);
    weigh<kLanes>(shape.latent, tile, state, false);
    Base::Core::finish_weights(state, state.groups * (tile.last - tile.first) * kLanes);
    Base::accumulate(shape.latent, tile, state);
  }
};

// int8 latents for any instruction set and query: a tile is widened to float NZ, latents with
// their scales and rotary parts behind them, once for all rows of the item.
struct LatentStagedInt8 : LatentWide<Wide<Float32, FloatSource<Float32>>> {
  using Base = LatentWide<Wide<Float32, FloatSource<Float32>>>;

  static void run_tile(const LatentShape &shape, const LatentTile &tile, State &state) {
    stage_int8(shape.latent, tile, tile.k, tile.k_scales, nullptr, tile.next_k, state.k_stage);
    stage_floats<Bfloat16>(shape.rotary, tile, tile.rotary,
                           state.k_stage + kTileTokens * shape.latent.head_dim);
    LatentTile staged{};
    staged.k = staged.v = (const char *)state.k_stage;
    staged.begin = tile.begin - tile.first;
    staged.end = tile.end - tile.first;
    staged.last = tile.last - tile.first;
    staged.position = tile.position + tile.first;
    LatentShape floats = shape;
    floats.latent.plane_bytes = kTileTokens * kRowBytes;
    Base::run_tile(floats, staged, state);
  }
};

}  // namespace ascend
