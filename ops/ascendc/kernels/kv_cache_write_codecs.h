// What kv_cache_write does with a tile: the rows of one token, of some neighbouring heads. One
// codec per kind of page; Writer (kv_cache_write_split.h) calls them:
//   Init, then for each part: Open, for each token: CopyIn, Write, then Close; at the end Finish.
// CopyIn of the next token comes before Write of this one, so copies overlap arithmetic.
#pragma once

#include "kv_cache_scales.h"
#include "kv_cache_write_split.h"

namespace kv_cache {

// Codes of a tile lie in GM as rows of 32 bytes, heads * columns of them, block_size rows apart.
struct PageGeometry {
  uint32_t kvHeads, headDim, blockSize;

  __aicore__ inline void Init(const WriteArguments& args) {
    kvHeads = args.kvHeads;
    headDim = args.headDim;
    blockSize = args.blockSize;
  }
  __aicore__ inline uint64_t Plane(const Part& part, const Place& place) const {
    return 2ull * place.block + part.plane;
  }
  // Which (plane, kv head) the first row of a tile belongs to.
  __aicore__ inline uint64_t Run(const Part& part, const Place& place) const {
    return Plane(part, place) * kvHeads + part.firstHead;
  }
  // Element of the pages at which a tile begins; `group` elements are 32 bytes.
  __aicore__ inline uint64_t First(const Part& part, const Place& place, uint32_t group) const {
    return (Run(part, place) * headDim / group * blockSize + place.offset) * group;
  }
  __aicore__ inline DataCopyParams Scatter(const Part& part, uint32_t group) const {
    const uint16_t rows = part.heads * headDim / group, gap = blockSize - 1;
    return DataCopyParams(rows, 1, 0, gap);
  }
};

// Keys and values in GM: element (t, h, d) at t * stride + h * head_dim + d.
template <typename T>
struct Activations {
  GlobalTensor<T> rows[2];
  uint64_t stride[2];
  uint32_t headDim;

  __aicore__ inline void Init(const WriteArguments& args) {
    rows[0].SetGlobalBuffer(reinterpret_cast<__gm__ T*>(args.key));
    rows[1].SetGlobalBuffer(reinterpret_cast<__gm__ T*>(args.value));
    stride[0] = args.keyStride;
    stride[1] = args.valueStride;
    headDim = args.headDim;
  }
  template <class Queue>
  __aicore__ inline void CopyIn(Queue& queue, const Part& part, uint32_t token) {
    LocalTensor<T> tile = queue.template AllocTensor<T>();
    const uint64_t first = token * stride[part.plane] + part.firstHead * headDim;
    DataCopy(tile, rows[part.plane][first], part.heads * headDim);
    queue.EnQue(tile);
  }
};

// Rows written, saturated, patched, overflowed, added to this core's 32 bytes of int64 [cores][4].
struct Counters {
  GlobalTensor<int32_t> target;
  TBuf<TPosition::VECCALC> buffer;
  int64_t counts[4] = {0, 0, 0, 0};
  bool wanted = false;

  __aicore__ inline void Init(TPipe& pipe, const WriteArguments& args) {
    wanted = args.counters != nullptr;
    target.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(args.counters) +
                           GetBlockIdx() * kBlock);
    pipe.InitBuffer(buffer, sizeof(counts));
  }
  __aicore__ inline void Add() {
    const LocalTensor<int32_t> raw = buffer.Get<int32_t>();
    const LocalTensor<int64_t> totals = buffer.Get<int64_t>();
    DataCopy(raw, target, kBlock);
    SetFlag<HardEvent::MTE2_S>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_S>(EVENT_ID0);
    for (uint32_t i = 0; i < 4; ++i) {
      totals.SetValue(i, totals.GetValue(i) + counts[i]);
    }
    SetFlag<HardEvent::S_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::S_MTE3>(EVENT_ID0);
    DataCopy(target, raw, kBlock);
  }
};

// Pages without quantisation: bytes move from GM through UB to GM, and no unit computes.
template <typename T>
class CopyCodec {
 public:
  static constexpr bool kSharesSlots = false;

  __aicore__ inline void Init(TPipe& pipe, const WriteArguments& args, uint32_t heads) {
    geometry_.Init(args);
    source_.Init(args);
    pages_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(args.pages));
    pipe.InitBuffer(tiles_, 2, heads * args.headDim * sizeof(T));
  }
  __aicore__ inline void Open(const Part& part) { part_ = part; }
  __aicore__ inline void CopyIn(uint32_t token) { source_.CopyIn(tiles_, part_, token); }
  __aicore__ inline void Write(const Place& place) {
    constexpr uint32_t group = kRowBytes / sizeof(T);
    LocalTensor<T> tile = tiles_.DeQue<T>();
    DataCopy(pages_[geometry_.First(part_, place, group)], tile, geometry_.Scatter(part_, group));
    tiles_.FreeTensor(tile);
  }
  __aicore__ inline void Close() {}
  __aicore__ inline void Finish() {}

 private:
  PageGeometry geometry_;
  Activations<T> source_;
  GlobalTensor<T> pages_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 2> tiles_;
  Part part_;
};

// What int8 codecs share: activations as float32, codes on their way to the pages.
template <typename T>
class Int8Codec {
 public:
  __aicore__ inline void CopyIn(uint32_t token) { source_.CopyIn(input_, part_, token); }

 protected:
  __aicore__ inline void InitShared(TPipe& pipe, const WriteArguments& args, uint32_t heads) {
    const uint32_t size = heads * args.headDim;
    geometry_.Init(args);
    source_.Init(args);
    counters_.Init(pipe, args);
    pages_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args.pages));
    pipe.InitBuffer(input_, 2, size * sizeof(T));
    pipe.InitBuffer(codes_, 2, size);
    pipe.InitBuffer(row_, WholeRepeats(size) * sizeof(float));
    pipe.InitBuffer(scratch_, WholeRepeats(size) * sizeof(float));
    pipe.InitBuffer(narrow_, size * sizeof(int16_t) * 2);
    pipe.InitBuffer(mask_, WholeRepeats(size) / 8);
    pipe.InitBuffer(rowMask_, kRowBytes);
    pipe.InitBuffer(numbers_, 3 * kMaxRows * sizeof(float));
    pipe.InitBuffer(spread_, kMaxRows * kRowBytes);
  }
  __aicore__ inline void OpenShared(const Part& part) {
    part_ = part;
    tile_ = {part.heads, geometry_.headDim};
    size_ = tile_.Size();
  }

  // Scratch memory: a tile of float32, another, bits of its elements; bits and numbers of its rows.
  __aicore__ inline LocalTensor<float> Row() { return row_.Get<float>(); }
  __aicore__ inline LocalTensor<float> Scratch() { return scratch_.Get<float>(); }
  __aicore__ inline LocalTensor<uint8_t> Mask() { return mask_.Get<uint8_t>(); }
  __aicore__ inline LocalTensor<uint8_t> RowMask() { return rowMask_.Get<uint8_t>(); }
  __aicore__ inline LocalTensor<float> Number(uint32_t index) {
    return numbers_.Get<float>()[index * kMaxRows];
  }
  __aicore__ inline LocalTensor<float> Spread() { return spread_.Get<float>(); }

  // The next tile as float32 in row_.
  __aicore__ inline void Widen() {
    LocalTensor<T> tile = input_.DeQue<T>();
    Cast(Row(), tile, RoundMode::CAST_NONE, size_);
    input_.FreeTensor(tile);
    PipeBarrier<PIPE_V>();
    counters_.counts[0] += tile_.rows;
  }

  // Multiplies of scales, float32, to the nearest integers, int16; NaN becomes 0, as Cast has it,
  // and what int16 cannot hold its limits.
  __aicore__ inline LocalTensor<int16_t> Rounded(const LocalTensor<float>& multiples) {
    const LocalTensor<int16_t> rounded = narrow_.Get<int16_t>();
    Cast(rounded, multiples, RoundMode::CAST_RINT, size_);
    PipeBarrier<PIPE_V>();
    return rounded;
  }

  // Sends codes within -127 .. 127 on their way; int8 is made from half only.
  __aicore__ inline void Narrow(const LocalTensor<int16_t>& rounded) {
    const LocalTensor<half> halves = narrow_.Get<half>()[size_];
    Cast(halves, rounded, RoundMode::CAST_NONE, size_);
    LocalTensor<int8_t> codes = codes_.AllocTensor<int8_t>();
    PipeBarrier<PIPE_V>();
    Cast(codes, halves, RoundMode::CAST_RINT, size_);
    codes_.EnQue(codes);
  }

  __aicore__ inline void CopyOut(const Place& place) {
    LocalTensor<int8_t> codes = codes_.DeQue<int8_t>();
    DataCopy(pages_[geometry_.First(part_, place, kRowBytes)], codes,
             geometry_.Scatter(part_, kRowBytes));
    codes_.FreeTensor(codes);
  }

  PageGeometry geometry_;
  Activations<T> source_;
  GlobalTensor<int8_t> pages_;
  TQue<TPosition::VECIN, 2> input_;
  TQue<TPosition::VECOUT, 2> codes_;
  TBuf<TPosition::VECCALC> row_, scratch_, narrow_, mask_, rowMask_, numbers_, spread_;
  Counters counters_;
  Part part_;
  Tile tile_;
  uint32_t size_ = 0;
};

// C8D: a scale per row, the largest magnitude / 127. Keys are rotated first.
template <typename T>
class DynamicCodec : public Int8Codec<T> {
 public:
  static constexpr bool kSharesSlots = false;

  __aicore__ inline void Init(TPipe& pipe, const WriteArguments& args, uint32_t heads) {
    this->InitShared(pipe, args, heads);
    scaleTarget_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(args.extras));
    pipe.InitBuffer(scales_, 2, RoundUp(heads, kBlock) * kRowBytes);
  }
  __aicore__ inline void Open(const Part& part) { this->OpenShared(part); }
  __aicore__ inline void Write(const Place& place) {
    const LocalTensor<float> row = this->Row();
    const LocalTensor<float> spread = this->Spread();
    const LocalTensor<float> scales = this->Number(1), inverse = this->Number(2);
    this->Widen();
    if (this->part_.plane == 0) {
      Rotate(row, this->Scratch(), this->tile_);
    }
    Scales(row, scales, inverse);
    CopyOutScales(place);
    SpreadOverBlocks(spread, inverse, this->tile_.rows);
    MultiplyRows(row, row, spread, this->tile_);
    this->Narrow(this->Rounded(row));
    this->CopyOut(place);
  }
  __aicore__ inline void Close() {}
  __aicore__ inline void Finish() {
    if (this->counters_.wanted) {
      this->counters_.Add();
    }
  }

 private:
  // Scales of a tile's rows, sent on their way, and their reciprocals.
  //
  // What the chip's maximum makes of a NaN is not relied on: every magnitude that is not finite
  // becomes infinity first. Then so does the scale of its row, whose reciprocal is 0, so that codes
  // are 0 (0 * infinity is NaN, which becomes 0); and infinity * 0 turns that scale into NaN.
  __aicore__ inline void Scales(const LocalTensor<float>& row, const LocalTensor<float>& scales,
                                const LocalTensor<float>& inverse) {
    const LocalTensor<float> magnitudes = this->Scratch();
    const LocalTensor<float> largest = this->Number(0);
    const LocalTensor<uint8_t> finite = this->Mask();
    const uint32_t whole = WholeRepeats(this->size_);
    const float infinity = __builtin_inff();
    Abs(magnitudes, row, this->size_);
    PipeBarrier<PIPE_V>();
    CompareScalar(finite, magnitudes, infinity, CMPMODE::LT, whole);
    PipeBarrier<PIPE_V>();
    Select(magnitudes, finite, magnitudes, infinity, SELMODE::VSEL_TENSOR_SCALAR_MODE, whole);
    PipeBarrier<PIPE_V>();
    LargestOfRows(largest, magnitudes, this->tile_);
    ScalesOfRows(scales, inverse, this->RowMask(), largest, kMaxCode);
    Muls(largest, scales, 0.0f, kMaxRows);
    PipeBarrier<PIPE_V>();
    Add(scales, scales, largest, kMaxRows);
    LocalTensor<float> out = scales_.AllocTensor<float>();
    PipeBarrier<PIPE_V>();
    SpreadOverBlocks(out, scales, this->tile_.rows);
    scales_.EnQue(out);
  }

  // Four bytes per head: their neighbours are other tokens' scales, which other cores write.
  __aicore__ inline void CopyOutScales(const Place& place) {
    LocalTensor<float> scales = scales_.DeQue<float>();
    const uint32_t pitch = this->geometry_.blockSize;
    const uint64_t first = this->geometry_.Run(this->part_, place) * pitch + place.offset;
    const uint32_t gap = (pitch - 1) * sizeof(float);
    DataCopyPad(scaleTarget_[first], scales,
                DataCopyExtParams(this->tile_.rows, sizeof(float), 0, gap, 0));
    scales_.FreeTensor(scales);
  }

  GlobalTensor<float> scaleTarget_;
  TQue<TPosition::VECOUT, 2> scales_;
};

// C8S: a static scale per channel. The base of PatchedCodec (kv_cache_write_patches.h), too.
template <typename T>
class StaticCodec : public Int8Codec<T> {
 public:
  static constexpr bool kSharesSlots = false;

  __aicore__ inline void Init(TPipe& pipe, const WriteArguments& args, uint32_t heads) {
    const uint32_t size = heads * args.headDim;
    this->InitShared(pipe, args, heads);
    channelSource_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(args.channelScales));
    pipe.InitBuffer(channels_, 1, size * sizeof(float));
    pipe.InitBuffer(inverse_, size * sizeof(float));
    pipe.InitBuffer(multiples_, size * sizeof(float));
    pipe.InitBuffer(saturated_, kMaxRows * sizeof(float));
    Duplicate(saturated_.Get<float>(), 0.0f, kMaxRows);
  }

  // Loads the scales of the part's channels; PatchedCodec needs them until Close.
  __aicore__ inline void Open(const Part& part) {
    this->OpenShared(part);
    const uint32_t heads = part.plane * this->geometry_.kvHeads + part.firstHead;
    LocalTensor<float> loading = channels_.AllocTensor<float>();
    DataCopy(loading, channelSource_[heads * this->geometry_.headDim], this->size_);
    channels_.EnQue(loading);
    scales_ = channels_.DeQue<float>();
    const LocalTensor<float> inverse = inverse_.Get<float>();
    Duplicate(inverse, 1.0f, this->size_);
    PipeBarrier<PIPE_V>();
    Div(inverse, inverse, scales_, this->size_);  // used behind Widen's barrier
  }
  __aicore__ inline void Write(const Place& place) {
    Encode();
    this->CopyOut(place);
  }
  __aicore__ inline void Close() { channels_.FreeTensor(scales_); }
  __aicore__ inline void Finish() {
    if (!this->counters_.wanted) {
      return;
    }
    const LocalTensor<float> sum = this->Number(0);
    WholeReduceSum(sum, saturated_.Get<float>(), kMaxRows, 1, 1, 1, kBlock);
    SetFlag<HardEvent::V_S>(EVENT_ID0);
    WaitFlag<HardEvent::V_S>(EVENT_ID0);
    this->counters_.counts[1] += static_cast<int32_t>(sum.GetValue(0));
    this->counters_.Add();
  }

 protected:
  // Codes of the next tile, which go on their way. Leaves rows in row_, their multiples of the
  // channels' scales in multiples_, and returns the codes, clamped.
  __aicore__ inline LocalTensor<int16_t> Encode() {
    const LocalTensor<float> multiples = Multiples();
    const int16_t limit = kMaxCode, other = -limit;
    this->Widen();
    Mul(multiples, this->Row(), inverse_.Get<float>(), this->size_);
    PipeBarrier<PIPE_V>();
    CountSaturated(multiples);
    const LocalTensor<int16_t> codes = this->Rounded(multiples);
    Mins(codes, codes, limit, this->size_);
    PipeBarrier<PIPE_V>();
    Maxs(codes, codes, other, this->size_);
    PipeBarrier<PIPE_V>();
    this->Narrow(codes);
    return codes;
  }

  __aicore__ inline LocalTensor<float> Multiples() { return multiples_.Get<float>(); }

  GlobalTensor<float> channelSource_;
  TQue<TPosition::VECIN, 1> channels_;
  TBuf<TPosition::VECCALC> inverse_, multiples_, saturated_;
  LocalTensor<float> scales_;

 private:
  // A row saturates if a multiple rounds beyond 127, which 127.5 does, or is NaN: then no
  // comparison holds, and 128 stands for it. Rows are counted on the vector unit, by their place
  // in the tile, so that no scalar waits for it.
  __aicore__ inline void CountSaturated(const LocalTensor<float>& multiples) {
    const LocalTensor<float> magnitudes = this->Scratch();
    const LocalTensor<float> largest = this->Number(0), ones = this->Number(1);
    const LocalTensor<float> saturated = saturated_.Get<float>();
    const LocalTensor<uint8_t> inside = this->Mask();
    const LocalTensor<uint8_t> beyond = this->RowMask();
    const uint32_t whole = WholeRepeats(this->size_);
    const float limit = kMaxCode + 0.5f, outside = kMaxCode + 1.0f;
    Abs(magnitudes, multiples, this->size_);
    PipeBarrier<PIPE_V>();
    CompareScalar(inside, magnitudes, limit, CMPMODE::LT, whole);
    PipeBarrier<PIPE_V>();
    Select(magnitudes, inside, magnitudes, outside, SELMODE::VSEL_TENSOR_SCALAR_MODE, whole);
    PipeBarrier<PIPE_V>();
    LargestOfRows(largest, magnitudes, this->tile_);
    CompareScalar(beyond, largest, limit, CMPMODE::GE, kMaxRows);
    Duplicate(ones, 1.0f, kMaxRows);
    PipeBarrier<PIPE_V>();
    Select(largest, beyond, ones, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, kMaxRows);
    PipeBarrier<PIPE_V>();
    Add(saturated, saturated, largest, static_cast<int32_t>(this->tile_.rows));
  }
};

}  // namespace kv_cache
