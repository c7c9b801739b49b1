// What a tile has besides codes, prepared for both vector cores of a cube core: the first one reads
// and cleans what belongs to K, the second what belongs to V, each byte once; both put it into the
// workspace, a tile ahead of its use. Tokens that no row sees, unwritten ones and those of other
// sequences among them, leave nothing behind, NaN included.
//
//   c8d  arrays [0], [2]: scales of K and V by column, 0 where NaN or not visible
//        arrays [1], [3]: 0, or kTaint where a visible scale is NaN
//   c8p  array  [0]: scale of K's patch by column of tokens, 0 where there is none
//        array  [1]: scale of V's patch by patch column, 0 where there is none
//        array  [2]: byte offset of the token that V's patch column belongs to, uint32
//        patches: int8 values of both, a row for each patch column; 16 times those of int4, whose
//        scales are a 16th
//
// The workspace has three places: while the cube may still load tile t - 1 and the other vector
// core may still read tile t, tile t + 1 is written.
#ifndef ASCEND_PLUGIN_PAGED_ATTENTION_C8_EXTRAS_H_
#define ASCEND_PLUGIN_PAGED_ATTENTION_C8_EXTRAS_H_

#include "paged_attention_c8_rows.h"

namespace paged_attention_c8 {

// A score that a visible NaN scale adds. No other score comes near, so the row's maximum tells of
// it in the end; no NaN enters a comparison on the way.
constexpr float kTaint = 1e38f;

// Tokens of a tile that some row sees, as columns [begin, end).
struct ColumnRange {
  int32_t begin;
  int32_t end;
};

__aicore__ inline uint32_t FirstToken(const attention_tiling::Geometry& g, const Segment& s,
                                      uint32_t tile) {
  return (s.context.firstPage + tile * g.pagesPerTile) * g.blockSize;
}

__aicore__ inline ColumnRange VisibleColumns(const attention_tiling::Geometry& g, const Segment& s,
                                             uint32_t tile) {
  const uint32_t start = FirstToken(g, s, tile);
  const uint32_t stop = Min(s.context.length, start + g.tileTokens);
  const uint32_t begin = s.context.first > start ? s.context.first - start : 0;
  return {static_cast<int32_t>(begin), static_cast<int32_t>(stop - start)};
}

template <uint32_t kVariant>
class Extras {
  static constexpr bool kPatched = kVariant == kC8p;
  static constexpr uint32_t kColumns =
      kPatched ? attention_tiling::kMaxPatchedColumns : attention_tiling::kMaxColumns;
  static constexpr uint32_t kPatchLanes = 192;  // patch columns of a tile, at most 160, in chunks
  static constexpr uint32_t kMaskBytes = 64;    // a bit for each column, in whole blocks
  static constexpr uint32_t kMaxSlots = 32;
  static constexpr uint32_t kMaxHeadDim = 256;
  static constexpr float kInt4Unit = 16.0f;  // int4 patches fill int8: weights stay as small
  static constexpr float kNowhere = 1e9f;    // page of a column that is no slot

  using Bits = AscendC::LocalTensor<uint8_t>;

 public:
  __aicore__ inline void Init(AscendC::TPipe& pipe, const Arguments& arguments,
                              const attention_tiling::Geometry& geometry, GM_ADDR base) {
    a_ = arguments;
    g_ = geometry;
    plane_ = AscendC::GetSubBlockIdx();
    const attention_tiling::Workspace w = attention_tiling::WorkspaceOf(g_);
    table_.SetGlobalBuffer((__gm__ int32_t*)a_.blockTable);
    arrays_.SetGlobalBuffer((__gm__ float*)(base + w.extras));
    patches_.SetGlobalBuffer((__gm__ int8_t*)(base + w.patches));
    pipe.InitBuffer(positions_, kColumns * sizeof(float));
    AscendC::CreateVecIndex(positions_.Get<float>(), 0.0f, kColumns);
    if constexpr (kVariant == kC8s) return;
    pipe.InitBuffer(out_, 1, 2 * kColumns * sizeof(float));
    pipe.InitBuffer(masks_, 2 * kMaskBytes);
    if constexpr (kVariant == kC8d) {
      pipe.InitBuffer(in_, 1, kColumns * sizeof(float));
    } else {
      pipe.InitBuffer(in_, 1, kPatchLanes * (sizeof(int16_t) + sizeof(float)));
      pipe.InitBuffer(codesIn_, 2, kMaxSlots * kMaxHeadDim / 2);
      pipe.InitBuffer(codesOut_, 2, kMaxSlots * kMaxHeadDim);
      pipe.InitBuffer(values_, 2 * kMaxSlots * kMaxHeadDim * sizeof(half));
      pipe.InitBuffer(lanes_, 4 * kColumns * sizeof(float));
      pipe.InitBuffer(slots_, (2 * kPatchLanes + kColumns) * sizeof(float));
      FillSlots(pipe);
    }
  }

  // 0, 1, 2 and so on, a float32 for each column.
  __aicore__ inline Floats Positions() { return positions_.template Get<float>(); }

  // c8p: byte offset, from the first patch column, of the slot that each column of tokens can use.
  __aicore__ inline AscendC::LocalTensor<uint32_t> SlotOffsets() {
    return slots_.template Get<uint32_t>()[2 * kPatchLanes];
  }

  // Prepares a tile of the segment.
  __aicore__ inline void Prepare(const Segment& segment, uint32_t tile) {
    if constexpr (kVariant == kC8s) return;
    place_ = tiles_++ % 3;
    if constexpr (kVariant == kC8d) {
      PrepareScales(segment, tile);
    } else {
      PreparePatches(segment, tile);
    }
    AscendC::CrossCoreSetFlag<kPair, PIPE_MTE3>(kExtrasReady);
  }

 private:
  // Index of (block, plane, kv head) among all of them, of page `page` of the context.
  __aicore__ inline uint64_t RunOf(const Segment& s, uint32_t page) {
    const uint64_t entry = uint64_t{s.sequence} * a_.tableStride + s.context.firstPage + page;
    return (2 * uint64_t(table_.GetValue(entry)) + plane_) * g_.kvHeads + s.head;
  }

  __aicore__ inline uint64_t ArrayOffset(uint32_t array) {
    return (uint64_t{place_} * attention_tiling::kExtraArrays + array) * g_.columns;
  }

  // Bits of the columns [begin, end) of `values`.
  __aicore__ inline Bits Inside(const Floats& values, ColumnRange range, uint32_t count) {
    Bits mask = masks_.template Get<uint8_t>();
    Bits below = mask[kMaskBytes];
    AscendC::CompareScalar(mask, values, static_cast<float>(range.begin), AscendC::CMPMODE::GE,
                           count);
    AscendC::CompareScalar(below, values, static_cast<float>(range.end), AscendC::CMPMODE::LT,
                           count);
    Barrier();
    Both(mask, below, count);
    return mask;
  }

  __aicore__ inline void Both(const Bits& mask, const Bits& other, uint32_t count) {
    AscendC::LocalTensor<uint16_t> bits = mask.ReinterpretCast<uint16_t>();
    AscendC::And(bits, bits, other.ReinterpretCast<uint16_t>(), static_cast<int32_t>(count / 16));
    Barrier();
  }

  // from[i] where the mask has a bit, `other` elsewhere.
  __aicore__ inline void Choose(const Floats& to, const Bits& mask, const Floats& from, float other,
                                uint32_t count) {
    AscendC::Select(to, mask, from, other, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, count);
  }

  __aicore__ inline void PrepareScales(const Segment& s, uint32_t tile) {
    const TilePages pages = PagesOf(g_, s, tile);
    const uint32_t columns = ColumnsOf(g_, pages);
    AscendC::GlobalTensor<float> all;
    all.SetGlobalBuffer((__gm__ float*)a_.extras);
    Floats scales = in_.template AllocTensor<float>();
    for (uint32_t i = 0; i < pages.count; ++i) {
      const uint32_t tokens = RoundUp(TokensOf(g_, s, pages.first + i), kBlock);
      AscendC::DataCopy(scales[i * g_.blockSize], all[RunOf(s, pages.first + i) * g_.blockSize],
                        tokens);
    }
    in_.EnQue(scales);
    scales = in_.template DeQue<float>();
    Floats clean = out_.template AllocTensor<float>();
    Floats taint = clean[g_.columns];
    Bits mask = Inside(Positions(), VisibleColumns(g_, s, tile), columns);
    Choose(clean, mask, scales, 0.0f, columns);
    in_.FreeTensor(scales);
    AscendC::Duplicate(taint, 0.0f, static_cast<int32_t>(columns));
    Barrier();
    AscendC::Compare(mask, clean, clean, AscendC::CMPMODE::EQ, columns);  // false for NaN
    Barrier();
    Choose(clean, mask, clean, 0.0f, columns);
    Choose(taint, mask, taint, kTaint, columns);
    out_.EnQue(clean);
    clean = out_.template DeQue<float>();
    AscendC::DataCopy(arrays_[ArrayOffset(2 * plane_)], clean, columns);
    AscendC::DataCopy(arrays_[ArrayOffset(2 * plane_ + 1)], clean[g_.columns], columns);
    out_.FreeTensor(clean);
  }

  // Tables by patch column (its slot, the first token of its page) and by column of tokens.
  __aicore__ inline void FillSlots(AscendC::TPipe& pipe) {
    Floats slot = slots_.template Get<float>();
    Floats page = slot[kPatchLanes];
    for (uint32_t i = 0; i < kPatchLanes; ++i) {
      const uint32_t index = i % g_.slotColumns;
      const bool used = i < g_.patchColumns && index < g_.slots;
      slot.SetValue(i, static_cast<float>(index));
      page.SetValue(i, used ? static_cast<float>(i / g_.slotColumns * g_.blockSize) : kNowhere);
    }
    AscendC::LocalTensor<uint32_t> offsets = SlotOffsets();
    for (uint32_t i = 0; i < kColumns; ++i) {
      const uint32_t column = i / g_.blockSize * g_.slotColumns + i % g_.blockSize % g_.slots;
      offsets.SetValue(i, i < g_.tileTokens ? column * static_cast<uint32_t>(sizeof(float)) : 0);
    }
    const int32_t filled = pipe.FetchEventID(AscendC::HardEvent::S_V);
    AscendC::SetFlag<AscendC::HardEvent::S_V>(filled);
    AscendC::WaitFlag<AscendC::HardEvent::S_V>(filled);
  }

  __aicore__ inline void PreparePatches(const Segment& s, uint32_t tile) {
    const TilePages pages = PagesOf(g_, s, tile);
    const uint64_t poolBytes =
        uint64_t{g_.slots} * (sizeof(int16_t) + sizeof(float) + g_.headDim / 2) + g_.blockSize / 4;
    Bytes in = in_.template AllocTensor<int8_t>();
    for (uint32_t i = 0; i < pages.count; ++i) {
      CopyTags(in, i, a_.extras + RunOf(s, pages.first + i) * poolBytes);
    }
    in_.EnQue(in);
    for (uint32_t i = 0; i < pages.count; ++i) {
      Unpack(i, a_.extras + RunOf(s, pages.first + i) * poolBytes +
                    g_.slots * (sizeof(int16_t) + sizeof(float)));
    }
    in = in_.template DeQue<int8_t>();
    Floats scales = lanes_.template Get<float>();
    Floats token = scales[kColumns];
    ValidPatches(scales, token, in, VisibleColumns(g_, s, tile));
    in_.FreeTensor(in);
    if (plane_ == 0) {
      ScalesOfTokens(scales, token);
    } else {
      ScalesOfSlots(scales, token);
    }
  }

  __aicore__ inline void CopyTags(const Bytes& to, uint32_t page, GM_ADDR pool) {
    AscendC::GlobalTensor<int16_t> tags;
    AscendC::GlobalTensor<float> scales;
    tags.SetGlobalBuffer((__gm__ int16_t*)pool);
    scales.SetGlobalBuffer((__gm__ float*)(pool + g_.slots * sizeof(int16_t)));
    const uint32_t at = page * g_.slotColumns;
    const uint32_t tagBytes = g_.slots * sizeof(int16_t);
    const uint32_t scaleBytes = g_.slots * sizeof(float);
    AscendC::DataCopyPad(to.ReinterpretCast<int16_t>()[at], tags, {1, tagBytes, 0, 0, 0},
                         AscendC::DataCopyPadExtParams<int16_t>{false, 0, 0, 0});
    AscendC::DataCopyPad(to.ReinterpretCast<float>()[kPatchLanes / 2 + at], scales,
                         {1, scaleBytes, 0, 0, 0},
                         AscendC::DataCopyPadExtParams<float>{false, 0, 0, 0.0f});
  }

  // Applies the rule of ops.quantise.valid_tags: scales of patches whose tag names a visible token
  // of their own slot, and that token's column; 0 and 0 elsewhere.
  __aicore__ inline void ValidPatches(const Floats& scales, const Floats& token, const Bytes& in,
                                      ColumnRange visible) {
    const uint32_t lanes = RoundUp(g_.patchColumns, kChunk);
    const int32_t n = static_cast<int32_t>(lanes);
    Floats slot = slots_.template Get<float>();
    Floats page = slot[kPatchLanes];
    Floats distance = token[kColumns];
    Floats turns = distance[kColumns];
    AscendC::Cast(token, in.ReinterpretCast<int16_t>(), AscendC::RoundMode::CAST_NONE, lanes);
    Barrier();
    AscendC::Adds(token, token, -1.0f, n);
    Barrier();
    AscendC::Sub(distance, token, slot, n);
    Bits mask = Inside(token, {0, static_cast<int32_t>(g_.blockSize)}, lanes);
    AscendC::Muls(turns, distance, 1.0f / static_cast<float>(g_.slots), n);
    AscendC::Add(token, token, page, n);
    Barrier();
    AscendC::Cast(turns, turns, AscendC::RoundMode::CAST_RINT, lanes);
    Barrier();
    AscendC::Axpy(distance, turns, -static_cast<float>(g_.slots), n);
    Barrier();
    Bits other = mask[kMaskBytes];
    Keep(mask, other, distance, 0.0f, AscendC::CMPMODE::EQ, lanes);
    Keep(mask, other, token, static_cast<float>(visible.begin), AscendC::CMPMODE::GE, lanes);
    Keep(mask, other, token, static_cast<float>(visible.end), AscendC::CMPMODE::LT, lanes);
    Choose(scales, mask, in.ReinterpretCast<float>()[kPatchLanes / 2], 0.0f, lanes);
    Choose(token, mask, token, 0.0f, lanes);
    Barrier();
    if (a_.patchCode == 0) {
      AscendC::Muls(scales, scales, 1.0f / kInt4Unit, n);
      Barrier();
    }
  }

  __aicore__ inline void Keep(const Bits& mask, const Bits& other, const Floats& values,
                              float bound, AscendC::CMPMODE mode, uint32_t count) {
    AscendC::CompareScalar(other, values, bound, mode, count);
    Barrier();
    Both(mask, other, count);
  }

  // K: the scale of each token's patch, found through the one slot that it can use.
  __aicore__ inline void ScalesOfTokens(const Floats& scales, const Floats& token) {
    const uint32_t columns = RoundUp(g_.tileTokens, kChunk);
    Floats result = out_.template AllocTensor<float>();
    Floats named = result[g_.columns];
    AscendC::Gather(result, scales, SlotOffsets(), 0u, columns);
    AscendC::Gather(named, token, SlotOffsets(), 0u, columns);
    Barrier();
    Bits mask = masks_.template Get<uint8_t>();
    AscendC::Compare(mask, named, Positions(), AscendC::CMPMODE::EQ, columns);
    Barrier();
    Choose(result, mask, result, 0.0f, columns);
    out_.EnQue(result);
    result = out_.template DeQue<float>();
    AscendC::DataCopy(arrays_[ArrayOffset(0)], result, columns);
    out_.FreeTensor(result);
  }

  // V: the scale of each slot's patch and where its token's weight lies.
  __aicore__ inline void ScalesOfSlots(const Floats& scales, const Floats& token) {
    const uint32_t lanes = RoundUp(g_.patchColumns, kChunk);
    const int32_t n = static_cast<int32_t>(lanes);
    Floats result = out_.template AllocTensor<float>();
    AscendC::LocalTensor<int32_t> offsets = result[g_.columns].ReinterpretCast<int32_t>();
    AscendC::Adds(result, scales, 0.0f, n);
    AscendC::Muls(token, token, static_cast<float>(sizeof(float)), n);
    Barrier();
    AscendC::Cast(offsets, token, AscendC::RoundMode::CAST_RINT, lanes);
    out_.EnQue(result);
    result = out_.template DeQue<float>();
    AscendC::DataCopy(arrays_[ArrayOffset(1)], result, lanes);
    AscendC::DataCopy(arrays_[ArrayOffset(2)], result[g_.columns], lanes);
    out_.FreeTensor(result);
  }

  // Writes the patches of a page as int8 rows.
  __aicore__ inline void Unpack(uint32_t page, GM_ADDR codes) {
    AscendC::GlobalTensor<uint8_t> from;
    from.SetGlobalBuffer((__gm__ uint8_t*)codes);
    const uint32_t count = g_.slots * g_.headDim;
    AscendC::LocalTensor<uint8_t> packed = codesIn_.template AllocTensor<uint8_t>();
    AscendC::DataCopy(packed, from, count / 2);
    codesIn_.EnQue(packed);
    packed = codesIn_.template DeQue<uint8_t>();
    AscendC::LocalTensor<half> values = values_.template Get<half>();
    AscendC::Cast(values, packed.template ReinterpretCast<AscendC::int4b_t>(),
                  AscendC::RoundMode::CAST_NONE, count);
    codesIn_.FreeTensor(packed);
    Barrier();
    if (a_.patchCode == 0) {
      AscendC::Muls(values, values, static_cast<half>(kInt4Unit), static_cast<int32_t>(count));
      Barrier();
    } else {
      Exponents(values, values[kMaxSlots * kMaxHeadDim], count);
    }
    Bytes result = codesOut_.template AllocTensor<int8_t>();
    AscendC::Cast(result, values, AscendC::RoundMode::CAST_RINT, count);
    Barrier();
    codesOut_.EnQue(result);
    result = codesOut_.template DeQue<int8_t>();
    const uint64_t to = (uint64_t{place_} * 2 + plane_) * g_.patchColumns * g_.headDim;
    AscendC::DataCopy(patches_[to + page * g_.slotColumns * g_.headDim], result, count);
    codesOut_.FreeTensor(result);
  }

  // Turns nibbles that were read as int4 into what E3M0 means by them: the sign, and 2 to the
  // exponent less 1; 0 for the exponent 0, whose 0.5 the following cast rounds to 0. It builds the
  // bits of a half: 2^(e - 1) has the exponent field e + 14.
  __aicore__ inline void Exponents(const AscendC::LocalTensor<half>& values,
                                   const AscendC::LocalTensor<half>& scratch, uint32_t count) {
    const int32_t n = static_cast<int32_t>(count);
    AscendC::LocalTensor<int16_t> nibbles = scratch.ReinterpretCast<int16_t>();
    AscendC::LocalTensor<uint16_t> bits = scratch.ReinterpretCast<uint16_t>();
    AscendC::LocalTensor<int16_t> fields = values.ReinterpretCast<int16_t>();
    AscendC::LocalTensor<uint16_t> result = values.ReinterpretCast<uint16_t>();
    AscendC::Cast(nibbles, values, AscendC::RoundMode::CAST_RINT, count);
    Barrier();
    AscendC::ShiftLeft(result, bits, uint16_t{13}, n);
    Barrier();
    AscendC::ShiftRight(result, result, uint16_t{13}, n);  // exponent
    AscendC::ShiftRight(bits, bits, uint16_t{15}, n);      // sign
    Barrier();
    AscendC::Adds(fields, fields, int16_t{14}, n);
    AscendC::ShiftLeft(bits, bits, uint16_t{15}, n);
    Barrier();
    AscendC::ShiftLeft(result, result, uint16_t{10}, n);
    Barrier();
    AscendC::Or(result, result, bits, n);
    Barrier();
  }

  Arguments a_;
  attention_tiling::Geometry g_;
  uint32_t plane_;  // 0: K, 1: V
  uint32_t place_ = 0;
  uint32_t tiles_ = 0;
  AscendC::GlobalTensor<int32_t> table_;
  AscendC::GlobalTensor<float> arrays_;
  AscendC::GlobalTensor<int8_t> patches_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> in_;
  AscendC::TQue<AscendC::TPosition::VECIN, 2> codesIn_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> out_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 2> codesOut_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> positions_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> masks_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> values_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> lanes_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> slots_;
};

}  // namespace paged_attention_c8

#endif  // ASCEND_PLUGIN_PAGED_ATTENTION_C8_EXTRAS_H_
