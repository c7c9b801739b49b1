// Queries of paged_attention_c8: brought to what the codes of K mean, then to 16 bits in two
// halves.
//
// c8s and c8p multiply by K's channel scales. c8d applies the Walsh-Hadamard transform of
// ops.quantise.rotate, as the writer did to K: strides of 1, 2 and 4 mix elements of one 32-byte
// block and go through Gather, x[i] * sign + x[i ^ stride]; longer ones are whole blocks apart.
#ifndef ASCEND_PLUGIN_PAGED_ATTENTION_C8_QUERY_H_
#define ASCEND_PLUGIN_PAGED_ATTENTION_C8_QUERY_H_

#include "paged_attention_c8_rows.h"

namespace paged_attention_c8 {

// Rotates rows of `headDim` channels.
class Rotation {
  static constexpr uint32_t kSmallStrides = 3;  // 1, 2, 4
  static constexpr uint32_t kRowsAtOnce = 8;    // 8 * 256 / 16 repeats, at most 255 are allowed

 public:
  __aicore__ inline void Init(AscendC::TPipe& pipe, uint32_t headDim) {
    headDim_ = headDim;
    channels_ = headDim & (~headDim + 1);
    pipe.InitBuffer(partners_, kSmallStrides * headDim * sizeof(uint32_t));
    pipe.InitBuffer(signs_, kSmallStrides * headDim * sizeof(float));
  }

  __aicore__ inline uint32_t Channels() const { return channels_; }

  // Fills the tables for Gather. `scratch` holds three rows.
  __aicore__ inline void Tables(const Floats& scratch) {
    const int32_t n = static_cast<int32_t>(headDim_);
    AscendC::LocalTensor<int32_t> index = scratch.ReinterpretCast<int32_t>();
    AscendC::LocalTensor<int32_t> bit = index[headDim_];
    AscendC::LocalTensor<int32_t> above = index[2 * headDim_];
    AscendC::CreateVecIndex(index, 0, headDim_);
    Barrier();
    for (int32_t i = 0; i < static_cast<int32_t>(kSmallStrides); ++i) {
      AscendC::LocalTensor<int32_t> partner =
          partners_.Get<int32_t>()[static_cast<uint32_t>(i) * headDim_];
      Floats sign = signs_.Get<float>()[static_cast<uint32_t>(i) * headDim_];
      AscendC::ShiftRight(bit, index, i, n);
      AscendC::ShiftRight(above, index, i + 1, n);
      Barrier();
      AscendC::Muls(above, above, -2, n);
      Barrier();
      AscendC::Add(bit, bit, above, n);  // bit i of the index
      AscendC::Muls(partner, index, 4, n);
      Barrier();
      AscendC::Cast(sign, bit, AscendC::RoundMode::CAST_NONE, headDim_);
      AscendC::Muls(above, bit, -(8 << i), n);
      AscendC::Adds(partner, partner, 4 << i, n);
      Barrier();
      AscendC::Muls(sign, sign, -2.0f, n);
      AscendC::Add(partner, partner, above, n);  // byte offset of index ^ (1 << i)
      Barrier();
      AscendC::Adds(sign, sign, 1.0f, n);
    }
  }

  // Rotates `rows` of x; `other` is as large. Returns which of both holds the result.
  __aicore__ inline Floats Rotate(Floats x, Floats other, uint32_t rows) {
    const int32_t count = static_cast<int32_t>(rows * headDim_);
    for (uint32_t i = 0; i < kSmallStrides; ++i) {
      AscendC::LocalTensor<uint32_t> partner = partners_.Get<uint32_t>()[i * headDim_];
      for (uint32_t r = 0; r < rows; ++r) {
        AscendC::Gather(other[r * headDim_], x, partner,
                        static_cast<uint32_t>(r * headDim_ * sizeof(float)), headDim_);
      }
      Barrier();
      MulColumns(x, x, signs_.Get<float>()[i * headDim_], {rows, headDim_, headDim_});
      Barrier();
      AscendC::Add(x, x, other, count);
      Barrier();
    }
    for (uint32_t stride = kBlock; stride < channels_; stride *= 2) {
      for (uint32_t r = 0; r < rows; r += kRowsAtOnce) {
        Butterfly(other[r * headDim_], x[r * headDim_], Min(kRowsAtOnce, rows - r), stride);
      }
      Barrier();
      const Floats swapped = x;
      x = other;
      other = swapped;
    }
    return x;
  }

 private:
  // to[a] = x[a] + x[b], to[b] = x[a] - x[b] for every pair `stride` apart.
  __aicore__ inline void Butterfly(const Floats& to, const Floats& x, uint32_t rows,
                                   uint32_t stride) {
    const uint8_t pairs = static_cast<uint8_t>(rows * headDim_ / (2 * stride));
    const uint8_t step = static_cast<uint8_t>(2 * stride / kBlock);
    for (uint32_t at = 0; at < stride; at += kChunk) {
      const uint64_t width = Min(kChunk, stride - at);
      const AscendC::BinaryRepeatParams repeat{1, 1, 1, step, step, step};
      AscendC::Add(to[at], x[at], x[at + stride], width, pairs, repeat);
      AscendC::Sub(to[at + stride], x[at], x[at + stride], width, pairs, repeat);
    }
  }

  uint32_t headDim_;
  uint32_t channels_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> partners_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> signs_;
};

}  // namespace paged_attention_c8

#endif  // ASCEND_PLUGIN_PAGED_ATTENTION_C8_QUERY_H_
