// The tiling of paged_attention_c8 as a shared library, for tests and for the size of workspaces.
#include <cstdint>

#define ATTENTION_TILING_FUNCTION inline
#include "attention_tiling.h"

namespace tiling = attention_tiling;

// {heads, kvHeads, headDim, blockSize, maxQueryLen, window, quantisation}
static tiling::Geometry Make(const uint32_t* shape) {
  return tiling::MakeGeometry(shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]);
}

extern "C" {

// {stepRows, slots, slotColumns, pagesPerTile, tileTokens, patchColumns, columns}
void tiling_geometry(const uint32_t* shape, uint32_t* out) {
  const tiling::Geometry g = Make(shape);
  const uint32_t values[] = {g.stepRows,   g.slots,        g.slotColumns, g.pagesPerTile,
                             g.tileTokens, g.patchColumns, g.columns};
  for (uint32_t value : values) *out++ = value;
}

// {first, firstPage, pages, tiles}
void tiling_context(const uint32_t* shape, uint32_t length, uint32_t queries, uint32_t* out) {
  const tiling::Context c = tiling::ContextOf(Make(shape), length, queries);
  const uint32_t values[] = {c.first, c.firstPage, c.pages, c.tiles};
  for (uint32_t value : values) *out++ = value;
}

// {query, scores, weights, products, extras, patches, sums, partial, bytes}
void tiling_workspace(const uint32_t* shape, uint64_t* out) {
  const tiling::Workspace w = tiling::WorkspaceOf(Make(shape));
  const uint64_t values[] = {w.query,   w.scores, w.weights, w.products, w.extras,
                             w.patches, w.sums,   w.partial, w.bytes};
  for (uint64_t value : values) *out++ = value;
}

uint64_t tiling_workspace_bytes(const uint32_t* shape, uint32_t cores) {
  return tiling::WorkspaceBytes(Make(shape), cores);
}

uint64_t tiling_share_begin(uint64_t total, uint32_t cores, uint32_t core) {
  return tiling::ShareBegin(total, cores, core);
}

uint32_t tiling_owner(uint64_t total, uint32_t cores, uint64_t position) {
  return tiling::OwnerOf(total, cores, position);
}
}
