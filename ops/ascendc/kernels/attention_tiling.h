// How paged_attention_c8 cuts its work: plain integer functions, the same in the kernel and on the
// host. The kernel calls them with lengths that it reads on the device, so a captured graph needs
// no update; the host calls WorkspaceBytes before a launch.
//
// Words. A *row* is one query token of one query head; the rows of a (sequence, kv head) are its
// *item*: row = token * group + query head within the group. The context of an item is cut into
// *tiles* of whole pages. A *step* is one block of rows against one tile; each row takes two rows
// of the cube, one for each half of its 16 bits.
//
//            columns of a tile (NZ rows in L1)                          rows of a step
//   c8d, c8s tokens, rounded up to 64, up to 256                        up to 32 (64 of the cube)
//   c8p      tokens | patch slots of each page, 16 or 32 | up to 320    up to 16 (32 of the cube)
//
// MTP: 1 + k query tokens of a group of g heads are g * (1 + k) rows of the same step. A page is
// read once for all of them; rows beyond one step stay in the loop over the same tile.
//
// Whoever includes this outside of a kernel defines ATTENTION_TILING_FUNCTION as `inline` before.
#ifndef ASCEND_PLUGIN_ATTENTION_TILING_H_
#define ASCEND_PLUGIN_ATTENTION_TILING_H_

#ifndef ATTENTION_TILING_FUNCTION
#include "kernel_operator.h"
#define ATTENTION_TILING_FUNCTION __aicore__ inline
#endif

namespace attention_tiling {

constexpr uint32_t kC8d = 1;  // numbers of ops.page_layout.Quantisation
constexpr uint32_t kC8s = 2;
constexpr uint32_t kC8p = 3;

constexpr uint32_t kMaxRows = 256;     // group * query tokens: what L1 holds of the query
constexpr uint32_t kMaxColumns = 256;  // of a tile
constexpr uint32_t kMaxPatchedColumns = 320;
constexpr uint32_t kStepRows = 32;
constexpr uint32_t kPatchedStepRows = 16;
constexpr uint32_t kColumnUnit = 64;  // float32 lanes of one vector instruction
constexpr uint32_t kStatistics = 16;  // float32 beside the sums of a partial row: maximum, sum
constexpr uint32_t kExtraArrays = 4;  // float32 arrays of a tile that both vector cores read

ATTENTION_TILING_FUNCTION uint32_t CeilDiv(uint32_t value, uint32_t unit) {
  return (value + unit - 1) / unit;
}

ATTENTION_TILING_FUNCTION uint32_t RoundUp(uint32_t value, uint32_t unit) {
  return CeilDiv(value, unit) * unit;
}

ATTENTION_TILING_FUNCTION uint32_t Min(uint32_t a, uint32_t b) { return a < b ? a : b; }

// What does not change during a launch.
struct Geometry {
  uint32_t group;  // query heads of a kv head
  uint32_t kvHeads;
  uint32_t headDim;
  uint32_t blockSize;
  uint32_t window;       // 0: none
  uint32_t maxRows;      // group * longest query
  uint32_t stepRows;     // rows of a step
  uint32_t slots;        // patch slots of a page, 0 without patches
  uint32_t slotColumns;  // columns that they take: whole fractals of 16
  uint32_t pagesPerTile;
  uint32_t tileTokens;    // columns of tokens of a full tile; patches lie behind
  uint32_t patchColumns;  // columns of patches of a tile
  uint32_t columns;       // of a full tile
};

ATTENTION_TILING_FUNCTION Geometry MakeGeometry(uint32_t heads, uint32_t kvHeads, uint32_t headDim,
                                                uint32_t blockSize, uint32_t maxQueryLen,
                                                uint32_t window, uint32_t quantisation) {
  const bool patched = quantisation == kC8p;
  Geometry g;
  g.group = heads / kvHeads;
  g.kvHeads = kvHeads;
  g.headDim = headDim;
  g.blockSize = blockSize;
  g.window = window;
  g.maxRows = g.group * maxQueryLen;
  g.stepRows = patched ? kPatchedStepRows : kStepRows;
  g.slots = patched ? blockSize / 8 : 0;
  g.slotColumns = RoundUp(g.slots, 16);
  const uint32_t room = patched ? kMaxPatchedColumns : kMaxColumns;
  g.pagesPerTile = room / (blockSize + g.slotColumns);
  g.tileTokens = g.pagesPerTile * blockSize;
  g.patchColumns = g.pagesPerTile * g.slotColumns;
  g.columns = RoundUp(g.tileTokens + g.patchColumns, kColumnUnit);
  return g;
}

// The context of a sequence: tokens [first, length) are seen by some row; pages hold them.
struct Context {
  uint32_t first;
  uint32_t length;
  uint32_t firstPage;
  uint32_t pages;
  uint32_t tiles;  // of each kv head; 1 for an empty context, whose rows become zero; 0: no rows
};

ATTENTION_TILING_FUNCTION Context ContextOf(const Geometry& g, uint32_t length, uint32_t queries) {
  Context c;
  const uint32_t seen = queries + g.window - 1;  // by any row, if there is a window
  c.length = length;
  c.first = g.window > 0 && length > seen ? length - seen : 0;
  c.firstPage = c.first / g.blockSize;
  c.pages = CeilDiv(length, g.blockSize) - c.firstPage;
  c.tiles = CeilDiv(c.pages, g.pagesPerTile);
  if (c.tiles == 0) c.tiles = 1;
  if (queries == 0) c.tiles = 0;
  return c;
}

// Division of work: the tiles of all items stand in one line (sequence, kv head, tile), `total` of
// them, and core c of n takes those from total * c / n to total * (c + 1) / n. No core has more
// than one tile above another's. An item may so be cut into pieces of several cores, in order; what
// the pieces sum up is merged in the end.
ATTENTION_TILING_FUNCTION uint64_t ShareBegin(uint64_t total, uint32_t cores, uint32_t core) {
  return total * core / cores;
}

// The core whose share has tile `position` of the line.
ATTENTION_TILING_FUNCTION uint32_t OwnerOf(uint64_t total, uint32_t cores, uint64_t position) {
  uint32_t core = static_cast<uint32_t>(position * cores / total);
  while (ShareBegin(total, cores, core + 1) <= position) ++core;
  return core;
}

// Byte offsets inside the workspace of a core (one cube core and its two vector cores). All but the
// partial results stay in L2 and are reused by every step.
struct Workspace {
  uint64_t query;     // int8 [steps of rows][2 stepRows][headDim]: both halves
  uint64_t scores;    // int32 [2][2 stepRows][columns]
  uint64_t weights;   // int8 [2][2 stepRows][columns]
  uint64_t products;  // int32 [2][2 stepRows][headDim]
  uint64_t extras;    // float32 [3][kExtraArrays][columns]: scales or patches of a tile
  uint64_t patches;   // int8 [3][K, V][patchColumns][headDim]
  uint64_t sums;      // float32 [rows][headDim]: sums of steps that wait for the next tile
  uint64_t partial;   // float32 [2][rows][headDim + kStatistics]: pieces at the ends of the share
  uint64_t bytes;
};

ATTENTION_TILING_FUNCTION Workspace WorkspaceOf(const Geometry& g) {
  constexpr uint64_t kUnit = 512;
  const uint64_t rows = RoundUp(g.maxRows, g.stepRows);
  const uint64_t cubeRows = 2 * g.stepRows;
  Workspace w;
  w.query = 0;
  w.scores = w.query + 2 * rows * g.headDim;
  w.weights = w.scores + 2 * cubeRows * g.columns * sizeof(int32_t);
  w.products = w.weights + 2 * cubeRows * g.columns;
  w.extras = w.products + 2 * cubeRows * g.headDim * sizeof(int32_t);
  w.patches = w.extras + 3 * kExtraArrays * g.columns * sizeof(float);
  w.sums = w.patches + 3 * 2 * uint64_t{g.patchColumns} * g.headDim;
  w.partial = w.sums + rows * g.headDim * sizeof(float);
  w.bytes = w.partial + 2 * rows * (g.headDim + kStatistics) * sizeof(float);
  w.bytes = (w.bytes + kUnit - 1) / kUnit * kUnit;
  return w;
}

ATTENTION_TILING_FUNCTION uint64_t WorkspaceBytes(const Geometry& g, uint32_t cores) {
  return WorkspaceOf(g).bytes * cores;
}

}  // namespace attention_tiling

#endif  // ASCEND_PLUGIN_ATTENTION_TILING_H_
