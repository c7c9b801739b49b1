// The cube core of paged_attention_c8: pages into L1, both matrix products, int32 results out.
//
//                        c8d, c8s                              c8p
//   L1, of 524288 bytes  query 131072, K and V 4 x 65536,      131072, 4 x 81920,
//                        weights 2 x 16384: 425984             2 x 10240: 479232
//   L0A, of 65536        2 x 16384 (64 rows x 256)             2 x 10240 (32 x 320)
//   L0B, of 65536        2 x 32768 (K: 128 columns x 256,      2 x 32768 (V: 320 x 64)
//                        V: 256 tokens x 128)
//   L0C, of 131072       2 x 32768 (64 rows x 128 int32)       2 x 16384
//
// What guards what. Queues guard every buffer: MTE2_MTE1 and MTE1_MTE2 those of L1, MTE1_M and
// M_MTE1 those of L0A and L0B, M_FIX and FIX_M those of L0C. A page is copied while the one before
// is multiplied: K of the next tile as soon as the tile begins, V when the V before the current one
// has been used. Flags from the vector cores hold the scalar unit, so everything issued after a
// wait comes after what the flag says; paged_attention_c8_common.h lists them.
#ifndef ASCEND_PLUGIN_PAGED_ATTENTION_C8_CUBE_H_
#define ASCEND_PLUGIN_PAGED_ATTENTION_C8_CUBE_H_

#include "paged_attention_c8_common.h"

namespace paged_attention_c8 {

template <uint32_t kVariant>
class Cube {
  static constexpr bool kPatched = kVariant == kC8p;
  static constexpr uint32_t kColumns =
      kPatched ? attention_tiling::kMaxPatchedColumns : attention_tiling::kMaxColumns;
  static constexpr uint32_t kCubeRows =
      2 * (kPatched ? attention_tiling::kPatchedStepRows : attention_tiling::kStepRows);
  static constexpr uint32_t kMaxHeadDim = 256;
  static constexpr uint32_t kFractalRows = 16;
  static constexpr uint32_t kFractal = kFractalRows * kC0;          // bytes
  static constexpr uint32_t kScoreColumns = 128;                    // of one Mmad with K
  static constexpr uint32_t kProductColumns = kPatched ? 64 : 128;  // of one Mmad with V

 public:
  __aicore__ inline void Init(const Arguments& arguments,
                              const attention_tiling::Geometry& geometry) {
    a_ = arguments;
    g_ = geometry;
    const uint32_t core = AscendC::GetBlockIdx();
    walker_.Init(a_, g_, core, AscendC::GetBlockNum());
    pages_.SetGlobalBuffer((__gm__ int8_t*)a_.pages);
    table_.SetGlobalBuffer((__gm__ int32_t*)a_.blockTable);
    const attention_tiling::Workspace w = attention_tiling::WorkspaceOf(g_);
    GM_ADDR base = a_.workspace + w.bytes * core;
    queryGm_.SetGlobalBuffer((__gm__ int8_t*)(base + w.query));
    scoresGm_.SetGlobalBuffer((__gm__ int32_t*)(base + w.scores));
    weightsGm_.SetGlobalBuffer((__gm__ int8_t*)(base + w.weights));
    productsGm_.SetGlobalBuffer((__gm__ int32_t*)(base + w.products));
    patchesGm_.SetGlobalBuffer((__gm__ int8_t*)(base + w.patches));
    pipe_.InitBuffer(queryL1_, 1, 2 * attention_tiling::kMaxRows * kMaxHeadDim);
    pipe_.InitBuffer(keyL1_, 2, kColumns * kMaxHeadDim);
    pipe_.InitBuffer(valueL1_, 2, kColumns * kMaxHeadDim);
    pipe_.InitBuffer(weightsL1_, 2, kCubeRows * kColumns);
    pipe_.InitBuffer(leftL0_, 2, kCubeRows * (kColumns > kMaxHeadDim ? kColumns : kMaxHeadDim));
    pipe_.InitBuffer(rightL0_, 2, kScoreColumns * kMaxHeadDim);
    pipe_.InitBuffer(resultL0_, 2, kCubeRows * kScoreColumns * sizeof(int32_t));
  }

  __aicore__ inline void Process() {
    while (walker_.Next(s_)) {
      CopyKeyPages(s_.tileBegin);
      LoadQuery();
      FinishTile(s_.tileBegin);
      LocalTensor query = queryL1_.template DeQue<int8_t>();
      for (uint32_t tile = s_.tileBegin; tile < s_.tileEnd; ++tile) {
        Tile(query, tile);
      }
      Products();
      queryL1_.FreeTensor(query);
    }
  }

 private:
  using LocalTensor = AscendC::LocalTensor<int8_t>;

  // A step whose scores are out; its weights are multiplied after the scores of the next step.
  struct Step {
    uint32_t block;
    uint32_t columns;
  };

  // All steps of a tile. K of the next tile is on its way meanwhile, V follows.
  __aicore__ inline void Tile(const LocalTensor& query, uint32_t tile) {
    const uint32_t columns = ColumnsOf(g_, PagesOf(g_, s_, tile));
    LocalTensor key = keyL1_.template DeQue<int8_t>();
    const bool more = tile + 1 < s_.tileEnd;
    if (more) CopyKeyPages(tile + 1);
    for (uint32_t block = 0; block < s_.blocks; ++block) {
      Scores(query, key, block, columns);
      if (block > 0 || tile > s_.tileBegin) Products();
      pending_ = {block, columns};
    }
    keyL1_.FreeTensor(key);
    if (more) FinishTile(tile + 1);
  }

  __aicore__ inline void CopyKeyPages(uint32_t tile) {
    loading_ = keyL1_.template AllocTensor<int8_t>();
    CopyPages(loading_, tile, 0);
  }

  // Copies what the vector cores prepared of a tile's patches, and its V.
  __aicore__ inline void FinishTile(uint32_t tile) {
    if constexpr (kVariant != kC8s) AscendC::CrossCoreWaitFlag(kExtrasReady);
    CopyPatches(loading_, tile, 0);
    keyL1_.EnQue(loading_);
    LocalTensor value = valueL1_.template AllocTensor<int8_t>();
    CopyPages(value, tile, 1);
    CopyPatches(value, tile, 1);
    valueL1_.EnQue(value);
    ++tiles_;
  }

  // K (plane 0) or V (1) of a tile's pages, (headDim / 32, tokens, 32) each, side by side. Tokens
  // that are not written stay behind; what L1 has there meets weights of 0.
  __aicore__ inline void CopyPages(const LocalTensor& to, uint32_t tile, uint32_t plane) {
    const TilePages pages = PagesOf(g_, s_, tile);
    const uint32_t columns = ColumnsOf(g_, pages);
    const uint64_t row = uint64_t{s_.sequence} * a_.tableStride + s_.context.firstPage;
    AscendC::DataCopyParams copy;
    copy.blockCount = g_.headDim / kC0;
    for (uint32_t i = 0; i < pages.count; ++i) {
      const uint32_t page = pages.first + i;
      const uint64_t planes = 2 * uint64_t(table_.GetValue(row + page)) + plane;
      const uint32_t tokens = TokensOf(g_, s_, page);
      copy.blockLen = tokens;
      copy.srcStride = g_.blockSize - tokens;
      copy.dstStride = columns - tokens;
      AscendC::DataCopy(to[i * g_.blockSize * kC0],
                        pages_[(planes * g_.kvHeads + s_.head) * g_.headDim * g_.blockSize], copy);
    }
  }

  // Codes of patches, unpacked by the vector cores: (columns, headDim) into further fractal rows.
  __aicore__ inline void CopyPatches(const LocalTensor& to, uint32_t tile, uint32_t plane) {
    if constexpr (kPatched) {
      const TilePages pages = PagesOf(g_, s_, tile);
      if (pages.count == 0) return;
      AscendC::Nd2NzParams nz = RowsToNz(pages.count * g_.slotColumns, g_.headDim, g_.columns);
      const uint64_t from = (tiles_ % 3 * 2 + plane) * uint64_t{g_.patchColumns} * g_.headDim;
      AscendC::DataCopy(to[g_.tileTokens * kC0], patchesGm_[from], nz);
    }
  }

  // Rows of `width` bytes, contiguous, into (width / 32, height, 32).
  __aicore__ inline AscendC::Nd2NzParams RowsToNz(uint32_t rows, uint32_t width, uint32_t height) {
    AscendC::Nd2NzParams nz;
    nz.ndNum = 1;
    nz.nValue = rows;
    nz.dValue = width;
    nz.srcNdMatrixStride = 0;
    nz.srcDValue = width;
    nz.dstNzC0Stride = height;
    nz.dstNzNStride = 1;
    nz.dstNzMatrixStride = 0;
    return nz;
  }

  __aicore__ inline uint32_t CubeRows(uint32_t block) {  // in whole fractals
    return RoundUp(2 * StepRows(s_, g_.stepRows, block).count, kFractalRows);
  }

  __aicore__ inline uint32_t QueryOffset(uint32_t block) {
    return block * 2 * g_.stepRows * g_.headDim;
  }

  __aicore__ inline void LoadQuery() {
    AscendC::CrossCoreWaitFlag(kQueryReady);
    LocalTensor query = queryL1_.template AllocTensor<int8_t>();
    for (uint32_t block = 0; block < s_.blocks; ++block) {
      const uint32_t rows = 2 * StepRows(s_, g_.stepRows, block).count;
      AscendC::DataCopy(query[QueryOffset(block)], queryGm_[QueryOffset(block)],
                        RowsToNz(rows, g_.headDim, CubeRows(block)));
    }
    queryL1_.EnQue(query);
  }

  // Brings `rows` x `width` from NZ in L1 into L0A, whose fractals go row of fractals by row.
  __aicore__ inline LocalTensor LoadLeft(const LocalTensor& from, uint32_t rows, uint32_t width) {
    LocalTensor to = leftL0_.template AllocTensor<int8_t>();
    AscendC::LoadData2DParams load;
    load.repeatTimes = width / kC0;
    load.srcStride = rows / kFractalRows;
    for (uint32_t i = 0; i < rows / kFractalRows; ++i) {
      AscendC::LoadData(to[i * kFractalRows * width], from[i * kFractal], load);
    }
    leftL0_.EnQue(to);
    return leftL0_.template DeQue<int8_t>();
  }

  __aicore__ inline void Scores(const LocalTensor& query, const LocalTensor& key, uint32_t block,
                                uint32_t columns) {
    const uint32_t rows = CubeRows(block);
    LocalTensor left = LoadLeft(query[QueryOffset(block)], rows, g_.headDim);
    for (uint32_t at = 0; at < columns; at += kScoreColumns) {
      const uint32_t width = Min(kScoreColumns, columns - at);
      LocalTensor right = rightL0_.template AllocTensor<int8_t>();
      AscendC::LoadData2DParams load;
      load.repeatTimes = width / kFractalRows;
      load.srcStride = 1;
      for (uint32_t i = 0; i < g_.headDim / kC0; ++i) {
        AscendC::LoadData(right[i * width * kC0], key[(i * columns + at) * kC0], load);
      }
      rightL0_.EnQue(right);
      const uint64_t to = uint64_t{steps_ % 2} * 2 * g_.stepRows * g_.columns + at;
      Multiply(left, scoresGm_[to], {rows, width, g_.headDim}, block, columns);
    }
    leftL0_.FreeTensor(left);
    AscendC::CrossCoreSetFlag<kPair, PIPE_FIX>(kScoresReady);
    ++steps_;
  }

  // Weights of the pending step times V.
  __aicore__ inline void Products() {
    const Step step = pending_;
    if (step.block == 0) value_ = valueL1_.template DeQue<int8_t>();
    LocalTensor left = LoadWeights(step);
    const uint32_t rows = CubeRows(step.block);
    for (uint32_t at = 0; at < g_.headDim; at += kProductColumns) {
      const uint32_t width = Min(kProductColumns, g_.headDim - at);
      LocalTensor right = rightL0_.template AllocTensor<int8_t>();
      AscendC::LoadData2dTransposeParams load;
      load.repeatTimes = step.columns / kC0;  // squares of 32 tokens x 32 channels
      load.srcStride = 1;
      load.dstGap = width / kFractalRows - 1;
      for (uint32_t i = 0; i < width / kC0; ++i) {
        AscendC::LoadDataWithTranspose(right[i * 2 * kFractal],
                                       value_[(at + i * kC0) * step.columns], load);
      }
      rightL0_.EnQue(right);
      const uint64_t to = uint64_t{products_ % 2} * 2 * g_.stepRows * g_.headDim + at;
      Multiply(left, productsGm_[to], {rows, width, step.columns}, step.block, g_.headDim);
    }
    leftL0_.FreeTensor(left);
    if (step.block + 1 == s_.blocks) valueL1_.FreeTensor(value_);
    AscendC::CrossCoreSetFlag<kPair, PIPE_FIX>(kProductsReady);
    ++products_;
  }

  __aicore__ inline LocalTensor LoadWeights(const Step& step) {
    AscendC::CrossCoreWaitFlag(kWeightsReady);
    const uint32_t rows = CubeRows(step.block);
    const uint32_t written = 2 * StepRows(s_, g_.stepRows, step.block).count;
    const uint64_t from = uint64_t{products_ % 2} * 2 * g_.stepRows * g_.columns;
    LocalTensor weights = weightsL1_.template AllocTensor<int8_t>();
    AscendC::DataCopy(weights, weightsGm_[from], RowsToNz(written, step.columns, rows));
    weightsL1_.EnQue(weights);
    weights = weightsL1_.template DeQue<int8_t>();
    LocalTensor left = LoadLeft(weights, rows, step.columns);
    weightsL1_.FreeTensor(weights);
    return left;
  }

  struct Shape {
    uint32_t m;
    uint32_t n;
    uint32_t k;
  };

  // One Mmad with what waits for L0B; its rows that mean something go out as int32, `stride` apart.
  __aicore__ inline void Multiply(const LocalTensor& left, const AscendC::GlobalTensor<int32_t>& to,
                                  const Shape& shape, uint32_t block, uint32_t stride) {
    LocalTensor right = rightL0_.template DeQue<int8_t>();
    AscendC::LocalTensor<int32_t> result = resultL0_.template AllocTensor<int32_t>();
    AscendC::MmadParams mmad;
    mmad.m = shape.m;
    mmad.n = shape.n;
    mmad.k = shape.k;
    mmad.cmatrixInitVal = true;
    AscendC::Mmad(result, left, right, mmad);
    rightL0_.FreeTensor(right);
    resultL0_.EnQue(result);
    result = resultL0_.template DeQue<int32_t>();
    AscendC::FixpipeParamsV220 out;
    out.nSize = shape.n;
    out.mSize = 2 * StepRows(s_, g_.stepRows, block).count;
    out.srcStride = shape.m;
    out.dstStride = stride;
    out.ndNum = 1;
    AscendC::Fixpipe(to, result, out);
    resultL0_.FreeTensor(result);
  }

  Arguments a_;
  attention_tiling::Geometry g_;
  Walker walker_;
  Segment s_;
  Step pending_;
  LocalTensor loading_;  // K of the tile whose V is not yet on its way
  LocalTensor value_;    // V of the pending step
  uint32_t tiles_ = 0;   // counted over the launch, for the buffers that take turns
  uint32_t steps_ = 0;
  uint32_t products_ = 0;
  AscendC::GlobalTensor<int8_t> pages_;
  AscendC::GlobalTensor<int32_t> table_;
  AscendC::GlobalTensor<int8_t> queryGm_;
  AscendC::GlobalTensor<int32_t> scoresGm_;
  AscendC::GlobalTensor<int8_t> weightsGm_;
  AscendC::GlobalTensor<int32_t> productsGm_;
  AscendC::GlobalTensor<int8_t> patchesGm_;
  AscendC::TPipe pipe_;
  AscendC::TQue<AscendC::TPosition::A1, 1> queryL1_;
  AscendC::TQue<AscendC::TPosition::B1, 2> keyL1_;
  AscendC::TQue<AscendC::TPosition::B1, 2> valueL1_;
  AscendC::TQue<AscendC::TPosition::A1, 2> weightsL1_;
  AscendC::TQue<AscendC::TPosition::A2, 2> leftL0_;
  AscendC::TQue<AscendC::TPosition::B2, 2> rightL0_;
  AscendC::TQue<AscendC::TPosition::CO1, 2> resultL0_;
};

}  // namespace paged_attention_c8

#endif  // ASCEND_PLUGIN_PAGED_ATTENTION_C8_CUBE_H_
