// Which columns of a tile a query token sees, as terms that are added to its scores.
#ifndef ASCEND_PLUGIN_PAGED_ATTENTION_C8_MASK_H_
#define ASCEND_PLUGIN_PAGED_ATTENTION_C8_MASK_H_

#include "paged_attention_c8_extras.h"

namespace paged_attention_c8 {

template <uint32_t kVariant>
class Mask {
  static constexpr uint32_t kColumns =
      kVariant == kC8p ? attention_tiling::kMaxPatchedColumns : attention_tiling::kMaxColumns;
  static constexpr float kHidden = 3e38f;  // what a column out of sight loses, at least

 public:
  __aicore__ inline void Init(AscendC::TPipe& pipe, const Arguments& arguments,
                              const attention_tiling::Geometry& geometry) {
    window_ = static_cast<int32_t>(arguments.window);
    causal_ = arguments.causal != 0;
    g_ = geometry;
    pipe.InitBuffer(bias_, 2 * kColumns * sizeof(float));
  }

  // Lowers scores out of sight so far that their weight is 0, and raises tainted ones to kTaint.
  // Rows that see the same columns, mostly all of a tile, take one bias. `rows` are the segment's,
  // `scores` their columns; `taints`: c8d, arrays of Extras.
  __aicore__ inline void Hide(const Floats& scores, const Segment& s, uint32_t tile, RowRange rows,
                              uint32_t columns, const Floats& positions, const Floats& taints) {
    const uint32_t end = rows.begin + rows.count;
    for (uint32_t row = rows.begin; row < end;) {
      const ColumnRange seen = Seen(s, tile, row / g_.group);
      uint32_t stop = row;
      do {
        stop = Min(end, (stop / g_.group + 1) * g_.group);
        const ColumnRange next = Seen(s, tile, stop / g_.group);
        if (next.begin != seen.begin || next.end != seen.end) break;
      } while (stop < end);
      Fill(seen, positions, static_cast<int32_t>(columns));
      if constexpr (kVariant == kC8d) AddTaints(taints, static_cast<int32_t>(columns));
      Floats from = scores[(row - rows.begin) * columns];
      AddColumns(from, from, bias_.template Get<float>(), {stop - row, columns, columns});
      Barrier();
      row = stop;
    }
  }

 private:
  __aicore__ inline ColumnRange Seen(const Segment& s, uint32_t tile, uint32_t token) {
    const int32_t start = static_cast<int32_t>(FirstToken(g_, s, tile));
    const int32_t position = static_cast<int32_t>(s.context.length - s.queries + token) - start;
    ColumnRange seen = VisibleColumns(g_, s, tile);
    const int32_t ahead = causal_ ? 1 : window_;  // 0: to the end
    if (ahead > 0 && position + ahead < seen.end) seen.end = position + ahead;
    if (window_ > 0 && position - window_ + 1 > seen.begin) seen.begin = position - window_ + 1;
    return seen;
  }

  // bias = min(0, (end - 1 - c) * kHidden) + min(0, (c - begin) * kHidden): 0 in sight, at most
  // -kHidden elsewhere. Infinities are as good: nothing is subtracted from them but numbers.
  __aicore__ inline void Fill(ColumnRange seen, const Floats& positions, int32_t n) {
    Floats bias = bias_.template Get<float>();
    Floats before = bias[kColumns];
    const bool skips = seen.begin > 0;
    AscendC::Adds(bias, positions, static_cast<float>(1 - seen.end), n);
    if (skips) AscendC::Adds(before, positions, static_cast<float>(-seen.begin), n);
    Barrier();
    AscendC::Muls(bias, bias, -kHidden, n);
    if (skips) AscendC::Muls(before, before, kHidden, n);
    Barrier();
    AscendC::Mins(bias, bias, 0.0f, n);
    if (skips) AscendC::Mins(before, before, 0.0f, n);
    Barrier();
    if (!skips) return;
    AscendC::Add(bias, bias, before, n);
    Barrier();
  }

  __aicore__ inline void AddTaints(const Floats& taints, int32_t n) {
    Floats bias = bias_.template Get<float>();
    AscendC::Add(bias, bias, taints[g_.columns], n);
    Barrier();
    AscendC::Add(bias, bias, taints[3 * g_.columns], n);
    Barrier();
  }

  attention_tiling::Geometry g_;
  int32_t window_;
  bool causal_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> bias_;
};

}  // namespace paged_attention_c8

#endif  // ASCEND_PLUGIN_PAGED_ATTENTION_C8_MASK_H_
