// What the cube core and the vector cores of paged_attention_c8 agree on: arguments, the walk over
// the work, places in the workspace, flags between the cores.
#ifndef ASCEND_PLUGIN_PAGED_ATTENTION_C8_COMMON_H_
#define ASCEND_PLUGIN_PAGED_ATTENTION_C8_COMMON_H_

#include "attention_tiling.h"
#include "kernel_operator.h"

namespace paged_attention_c8 {

using attention_tiling::kC8d;
using attention_tiling::kC8p;
using attention_tiling::kC8s;
using attention_tiling::Min;
using attention_tiling::RoundUp;

constexpr uint32_t kC0 = 32;  // int8 elements of a fractal row

// Flags between a cube core and its two vector cores (mode 2). Each is set once per use: the cube
// sees a flag when both vector cores set it, both see one that the cube sets.
constexpr uint8_t kPair = 2;
constexpr uint16_t kQueryReady = 0;     // V -> C, item: halves of the query are in the workspace
constexpr uint16_t kExtrasReady = 1;    // V -> C, tile: scales or patches are
constexpr uint16_t kScoresReady = 2;    // C -> V, step: int32 scores are
constexpr uint16_t kWeightsReady = 3;   // V -> C, step: halves of the weights are
constexpr uint16_t kProductsReady = 4;  // C -> V, step: int32 products of weights and V are

struct Arguments {
  GM_ADDR query;
  GM_ADDR pages;
  GM_ADDR extras;
  GM_ADDR channelScales;
  GM_ADDR blockTable;
  GM_ADDR queryStartLoc;
  GM_ADDR seqLens;
  GM_ADDR out;
  GM_ADDR workspace;
  uint32_t sequences;
  uint32_t heads;
  uint32_t kvHeads;
  uint32_t headDim;
  uint32_t blockSize;
  uint32_t numBlocks;
  uint32_t tableStride;
  uint32_t queryStride;
  uint32_t outStride;
  uint32_t maxQueryLen;
  float scale;
  uint32_t window;
  uint32_t causal;
  uint32_t patchCode;
};

// Consecutive tiles of one item, the part of it that a core does.
struct Segment {
  uint32_t sequence;
  uint32_t head;        // kv head
  uint32_t firstQuery;  // row of `query`
  uint32_t queries;
  uint32_t rows;    // queries * group
  uint32_t blocks;  // of rows: steps of a tile
  attention_tiling::Context context;
  uint64_t position;  // of the item's first tile in the line of all work
  uint32_t tileBegin;
  uint32_t tileEnd;

  __aicore__ inline bool Whole() const { return tileBegin == 0 && tileEnd == context.tiles; }
};

// Rows [begin, begin + count) of a segment: those of a step, or a vector core's half of them.
struct RowRange {
  uint32_t begin;
  uint32_t count;
};

__aicore__ inline RowRange StepRows(const Segment& segment, uint32_t stepRows, uint32_t block) {
  const uint32_t begin = block * stepRows;
  return {begin, Min(stepRows, segment.rows - begin)};
}

// Rows that are neighbours in `query` and `out`: query heads of one token.
struct Heads {
  uint32_t token;
  uint32_t first;  // within the group
  uint32_t count;
};

// The heads that the rows begin with, after the first `done` of them.
__aicore__ inline Heads HeadsFrom(const attention_tiling::Geometry& geometry, RowRange rows,
                                  uint32_t done) {
  const uint32_t row = rows.begin + done;
  const uint32_t first = row % geometry.group;
  return {row / geometry.group, first, Min(geometry.group - first, rows.count - done)};
}

// Pages of a tile, counted from the first page of the context.
struct TilePages {
  uint32_t first;
  uint32_t count;
};

// Walks over the share of a core, segment after segment.
class Walker {
 public:
  __aicore__ inline void Init(const Arguments& arguments,
                              const attention_tiling::Geometry& geometry, uint32_t core,
                              uint32_t cores) {
    sequences_ = arguments.sequences;
    geometry_ = geometry;
    starts_.SetGlobalBuffer((__gm__ int32_t*)arguments.queryStartLoc, sequences_ + 1);
    lengths_.SetGlobalBuffer((__gm__ int32_t*)arguments.seqLens, sequences_);
    total_ = 0;
    for (uint32_t i = 0; i < sequences_; ++i) {
      total_ += ItemTiles(i) * geometry_.kvHeads;
    }
    cores_ = cores;
    Rewind(core);
  }

  __aicore__ inline uint64_t Total() const { return total_; }

  // Goes back to the start of the share.
  __aicore__ inline void Rewind(uint32_t core) {
    position_ = attention_tiling::ShareBegin(total_, cores_, core);
    end_ = attention_tiling::ShareBegin(total_, cores_, core + 1);
    sequence_ = 0;
    base_ = 0;
  }

  __aicore__ inline bool Next(Segment& segment) {
    while (position_ < end_) {
      const uint32_t tiles = ItemTiles(sequence_);
      const uint64_t span = uint64_t{tiles} * geometry_.kvHeads;
      if (position_ - base_ >= span) {
        base_ += span;
        ++sequence_;
        continue;
      }
      Fill(segment, tiles);
      position_ += segment.tileEnd - segment.tileBegin;
      return true;
    }
    return false;
  }

 private:
  __aicore__ inline uint32_t Queries(uint32_t sequence) {
    return starts_.GetValue(sequence + 1) - starts_.GetValue(sequence);
  }

  __aicore__ inline uint32_t ItemTiles(uint32_t sequence) {
    return attention_tiling::ContextOf(geometry_, lengths_.GetValue(sequence), Queries(sequence))
        .tiles;
  }

  __aicore__ inline void Fill(Segment& segment, uint32_t tiles) {
    const uint32_t offset = static_cast<uint32_t>(position_ - base_);
    segment.sequence = sequence_;
    segment.head = offset / tiles;
    segment.firstQuery = starts_.GetValue(sequence_);
    segment.queries = Queries(sequence_);
    segment.rows = segment.queries * geometry_.group;
    segment.blocks = attention_tiling::CeilDiv(segment.rows, geometry_.stepRows);
    segment.context =
        attention_tiling::ContextOf(geometry_, lengths_.GetValue(sequence_), segment.queries);
    segment.position = base_ + uint64_t{segment.head} * tiles;
    segment.tileBegin = offset % tiles;
    const uint64_t left = end_ - position_;
    const uint32_t rest = tiles - segment.tileBegin;
    segment.tileEnd = segment.tileBegin + (left < rest ? static_cast<uint32_t>(left) : rest);
  }

  AscendC::GlobalTensor<int32_t> starts_;
  AscendC::GlobalTensor<int32_t> lengths_;
  attention_tiling::Geometry geometry_;
  uint32_t sequences_;
  uint32_t cores_;
  uint64_t total_;
  uint64_t position_;
  uint64_t end_;
  uint32_t sequence_;
  uint64_t base_;  // tiles of the sequences before
};

__aicore__ inline TilePages PagesOf(const attention_tiling::Geometry& geometry,
                                    const Segment& segment, uint32_t tile) {
  const uint32_t first = tile * geometry.pagesPerTile;
  return {first, Min(geometry.pagesPerTile, segment.context.pages - first)};
}

// Columns that the cube multiplies: those of a full tile with patches, which lie at a fixed place;
// else the tokens of the tile's pages.
__aicore__ inline uint32_t ColumnsOf(const attention_tiling::Geometry& geometry, TilePages pages) {
  if (geometry.slots > 0) return geometry.columns;
  const uint32_t tokens = pages.count * geometry.blockSize;
  return RoundUp(tokens > 0 ? tokens : 1, attention_tiling::kColumnUnit);
}

// Tokens of page `index` of the context that are written: the last page may be in part.
__aicore__ inline uint32_t TokensOf(const attention_tiling::Geometry& geometry,
                                    const Segment& segment, uint32_t index) {
  const uint32_t before = (segment.context.firstPage + index) * geometry.blockSize;
  return Min(geometry.blockSize, segment.context.length - before);
}

}  // namespace paged_attention_c8

#endif  // ASCEND_PLUGIN_PAGED_ATTENTION_C8_COMMON_H_
