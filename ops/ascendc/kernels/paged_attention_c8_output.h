// The last words of paged_attention_c8: sums become output rows, or partial results that are
// merged.
#ifndef ASCEND_PLUGIN_PAGED_ATTENTION_C8_OUTPUT_H_
#define ASCEND_PLUGIN_PAGED_ATTENTION_C8_OUTPUT_H_

#include "paged_attention_c8_rows.h"

namespace paged_attention_c8 {

// Writes finished rows of one item in the output's type.
template <typename T, uint32_t kVariant>
class Output {
  static constexpr float kSmallestSum = 1e-30f;  // of a row that saw nothing; others have about 1

 public:
  // `rows` is how many rows a call may hand over.
  __aicore__ inline void Init(AscendC::TPipe& pipe, const Arguments& arguments,
                              const attention_tiling::Geometry& geometry, uint32_t rows) {
    a_ = arguments;
    g_ = geometry;
    out_.SetGlobalBuffer((__gm__ T*)a_.out);
    pipe.InitBuffer(queue_, 1, rows * g_.headDim * sizeof(T));
    pipe.InitBuffer(lanes_, kLanes * sizeof(float));
    pipe.InitBuffer(blocks_, kLanes * kBlock * sizeof(float));
  }

  // Divides `sums` [rows][headDim] by `weights` (a number per row) and writes them as the rows
  // [begin, begin + rows) of the segment. `channels`: c8s and c8p, what V's channels are worth.
  __aicore__ inline void Write(const Floats& sums, const Floats& weights, const Floats& channels,
                               const Segment& s, RowRange rows) {
    const Extent extent{rows.count, g_.headDim, g_.headDim};
    const int32_t n = static_cast<int32_t>(rows.count);
    Floats inverse = lanes_.template Get<float>();
    Floats blocks = blocks_.template Get<float>();
    AscendC::Adds(weights, weights, kSmallestSum, n);
    AscendC::Duplicate(inverse, 1.0f, n);
    Barrier();
    AscendC::Div(inverse, inverse, weights, n);
    Barrier();
    Spread(blocks, inverse);
    Barrier();
    MulRows(sums, sums, blocks, extent);
    Barrier();
    if constexpr (kVariant != kC8d) {
      MulColumns(sums, sums, channels, extent);
      Barrier();
    }
    AscendC::LocalTensor<T> result = queue_.template AllocTensor<T>();
    AscendC::Cast(result, sums, AscendC::RoundMode::CAST_RINT, rows.count * g_.headDim);
    queue_.EnQue(result);
    result = queue_.template DeQue<T>();
    for (uint32_t done = 0; done < rows.count;) {
      const Heads heads = HeadsFrom(g_, rows, done);
      const uint64_t to = uint64_t{s.firstQuery + heads.token} * a_.outStride +
                          (s.head * g_.group + heads.first) * g_.headDim;
      AscendC::DataCopy(out_[to], result[done * g_.headDim], heads.count * g_.headDim);
      done += heads.count;
    }
    queue_.FreeTensor(result);
  }

 private:
  Arguments a_;
  attention_tiling::Geometry g_;
  AscendC::GlobalTensor<T> out_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> queue_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> lanes_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> blocks_;
};

// Partial results: rows [sums (headDim) | maximum (8) | weight (8)], float32, two pieces a core. A
// core's first piece may go on from the core before (place 0), its last may go on at the next core
// (place 1); pieces in between are whole items.
class Partials {
 public:
  __aicore__ inline void Init(const Arguments& arguments,
                              const attention_tiling::Geometry& geometry) {
    g_ = geometry;
    workspace_ = arguments.workspace;
    offsets_ = attention_tiling::WorkspaceOf(g_);
  }

  __aicore__ inline uint32_t Width() const { return g_.headDim + attention_tiling::kStatistics; }

  // The piece of an item that core `core` has put aside; `starts`: the item begins there.
  __aicore__ inline AscendC::GlobalTensor<float> Piece(uint32_t core, bool starts) {
    const uint64_t rows = RoundUp(g_.maxRows, g_.stepRows);
    AscendC::GlobalTensor<float> piece;
    piece.SetGlobalBuffer((__gm__ float*)(workspace_ + offsets_.bytes * core + offsets_.partial));
    return piece[starts ? rows * Width() : 0];
  }

  // Puts rows aside. `sums`, `maxima` and `weights` (blocks) are ready for MTE3.
  __aicore__ inline void Write(const AscendC::GlobalTensor<float>& piece, const Floats& sums,
                               const Floats& maxima, const Floats& weights, RowRange rows) {
    AscendC::DataCopyParams copy;
    const AscendC::GlobalTensor<float> to = piece[uint64_t{rows.begin} * Width()];
    copy.blockCount = rows.count;
    copy.blockLen = g_.headDim / kBlock;
    copy.srcStride = 0;
    copy.dstStride = attention_tiling::kStatistics / kBlock;
    AscendC::DataCopy(to, sums, copy);
    copy.blockLen = 1;
    copy.dstStride = Width() / kBlock - 1;
    AscendC::DataCopy(to[g_.headDim], maxima, copy);
    AscendC::DataCopy(to[g_.headDim + kBlock], weights, copy);
  }

 private:
  attention_tiling::Geometry g_;
  attention_tiling::Workspace offsets_;
  GM_ADDR workspace_;
};

}  // namespace paged_attention_c8

#endif  // ASCEND_PLUGIN_PAGED_ATTENTION_C8_OUTPUT_H_
