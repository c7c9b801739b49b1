// Merges the pieces of an item that several cores had, paged_attention_c8's last phase.
#ifndef ASCEND_PLUGIN_PAGED_ATTENTION_C8_MERGE_H_
#define ASCEND_PLUGIN_PAGED_ATTENTION_C8_MERGE_H_

#include "paged_attention_c8_output.h"

namespace paged_attention_c8 {

// The rows of an item go round the vector cores of those that have a piece of it.
template <typename T, uint32_t kVariant>
class Merger {
 public:
  __aicore__ inline void Init(AscendC::TPipe& pipe, const attention_tiling::Geometry& geometry) {
    headDim_ = geometry.headDim;
    const uint32_t width = headDim_ + attention_tiling::kStatistics;
    pipe.InitBuffer(total_, width * sizeof(float));
    pipe.InitBuffer(factors_, 3 * kBlock * sizeof(float));
  }

  // Merges an item. `queue` brings rows: event ids are few, so the one of the scores does it.
  template <typename Queue>
  __aicore__ inline void Item(Queue& queue, const Segment& s, uint64_t total,
                              const Floats& channels, Output<T, kVariant>& output,
                              Partials& partials) {
    const uint32_t cores = AscendC::GetBlockNum();
    const uint32_t first = attention_tiling::OwnerOf(total, cores, s.position);
    const uint32_t last = attention_tiling::OwnerOf(total, cores, s.position + s.context.tiles - 1);
    uint32_t owners = 0;
    uint32_t mine = 0;
    for (uint32_t core = first; core <= last; ++core) {
      if (!Works(total, cores, core)) continue;
      if (core == AscendC::GetBlockIdx() / 2) mine = owners;
      ++owners;
    }
    const uint32_t start = 2 * mine + AscendC::GetSubBlockIdx();
    for (uint32_t row = start; row < s.rows; row += 2 * owners) {
      for (uint32_t core = first; core <= last; ++core) {
        if (!Works(total, cores, core)) continue;
        Add(queue, partials.Piece(core, core == first)[uint64_t{row} * partials.Width()],
            partials.Width(), core == first);
      }
      Floats sum = total_.template Get<float>();
      output.Write(sum, sum[headDim_ + kBlock], channels, s, {row, 1});
      Barrier();
    }
  }

 private:
  // Whether a core has a share at all.
  __aicore__ inline bool Works(uint64_t total, uint32_t cores, uint32_t core) {
    return attention_tiling::ShareBegin(total, cores, core) <
           attention_tiling::ShareBegin(total, cores, core + 1);
  }

  // Adds a row [sums | maximum | weight] of a piece, both sides brought to the larger maximum.
  template <typename Queue>
  __aicore__ inline void Add(Queue& queue, const AscendC::GlobalTensor<float>& piece,
                             uint32_t width, bool first) {
    Floats row = queue.template AllocTensor<float>();
    AscendC::DataCopy(row, piece, width);
    queue.EnQue(row);
    row = queue.template DeQue<float>();
    Floats sum = total_.template Get<float>();
    const int32_t n = static_cast<int32_t>(width);
    if (first) {
      AscendC::Adds(sum, row, 0.0f, n);
      Barrier();
      queue.FreeTensor(row);
      return;
    }
    const Extent extent{1, width, width};
    const int32_t block = static_cast<int32_t>(kBlock);
    Floats maximum = factors_.template Get<float>();
    Floats old = maximum[kBlock];
    Floats fresh = maximum[2 * kBlock];
    AscendC::Max(maximum, sum[headDim_], row[headDim_], block);
    Barrier();
    AscendC::Sub(old, sum[headDim_], maximum, block);
    AscendC::Sub(fresh, row[headDim_], maximum, block);
    Barrier();
    AscendC::Exp(old, old, block);
    AscendC::Exp(fresh, fresh, block);
    Barrier();
    MulRows(sum, sum, old, extent);
    MulRows(row, row, fresh, extent);
    Barrier();
    AddMatrix(sum, row, extent);
    Barrier();
    AscendC::Adds(sum[headDim_], maximum, 0.0f, block);
    Barrier();
    queue.FreeTensor(row);
  }

  uint32_t headDim_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> total_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> factors_;
};

}  // namespace paged_attention_c8

#endif  // ASCEND_PLUGIN_PAGED_ATTENTION_C8_MERGE_H_
