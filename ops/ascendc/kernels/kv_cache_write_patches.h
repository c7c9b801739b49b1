// C8P: as C8S, and rows whose relative error exceeds a threshold get a patch: their residual in 4
// bits per element with a scale (docs/pages.md, "Slots of patches").
#pragma once

#include "kv_cache_pool.h"
#include "kv_cache_write_codecs.h"

namespace kv_cache {

template <typename T>
class PatchedCodec : public StaticCodec<T> {
 public:
  static constexpr bool kSharesSlots = true;

  __aicore__ inline void Init(TPipe& pipe, const WriteArguments& args, uint32_t heads) {
    StaticCodec<T>::Init(pipe, args, heads);
    pool_.Init(args.blockSize, args.headDim);
    tagTarget_.SetGlobalBuffer(reinterpret_cast<__gm__ int16_t*>(args.extras));
    scaleTarget_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(args.extras));
    codeTarget_.SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(args.extras));
    thresholds_[0] = args.keyThreshold * args.keyThreshold;
    thresholds_[1] = args.valueThreshold * args.valueThreshold;
    exponents_ = args.patchCode != 0;
    pipe.InitBuffer(tags_, heads * kRowBytes);
    pipe.InitBuffer(patches_, 2, kRowBytes + RoundUp(pool_.codeBytes, kRowBytes));
    pipe.InitBuffer(nibbles_, 3 * args.headDim * sizeof(int32_t));
    pipe.InitBuffer(fifteens_, args.headDim * sizeof(int16_t));
    Duplicate(fifteens_.Get<int16_t>(), static_cast<int16_t>(15), args.headDim);
    SetFlag<HardEvent::MTE3_MTE2>(EVENT_ID0);  // as if tags had been stored
  }

  __aicore__ inline void Write(const Place& place) {
    LoadTags(place);
    const LocalTensor<int16_t> codes = this->Encode();
    FindOutliers(codes);
    this->CopyOut(place);
    SetFlag<HardEvent::V_S>(EVENT_ID0);
    WaitFlag<HardEvent::V_S>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_S>(EVENT_ID0);
    Patch(place);
    StoreTags(place);
  }

  __aicore__ inline void Finish() {
    WaitFlag<HardEvent::MTE3_MTE2>(EVENT_ID0);
    StaticCodec<T>::Finish();
  }

 private:
  __aicore__ inline DataCopyExtParams TagCopy(bool in) const {
    const uint32_t gap = pool_.poolBytes - sizeof(int16_t);
    return DataCopyExtParams(this->tile_.rows, sizeof(int16_t), in ? gap : 0, in ? 0 : gap, 0);
  }

  // The tags of a tile's rows, each in a block of its own. The ones before must have been stored:
  // they leave the same UB, and may be the very tags that are read now.
  __aicore__ inline void LoadTags(const Place& place) {
    const uint64_t run = this->geometry_.Run(this->part_, place);
    const uint64_t first = pool_.Tag(run, place.offset % pool_.slots) / sizeof(int16_t);
    WaitFlag<HardEvent::MTE3_MTE2>(EVENT_ID0);
    DataCopyPad(tags_.Get<int16_t>(), tagTarget_[first], TagCopy(true),
                DataCopyPadExtParams<int16_t>());
    SetFlag<HardEvent::MTE2_S>(EVENT_ID0);
  }

  __aicore__ inline void StoreTags(const Place& place) {
    const uint64_t run = this->geometry_.Run(this->part_, place);
    const uint64_t first = pool_.Tag(run, place.offset % pool_.slots) / sizeof(int16_t);
    SetFlag<HardEvent::S_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::S_MTE3>(EVENT_ID0);
    DataCopyPad(tagTarget_[first], tags_.Get<int16_t>(), TagCopy(false));
    SetFlag<HardEvent::MTE3_MTE2>(EVENT_ID0);
  }

  // Bit r of rowMask_: |x - x'|^2 > threshold^2 * |x|^2 for row r; false if either is NaN. Leaves
  // residuals, in units of the channels' scales, in multiples_.
  __aicore__ inline void FindOutliers(const LocalTensor<int16_t>& codes) {
    const LocalTensor<float> row = this->Row();
    const LocalTensor<float> residual = this->Multiples();
    const LocalTensor<float> terms = this->Scratch();
    const LocalTensor<float> error = this->Number(0), allowed = this->Number(1);
    const uint32_t size = this->size_;
    Cast(terms, codes, RoundMode::CAST_NONE, size);
    PipeBarrier<PIPE_V>();
    Sub(residual, residual, terms, size);
    PipeBarrier<PIPE_V>();
    Mul(terms, residual, this->scales_, size);
    PipeBarrier<PIPE_V>();
    Mul(terms, terms, terms, size);
    PipeBarrier<PIPE_V>();
    SumsOfRows(error, terms, this->tile_);
    Mul(terms, row, row, size);
    PipeBarrier<PIPE_V>();
    SumsOfRows(allowed, terms, this->tile_);
    Muls(allowed, allowed, thresholds_[this->part_.plane], kMaxRows);
    PipeBarrier<PIPE_V>();
    Compare(this->RowMask(), error, allowed, CMPMODE::GT, kMaxRows);
  }

  // The table of docs/pages.md for each row; tags change in UB.
  __aicore__ inline void Patch(const Place& place) {
    const LocalTensor<int16_t> tags = tags_.Get<int16_t>();
    const uint64_t outliers = this->RowMask().template ReinterpretCast<uint64_t>().GetValue(0);
    const uint32_t slot = place.offset % pool_.slots;
    for (uint32_t row = 0; row < this->tile_.rows; ++row) {
      const uint32_t place16 = row * (kRowBytes / sizeof(int16_t));
      const int32_t token = place.offset, tag = tags.GetValue(place16);
      const bool taken = 1 <= tag && tag <= token && (tag - 1) % pool_.slots == slot;
      const bool outlier = outliers >> row & 1;
      if (taken) {
        this->counters_.counts[3] += outlier;
        continue;
      }
      if (outlier) {
        WritePatch(this->geometry_.Run(this->part_, place) + row, row, slot);
        this->counters_.counts[2] += 1;
      }
      tags.SetValue(place16, static_cast<int16_t>(outlier ? token + 1 : 0));
    }
  }

  __aicore__ inline void WritePatch(uint64_t run, uint32_t row, uint32_t slot) {
    LocalTensor<uint8_t> coded = patches_.AllocTensor<uint8_t>();
    EncodePatch(coded, this->Multiples()[row * this->tile_.dim]);
    patches_.EnQue(coded);
    LocalTensor<uint8_t> patch = patches_.DeQue<uint8_t>();
    DataCopyPad(scaleTarget_[pool_.Scale(run, slot) / sizeof(float)],
                patch.ReinterpretCast<float>(), DataCopyExtParams(1, sizeof(float), 0, 0, 0));
    DataCopyPad(codeTarget_[pool_.Codes(run, slot)], patch[kRowBytes],
                DataCopyExtParams(1, pool_.codeBytes, 0, 0, 0));
    patches_.FreeTensor(patch);
  }

  // patch: the scale, float32, in the first 32 bytes; then codes, two in a byte.
  __aicore__ inline void EncodePatch(const LocalTensor<uint8_t>& patch,
                                     const LocalTensor<float>& residual) {
    const LocalTensor<float> units = this->Scratch();
    const LocalTensor<float> spread = this->Spread();
    const LocalTensor<float> largest = this->Number(0), inverse = this->Number(2);
    const LocalTensor<float> scales = this->Number(1);
    const Tile one = {1, this->tile_.dim};
    Abs(units, residual, one.dim);
    PipeBarrier<PIPE_V>();
    LargestOfRows(largest, units, one);
    ScalesOfRows(scales, inverse, this->RowMask(), largest, exponents_ ? 64.0f : 7.0f);
    SpreadOverBlocks(spread, inverse, 1);
    Adds(patch.ReinterpretCast<float>(), scales, 0.0f, 1);
    MultiplyRows(units, residual, spread, one);
    Pack(patch[kRowBytes], exponents_ ? Exponents(units) : Integers(units));
  }

  // Nibbles of int4: two's complement of the nearest integer, which is at most 7.
  __aicore__ inline LocalTensor<int16_t> Integers(const LocalTensor<float>& units) {
    const LocalTensor<int16_t> nibbles = nibbles_.Get<int16_t>();
    Cast(nibbles, units, RoundMode::CAST_RINT, this->tile_.dim);
    PipeBarrier<PIPE_V>();
    And(nibbles, nibbles, fifteens_.Get<int16_t>(), this->tile_.dim);
    PipeBarrier<PIPE_V>();
    return nibbles;
  }

  // Nibbles of e3m0: a sign (8) and an exponent e. Magnitudes up to 0.5 are 0, then e = 1 up
  // to 1.5, 2 up to 3, 3 up to 6 ...; from 1.5 on that is the exponent of the float32 whose bits
  // are counted from just above 1.5.
  __aicore__ inline LocalTensor<int16_t> Exponents(const LocalTensor<float>& units) {
    const uint32_t dim = this->tile_.dim;
    const int32_t above = 0x3fc00001;  // the bits of the first number beyond 1.5
    const LocalTensor<int32_t> counted = nibbles_.Get<int32_t>();
    const LocalTensor<int32_t> some = counted[dim], signs = counted[2 * dim];
    Abs(counted.ReinterpretCast<float>(), units, dim);
    ShiftRight(signs, units.ReinterpretCast<int32_t>(), 31, dim);  // -1 or 0
    PipeBarrier<PIPE_V>();
    Cast(some, counted.ReinterpretCast<float>(), RoundMode::CAST_RINT, dim);
    PipeBarrier<PIPE_V>();
    Adds(counted, counted, -above, dim);
    Mins(some, some, 1, dim);  // whether the magnitude exceeds 0.5
    PipeBarrier<PIPE_V>();
    ShiftRight(counted, counted, 23, dim);
    Mul(signs, signs, some, dim);
    PipeBarrier<PIPE_V>();
    Adds(counted, counted, 2, dim);
    Muls(signs, signs, -8, dim);
    PipeBarrier<PIPE_V>();
    Max(counted, counted, some, dim);
    PipeBarrier<PIPE_V>();
    Add(counted, counted, signs, dim);
    PipeBarrier<PIPE_V>();
    const LocalTensor<int16_t> nibbles = some.ReinterpretCast<int16_t>();
    Cast(nibbles, counted, RoundMode::CAST_NONE, dim);
    PipeBarrier<PIPE_V>();
    return nibbles;
  }

  // Puts two neighbours, 0 to 15 each, into a byte: the even column in the low half.
  __aicore__ inline void Pack(const LocalTensor<uint8_t>& bytes,
                              const LocalTensor<int16_t>& nibbles) {
    const uint32_t dim = this->tile_.dim, pairs = dim / 2;
    const LocalTensor<int16_t> even = this->Spread().template ReinterpretCast<int16_t>();
    const LocalTensor<int16_t> odd = even[pairs];
    const LocalTensor<half> halves = this->Spread().template ReinterpretCast<half>()[dim];
    uint64_t kept = 0;
    GatherMask(even, nibbles, 1, true, dim, GatherMaskParams(1, 1, 8, 0), kept);
    GatherMask(odd, nibbles, 2, true, dim, GatherMaskParams(1, 1, 8, 0), kept);
    PipeBarrier<PIPE_V>();
    Muls(odd, odd, static_cast<int16_t>(16), pairs);
    PipeBarrier<PIPE_V>();
    Add(even, even, odd, pairs);
    PipeBarrier<PIPE_V>();
    Cast(halves, even, RoundMode::CAST_NONE, pairs);
    PipeBarrier<PIPE_V>();
    Cast(bytes, halves, RoundMode::CAST_RINT, pairs);
  }

  PoolGeometry pool_;
  GlobalTensor<int16_t> tagTarget_;
  GlobalTensor<float> scaleTarget_;
  GlobalTensor<uint8_t> codeTarget_;
  TQue<TPosition::VECOUT, 2> patches_;
  TBuf<TPosition::VECCALC> tags_, nibbles_, fifteens_;
  float thresholds_[2];
  bool exponents_ = false;
};

}  // namespace kv_cache
