// A vector core of paged_attention_c8: half of the rows of its cube core. It quantises queries,
// prepares extras, makes weights of scores (online softmax) and adds up what the cube multiplies.
//
//   UB, of 196608 bytes     c8d, c8s                         c8p
//   scores in               65536 (2 x 2 x 16 x 256 int32)   40960 (2 x 2 x 8 x 320)
//   products in             49152 (3 x 16 x 256 float32)     24576
//   sums out                17408                            9216
//   halves out, as float16  16384, 8192                      10240, 5120
//   state, lanes, blocks    3264                             4864
//   channel scales          2048 (c8s)                       2048
//   extras of a tile        4096 (c8d)                       5120
//   Extras                  1024 (c8s), 4224 (c8d)           70400
//   Mask, Output, Merger    2048, 8768, 1184                 2560, 4672, 1184
//   Rotation                6144 (c8d)                       -
//   together                186400 (c8d), 175008 (c8s)       180960
//
// What guards what. Queues: MTE2_V and V_MTE2 scores, products, extras, channel scales; V_MTE3 and
// MTE3_V sums, halves, output. MTE3_MTE2: sums that wait in the workspace are written before they
// are read. PipeBarrier<V>: an instruction touches what another wrote, or writes what it read.
#ifndef ASCEND_PLUGIN_PAGED_ATTENTION_C8_VECTOR_H_
#define ASCEND_PLUGIN_PAGED_ATTENTION_C8_VECTOR_H_

#include "paged_attention_c8_extras.h"
#include "paged_attention_c8_mask.h"
#include "paged_attention_c8_merge.h"
#include "paged_attention_c8_output.h"
#include "paged_attention_c8_query.h"

namespace paged_attention_c8 {

template <typename T, uint32_t kVariant>
class Vector {
  static constexpr bool kPatched = kVariant == kC8p;
  static constexpr bool kChannels = kVariant != kC8d;  // static scales per channel
  static constexpr uint32_t kColumns =
      kPatched ? attention_tiling::kMaxPatchedColumns : attention_tiling::kMaxColumns;
  static constexpr uint32_t kRows =
      (kPatched ? attention_tiling::kPatchedStepRows : attention_tiling::kStepRows) / 2;
  static constexpr uint32_t kBlocks = attention_tiling::kMaxRows / (2 * kRows);  // of rows
  static constexpr uint32_t kMaxHeadDim = 256;
  static constexpr uint32_t kMatrix = kRows * kMaxHeadDim;
  static constexpr uint32_t kSpread = kLanes * kBlock;
  static constexpr float kNothing = -1e30f;  // maximum of a row that has seen nothing yet

 public:
  __aicore__ inline void Init(const Arguments& arguments,
                              const attention_tiling::Geometry& geometry) {
    a_ = arguments;
    g_ = geometry;
    sub_ = AscendC::GetSubBlockIdx();
    core_ = AscendC::GetBlockIdx() / 2;
    walker_.Init(a_, g_, core_, AscendC::GetBlockNum());
    const attention_tiling::Workspace w = attention_tiling::WorkspaceOf(g_);
    GM_ADDR base = a_.workspace + w.bytes * core_;
    query_.SetGlobalBuffer((__gm__ T*)a_.query);
    channels_.SetGlobalBuffer((__gm__ float*)a_.channelScales);
    queryGm_.SetGlobalBuffer((__gm__ int8_t*)(base + w.query));
    scoresGm_.SetGlobalBuffer((__gm__ int32_t*)(base + w.scores));
    weightsGm_.SetGlobalBuffer((__gm__ int8_t*)(base + w.weights));
    productsGm_.SetGlobalBuffer((__gm__ int32_t*)(base + w.products));
    extrasGm_.SetGlobalBuffer((__gm__ float*)(base + w.extras));
    sumsGm_.SetGlobalBuffer((__gm__ float*)(base + w.sums));
    InitMemory();
    extras_.Init(pipe_, a_, g_, base);
    mask_.Init(pipe_, a_, g_);
    output_.Init(pipe_, a_, g_, kRows);
    partials_.Init(a_, g_);
    merger_.Init(pipe_, g_);
    if constexpr (kVariant == kC8d) {
      rotation_.Init(pipe_, g_.headDim);
      Floats scratch = productsIn_.template AllocTensor<float>();
      rotation_.Tables(scratch);
      productsIn_.FreeTensor(scratch);
    }
  }

  __aicore__ inline void Process() {
    while (walker_.Next(s_)) {
      StartSegment();
      for (uint32_t tile = s_.tileBegin; tile < s_.tileEnd; ++tile) {
        if (tile + 1 < s_.tileEnd) extras_.Prepare(s_, tile + 1);
        Tile(tile);
      }
      Accumulate(pending_);
      if constexpr (kChannels) channelsIn_.FreeTensor(scales_);
    }
    AscendC::SyncAll<true>();
    Merge();
  }

 private:
  struct Step {
    uint32_t tile;
    uint32_t block;
    uint32_t columns;
    uint32_t before;  // rows of the step that are the other vector core's and come first
    uint32_t all;     // rows of the step
    RowRange rows;    // this vector core's, of the segment
  };

  __aicore__ inline void InitMemory() {
    pipe_.InitBuffer(scoresIn_, 2, 2 * kRows * kColumns * sizeof(int32_t));
    pipe_.InitBuffer(productsIn_, 1, 3 * kMatrix * sizeof(float));
    pipe_.InitBuffer(sumsOut_, 1, (kMatrix + 2 * kSpread) * sizeof(float));
    pipe_.InitBuffer(halvesOut_, 2, 2 * kRows * kColumns);
    pipe_.InitBuffer(halves_, kRows * kColumns * sizeof(half));
    pipe_.InitBuffer(state_, 3 * kBlocks * kLanes * sizeof(float));
    pipe_.InitBuffer(lanes_, (7 + kColumns / kChunk) * kLanes * sizeof(float));
    pipe_.InitBuffer(blocks_, 2 * kSpread * sizeof(float));
    if constexpr (kChannels) pipe_.InitBuffer(channelsIn_, 1, 2 * kMaxHeadDim * sizeof(float));
    if constexpr (kVariant != kC8s) {
      pipe_.InitBuffer(extrasIn_, 1, attention_tiling::kExtraArrays * kColumns * sizeof(float));
    }
  }

  __aicore__ inline Step StepOf(uint32_t tile, uint32_t block) {
    const RowRange all = StepRows(s_, g_.stepRows, block);
    const uint32_t first = (all.count + 1) / 2;
    const uint32_t before = sub_ == 0 ? 0 : first;
    const uint32_t count = sub_ == 0 ? first : all.count - first;
    const uint32_t columns = ColumnsOf(g_, PagesOf(g_, s_, tile));
    return {tile, block, columns, before, all.count, {all.begin + before, count}};
  }

  // Numbers by row of a block that live as long as the segment.
  __aicore__ inline Floats State(uint32_t kind, uint32_t block) {
    return state_.template Get<float>()[(kind * kBlocks + block) * kLanes];
  }
  __aicore__ inline Floats Maxima(uint32_t block) { return State(0, block); }
  __aicore__ inline Floats Weights(uint32_t block) { return State(1, block); }
  __aicore__ inline Floats QueryScales(uint32_t block) { return State(2, block); }

  // Numbers by row of a step. Decay and worth wait for the products of the step.
  __aicore__ inline Floats Lanes(uint32_t index) {
    return lanes_.template Get<float>()[index * kLanes];
  }
  __aicore__ inline Floats Decay(uint32_t step) { return Lanes(step % 2); }
  __aicore__ inline Floats Worth(uint32_t step) { return Lanes(2 + step % 2); }
  __aicore__ inline Floats Peaks() { return Lanes(4); }
  __aicore__ inline Floats Spare() { return Lanes(5); }
  __aicore__ inline Floats Scratch() { return Lanes(6); }

  __aicore__ inline Floats Blocks(uint32_t index) {
    return blocks_.template Get<float>()[index * kSpread];
  }

  __aicore__ inline void StartSegment() {
    if constexpr (kChannels) LoadChannels();
    for (uint32_t block = 0; block < s_.blocks; ++block) {
      const Step step = StepOf(s_.tileBegin, block);
      if (step.rows.count > 0) PrepareQuery(step);
    }
    AscendC::CrossCoreSetFlag<kPair, PIPE_MTE3>(kQueryReady);
    extras_.Prepare(s_, s_.tileBegin);
  }

  // scales_ = channel scales of K, then of V.
  __aicore__ inline void LoadChannels() {
    scales_ = channelsIn_.template AllocTensor<float>();
    for (uint32_t plane = 0; plane < 2; ++plane) {
      AscendC::DataCopy(scales_[plane * g_.headDim],
                        channels_[uint64_t{plane * g_.kvHeads + s_.head} * g_.headDim], g_.headDim);
    }
    channelsIn_.EnQue(scales_);
    scales_ = channelsIn_.template DeQue<float>();
  }

  __aicore__ inline void CopyQuery(const AscendC::LocalTensor<T>& to, RowRange rows) {
    for (uint32_t done = 0; done < rows.count;) {
      const Heads heads = HeadsFrom(g_, rows, done);
      const uint64_t from = uint64_t{s_.firstQuery + heads.token} * a_.queryStride +
                            (s_.head * g_.group + heads.first) * g_.headDim;
      AscendC::DataCopy(to[done * g_.headDim], query_[from], heads.count * g_.headDim);
      done += heads.count;
    }
  }

  // Quantises this core's rows of a block into the workspace and starts their sums.
  __aicore__ inline void PrepareQuery(const Step& step) {
    const uint32_t rows = step.rows.count;
    const Extent extent{rows, g_.headDim, g_.headDim};
    const int32_t n = static_cast<int32_t>(rows * g_.headDim);
    Floats scratch = productsIn_.template AllocTensor<float>();
    CopyQuery(scratch.ReinterpretCast<T>(), step.rows);
    productsIn_.EnQue(scratch);
    scratch = productsIn_.template DeQue<float>();
    Floats x = scratch[kMatrix];
    x.SetSize(kMatrix);
    AscendC::Cast(x, scratch.ReinterpretCast<T>(), AscendC::RoundMode::CAST_NONE, n);
    AscendC::Duplicate(Maxima(step.block), kNothing, static_cast<int32_t>(kLanes));
    Barrier();
    float unit = a_.scale / kTop;
    if constexpr (kChannels) {
      MulColumns(x, x, scales_, extent);
      Barrier();
    } else {
      x = rotation_.Rotate(x, scratch[2 * kMatrix], rows);
      unit /= static_cast<float>(rotation_.Channels());
    }
    AscendC::Muls(scratch, x, 0.0f, n);  // NaN of a query that is not finite; it stays in the sum
    Barrier();
    RowSum(Weights(step.block), scratch, Scratch(), extent);
    Barrier();
    AscendC::Abs(scratch, x, n);
    Barrier();
    RowMaximum(Peaks(), scratch, Scratch(), extent);
    Barrier();
    Normalise(x, Peaks(), Spare(), Blocks(0), extent);
    AscendC::Muls(QueryScales(step.block), Peaks(), unit, static_cast<int32_t>(rows));
    Barrier();
    StoreHalves(queryGm_[uint64_t{step.block} * 2 * g_.stepRows * g_.headDim], x, scratch, step,
                g_.headDim);
    productsIn_.FreeTensor(scratch);
  }

  // Splits rows of `width` and writes both halves where the cube expects them: the high ones of the
  // step's rows, then the low ones.
  __aicore__ inline void StoreHalves(const AscendC::GlobalTensor<int8_t>& to, const Floats& values,
                                     const Floats& scratch, const Step& step, uint32_t width) {
    const uint32_t count = step.rows.count * width;
    Bytes out = halvesOut_.template AllocTensor<int8_t>();
    SplitHalves(out, out[count], values, scratch, halves_.template Get<half>(), count);
    halvesOut_.EnQue(out);
    out = halvesOut_.template DeQue<int8_t>();
    AscendC::DataCopy(to[step.before * width], out, count);
    AscendC::DataCopy(to[(step.all + step.before) * width], out[count], count);
    halvesOut_.FreeTensor(out);
  }

  // All steps of a tile: weights of this step, sums of the one before.
  __aicore__ inline void Tile(uint32_t tile) {
    for (uint32_t block = 0; block < s_.blocks; ++block) {
      const Step step = StepOf(tile, block);
      AscendC::CrossCoreWaitFlag(kScoresReady);
      if (step.rows.count > 0) Softmax(step);
      AscendC::CrossCoreSetFlag<kPair, PIPE_MTE3>(kWeightsReady);
      ++steps_;
      if (block > 0 || tile > s_.tileBegin) Accumulate(pending_);
      pending_ = step;
    }
    ++tiles_;
    if constexpr (kVariant != kC8s) {
      if (StepOf(tile, 0).rows.count > 0) extrasIn_.FreeTensor(tileExtras_);
    }
  }

  __aicore__ inline void LoadExtras() {
    constexpr uint32_t kArrays = kPatched ? 3 : 4;
    const uint64_t from = uint64_t{tiles_ % 3} * attention_tiling::kExtraArrays * g_.columns;
    tileExtras_ = extrasIn_.template AllocTensor<float>();
    AscendC::DataCopy(tileExtras_, extrasGm_[from], kArrays * g_.columns);
    extrasIn_.EnQue(tileExtras_);
    tileExtras_ = extrasIn_.template DeQue<float>();
  }

  // Scores become weights: float32, masked, online softmax, 16 bits in two halves.
  __aicore__ inline void Softmax(const Step& step) {
    const Extent extent{step.rows.count, step.columns, step.columns};
    if constexpr (kVariant != kC8s) {
      if (step.block == 0) LoadExtras();
    }
    Floats high = scoresIn_.template AllocTensor<float>();
    CopyHalves(high, scoresGm_, step, {step.columns, kRows * kColumns, g_.columns, steps_});
    scoresIn_.EnQue(high);
    high = scoresIn_.template DeQue<float>();
    Floats scores = high[kRows * kColumns];
    JoinHalves(scores, high, step.rows.count * step.columns);
    Spread(Blocks(0), QueryScales(step.block));
    Barrier();
    MulRows(scores, scores, Blocks(0), extent);
    Barrier();
    if constexpr (kVariant == kC8d) {
      MulColumns(scores, scores, tileExtras_, extent);
    } else if constexpr (kPatched) {
      PatchScores(scores, high, extent);
    }
    mask_.Hide(scores, s_, step.tile, step.rows, step.columns, extras_.Positions(), tileExtras_);
    Exponentiate(scores, step, extent);
    ScaleWeights(scores, high, extent);
    RowMaximum(Peaks(), scores, Scratch(), extent);
    Barrier();
    Normalise(scores, Peaks(), Spare(), Blocks(0), extent);
    AscendC::Muls(Worth(steps_), Peaks(), 1.0f / kTop, static_cast<int32_t>(extent.rows));
    Barrier();
    StoreHalves(weightsGm_[uint64_t{steps_ % 2} * 2 * g_.stepRows * g_.columns], scores, high, step,
                step.columns);
    scoresIn_.FreeTensor(high);
  }

  // Where the int32 results of a step lie: rows of `width`, those of the low halves `apart`
  // elements behind the high ones in the unified buffer; `longest` is the width that the workspace
  // has room for.
  struct Results {
    uint32_t width;
    uint32_t apart;
    uint32_t longest;
    uint32_t turn;
  };

  // Copies this core's rows.
  __aicore__ inline void CopyHalves(const Floats& to, const AscendC::GlobalTensor<int32_t>& gm,
                                    const Step& step, const Results& r) {
    const uint64_t from = uint64_t{r.turn % 2} * 2 * g_.stepRows * r.longest;
    const uint32_t count = step.rows.count * r.width;
    AscendC::LocalTensor<int32_t> in = to.ReinterpretCast<int32_t>();
    AscendC::DataCopy(in, gm[from + step.before * r.width], count);
    AscendC::DataCopy(in[r.apart], gm[from + (step.all + step.before) * r.width], count);
  }

  // Adds what K's patches contribute: the score of the slot times the scale of its patch.
  __aicore__ inline void PatchScores(const Floats& scores, const Floats& scratch,
                                     const Extent& extent) {
    const Extent tokens{extent.rows, g_.tileTokens, extent.stride};
    for (uint32_t r = 0; r < extent.rows; ++r) {
      const uint32_t slots = r * extent.stride + g_.tileTokens;
      AscendC::Gather(scratch[r * extent.stride], scores, extras_.SlotOffsets(),
                      static_cast<uint32_t>(slots * sizeof(float)), g_.tileTokens);
    }
    Barrier();
    MulColumns(scratch, scratch, tileExtras_, tokens);
    Barrier();
    AddMatrix(scores, scratch, tokens);
  }

  // scores = exp(scores - maximum so far); sums of weights and the decay of older sums follow.
  __aicore__ inline void Exponentiate(const Floats& scores, const Step& step,
                                      const Extent& extent) {
    const int32_t rows = static_cast<int32_t>(extent.rows);
    Floats maxima = Maxima(step.block);
    Floats weights = Weights(step.block);
    Floats decay = Decay(steps_);
    RowMaximum(Peaks(), scores, Scratch(), extent);
    Barrier();
    AscendC::Max(Peaks(), Peaks(), maxima, rows);
    Barrier();
    Spread(Blocks(0), Peaks());
    AscendC::Sub(decay, maxima, Peaks(), rows);
    Barrier();
    SubRows(scores, scores, Blocks(0), extent);
    AscendC::Exp(decay, decay, rows);
    AscendC::Adds(maxima, Peaks(), 0.0f, rows);
    Barrier();
    AscendC::Exp(scores, scores, static_cast<int32_t>(extent.rows * extent.columns));
    AscendC::Mul(weights, weights, decay, rows);
    Barrier();
    RowSum(Spare(), scores, Scratch(), extent);
    Barrier();
    AscendC::Add(weights, weights, Spare(), rows);
  }

  // Multiplies weights with V's scales, c8d; c8p: gives each patch the weight of its token.
  __aicore__ inline void ScaleWeights(const Floats& scores, const Floats& scratch,
                                      const Extent& extent) {
    if constexpr (kVariant == kC8d) {
      MulColumns(scores, scores, tileExtras_[2 * g_.columns], extent);
      Barrier();
    } else if constexpr (kPatched) {
      for (uint32_t r = 0; r < extent.rows; ++r) {
        const uint32_t row = r * extent.stride;
        AscendC::Gather(scratch[row], scores,
                        tileExtras_[2 * g_.columns].template ReinterpretCast<uint32_t>(),
                        static_cast<uint32_t>(row * sizeof(float)), g_.patchColumns);
      }
      Barrier();
      MulColumns(scores[g_.tileTokens], scratch, tileExtras_[g_.columns],
                 {extent.rows, g_.patchColumns, extent.stride});
      Barrier();
    }
  }

  // Adds the products of a step to the sums of its rows, and finishes them after the last tile.
  // With one block of rows the sums stay here; with more they wait in the workspace.
  __aicore__ inline void Accumulate(const Step& step) {
    AscendC::CrossCoreWaitFlag(kProductsReady);
    const uint32_t turn = products_++;
    if (step.rows.count == 0) return;
    const bool first = step.tile == s_.tileBegin;
    const bool last = step.tile + 1 == s_.tileEnd;
    const bool stays = s_.blocks == 1;
    const uint32_t count = step.rows.count * g_.headDim;
    const AscendC::GlobalTensor<float> waiting = sumsGm_[uint64_t{step.rows.begin} * g_.headDim];
    Floats high = productsIn_.template AllocTensor<float>();
    CopyHalves(high, productsGm_, step, {g_.headDim, kMatrix, g_.headDim, turn});
    if (!first && !stays) AscendC::DataCopy(high[2 * kMatrix], waiting, count);
    productsIn_.EnQue(high);
    high = productsIn_.template DeQue<float>();
    if (first || !stays) sums_ = sumsOut_.template AllocTensor<float>();
    AddProducts(high, stays ? sums_ : high[2 * kMatrix], step, turn);
    productsIn_.FreeTensor(high);
    if (last) {
      Finish(step);
    } else if (!stays) {
      sumsOut_.EnQue(sums_);
      sums_ = sumsOut_.template DeQue<float>();
      AscendC::DataCopy(waiting, sums_, count);
      sumsOut_.FreeTensor(sums_);
      const int32_t stored = pipe_.FetchEventID(AscendC::HardEvent::MTE3_MTE2);
      AscendC::SetFlag<AscendC::HardEvent::MTE3_MTE2>(stored);
      AscendC::WaitFlag<AscendC::HardEvent::MTE3_MTE2>(stored);
    }
  }

  // sums_ = old * decay + products * worth; on the first tile nothing is old.
  __aicore__ inline void AddProducts(const Floats& high, const Floats& old, const Step& step,
                                     uint32_t turn) {
    const Extent extent{step.rows.count, g_.headDim, g_.headDim};
    Floats products = high[kMatrix];
    JoinHalves(products, high, extent.rows * extent.columns);
    Spread(Blocks(0), Worth(turn));
    Spread(Blocks(1), Decay(turn));
    Barrier();
    if (step.tile == s_.tileBegin) {
      MulRows(sums_, products, Blocks(0), extent);
      return;
    }
    MulRows(products, products, Blocks(0), extent);
    MulRows(sums_, old, Blocks(1), extent);
    Barrier();
    AddMatrix(sums_, products, extent);
  }

  // Writes the finished rows of a step, or puts them aside for Merge.
  __aicore__ inline void Finish(const Step& step) {
    const int32_t rows = static_cast<int32_t>(step.rows.count);
    Floats weights = Weights(step.block);
    AscendC::Muls(Spare(), Maxima(step.block), 4.0f, rows);
    Barrier();
    AscendC::Muls(Spare(), Spare(), 0.0f, rows);  // NaN if the maximum has kTaint
    Barrier();
    AscendC::Add(weights, weights, Spare(), rows);
    Barrier();
    if (s_.Whole()) {
      output_.Write(sums_, weights, scales_[kChannels ? g_.headDim : 0], s_, step.rows);
    } else {
      Spread(sums_[kMatrix], Maxima(step.block));
      Spread(sums_[kMatrix + kSpread], weights);
      Barrier();
      sumsOut_.EnQue(sums_);
      sums_ = sumsOut_.template DeQue<float>();
      partials_.Write(partials_.Piece(core_, s_.tileBegin == 0), sums_, sums_[kMatrix],
                      sums_[kMatrix + kSpread], step.rows);
    }
    sumsOut_.FreeTensor(sums_);
  }

  // Merges this core's share of the items that it has a piece of.
  __aicore__ inline void Merge() {
    walker_.Rewind(core_);
    while (walker_.Next(s_)) {
      if (s_.Whole()) continue;
      if constexpr (kChannels) LoadChannels();
      merger_.Item(scoresIn_, s_, walker_.Total(), scales_[kChannels ? g_.headDim : 0], output_,
                   partials_);
      if constexpr (kChannels) channelsIn_.FreeTensor(scales_);
    }
  }

  Arguments a_;
  attention_tiling::Geometry g_;
  Walker walker_;
  Segment s_;
  uint32_t sub_;
  uint32_t core_;
  Step pending_;
  uint32_t tiles_ = 0;  // counted over the launch, for the buffers that take turns
  uint32_t steps_ = 0;
  uint32_t products_ = 0;
  Floats tileExtras_;
  Floats scales_;
  Floats sums_;
  AscendC::GlobalTensor<T> query_;
  AscendC::GlobalTensor<float> channels_;
  AscendC::GlobalTensor<int8_t> queryGm_;
  AscendC::GlobalTensor<int32_t> scoresGm_;
  AscendC::GlobalTensor<int8_t> weightsGm_;
  AscendC::GlobalTensor<int32_t> productsGm_;
  AscendC::GlobalTensor<float> extrasGm_;
  AscendC::GlobalTensor<float> sumsGm_;
  AscendC::TPipe pipe_;
  Extras<kVariant> extras_;
  Mask<kVariant> mask_;
  Rotation rotation_;
  Output<T, kVariant> output_;
  Partials partials_;
  Merger<T, kVariant> merger_;
  AscendC::TQue<AscendC::TPosition::VECIN, 2> scoresIn_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> productsIn_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> extrasIn_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> channelsIn_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> sumsOut_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 2> halvesOut_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> halves_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> state_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> lanes_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> blocks_;
};

}  // namespace paged_attention_c8

#endif  // ASCEND_PLUGIN_PAGED_ATTENTION_C8_VECTOR_H_
