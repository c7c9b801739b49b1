// Vector arithmetic on matrices whose rows lie `stride` apart in the unified buffer: what
// paged_attention_c8 does with scores, weights and sums. A row is cut into chunks of 64 columns;
// one instruction does a chunk of all rows. Every function leaves the barrier after its last
// instruction to the caller.
#ifndef ASCEND_PLUGIN_PAGED_ATTENTION_C8_ROWS_H_
#define ASCEND_PLUGIN_PAGED_ATTENTION_C8_ROWS_H_

#include "paged_attention_c8_common.h"

namespace paged_attention_c8 {

using Floats = AscendC::LocalTensor<float>;
using Bytes = AscendC::LocalTensor<int8_t>;

constexpr uint32_t kChunk = 64;   // float32 elements of one repeat
constexpr uint32_t kBlock = 8;    // of 32 bytes
constexpr uint32_t kLanes = 16;   // rows of a vector core's step, at most; one number each
constexpr float kTop = 32512.0f;  // 127 * 256: what the largest element of a row becomes
constexpr float kTiny = 1e-33f;   // smallest divisor; kTop / kTiny is finite

struct Extent {
  uint32_t rows;
  uint32_t columns;
  uint32_t stride;
};

__aicore__ inline void Barrier() { AscendC::PipeBarrier<PIPE_V>(); }

// to[r][c] = from[r][c] * factors[r]; `factors` holds each number in a block of its own.
__aicore__ inline void MulRows(const Floats& to, const Floats& from, const Floats& factors,
                               const Extent& e) {
  const uint8_t step = e.stride / kBlock;
  for (uint32_t at = 0; at < e.columns; at += kChunk) {
    AscendC::Mul(to[at], from[at], factors, uint64_t{Min(kChunk, e.columns - at)},
                 static_cast<uint8_t>(e.rows), {1, 1, 0, step, step, 1});
  }
}

// to[r][c] = from[r][c] - terms[r]; `terms` as above.
__aicore__ inline void SubRows(const Floats& to, const Floats& from, const Floats& terms,
                               const Extent& e) {
  const uint8_t step = e.stride / kBlock;
  for (uint32_t at = 0; at < e.columns; at += kChunk) {
    AscendC::Sub(to[at], from[at], terms, uint64_t{Min(kChunk, e.columns - at)},
                 static_cast<uint8_t>(e.rows), {1, 1, 0, step, step, 1});
  }
}

// to[r][c] = from[r][c] * factors[c]
__aicore__ inline void MulColumns(const Floats& to, const Floats& from, const Floats& factors,
                                  const Extent& e) {
  const uint8_t step = e.stride / kBlock;
  for (uint32_t at = 0; at < e.columns; at += kChunk) {
    AscendC::Mul(to[at], from[at], factors[at], uint64_t{Min(kChunk, e.columns - at)},
                 static_cast<uint8_t>(e.rows), {1, 1, 1, step, step, 0});
  }
}

// to[r][c] = from[r][c] + terms[c]
__aicore__ inline void AddColumns(const Floats& to, const Floats& from, const Floats& terms,
                                  const Extent& e) {
  const uint8_t step = e.stride / kBlock;
  for (uint32_t at = 0; at < e.columns; at += kChunk) {
    AscendC::Add(to[at], from[at], terms[at], uint64_t{Min(kChunk, e.columns - at)},
                 static_cast<uint8_t>(e.rows), {1, 1, 1, step, step, 0});
  }
}

// to[r][c] += from[r][c]
__aicore__ inline void AddMatrix(const Floats& to, const Floats& from, const Extent& e) {
  const uint8_t step = e.stride / kBlock;
  for (uint32_t at = 0; at < e.columns; at += kChunk) {
    AscendC::Add(to[at], to[at], from[at], uint64_t{Min(kChunk, e.columns - at)},
                 static_cast<uint8_t>(e.rows), {1, 1, 1, step, step, step});
  }
}

// to[r] = the largest of row r. `scratch` holds kLanes numbers for each chunk.
__aicore__ inline void RowMaximum(const Floats& to, const Floats& from, const Floats& scratch,
                                  const Extent& e) {
  const int32_t step = e.stride / kBlock;
  for (uint32_t at = 0; at < e.columns; at += kChunk) {
    AscendC::WholeReduceMax(at == 0 ? to : scratch[at / kChunk * kLanes], from[at],
                            static_cast<int32_t>(Min(kChunk, e.columns - at)),
                            static_cast<int32_t>(e.rows), 1, 1, step,
                            AscendC::ReduceOrder::ORDER_ONLY_VALUE);
  }
  for (uint32_t at = kChunk; at < e.columns; at += kChunk) {
    Barrier();
    AscendC::Max(to, to, scratch[at / kChunk * kLanes], static_cast<int32_t>(e.rows));
  }
}

// to[r] = the sum of row r; as above.
__aicore__ inline void RowSum(const Floats& to, const Floats& from, const Floats& scratch,
                              const Extent& e) {
  const int32_t step = e.stride / kBlock;
  for (uint32_t at = 0; at < e.columns; at += kChunk) {
    AscendC::WholeReduceSum(at == 0 ? to : scratch[at / kChunk * kLanes], from[at],
                            static_cast<int32_t>(Min(kChunk, e.columns - at)),
                            static_cast<int32_t>(e.rows), 1, 1, step);
  }
  for (uint32_t at = kChunk; at < e.columns; at += kChunk) {
    Barrier();
    AscendC::Add(to, to, scratch[at / kChunk * kLanes], static_cast<int32_t>(e.rows));
  }
}

// blocks[r][0..8) = lanes[r], for the rows of a step.
__aicore__ inline void Spread(const Floats& blocks, const Floats& lanes) {
  AscendC::Brcb(blocks, lanes, static_cast<uint8_t>(kLanes / kBlock), {1, kBlock});
}

// Scales rows so that 16 bits hold them: from[r] *= kTop / peaks[r]; peaks[r] is at least kTiny
// from here on, and the row is worth peaks[r] / kTop times what it becomes.
__aicore__ inline void Normalise(const Floats& from, const Floats& peaks, const Floats& lanes,
                                 const Floats& blocks, const Extent& e) {
  AscendC::Maxs(peaks, peaks, kTiny, static_cast<int32_t>(e.rows));
  AscendC::Duplicate(lanes, kTop, static_cast<int32_t>(e.rows));
  Barrier();
  AscendC::Div(lanes, lanes, peaks, static_cast<int32_t>(e.rows));
  Barrier();
  Spread(blocks, lanes);
  Barrier();
  MulRows(from, from, blocks, e);
}

// Splits `values`, at most kTop in magnitude, into high * 256 + low, both int8. `values` and
// `scratch` are used up. The halves are exact but for the rounding to half of the low one, less
// than 1 / 32 of its unit.
__aicore__ inline void SplitHalves(const Bytes& high, const Bytes& low, const Floats& values,
                                   const Floats& scratch, const AscendC::LocalTensor<half>& halves,
                                   uint32_t count) {
  const int32_t n = static_cast<int32_t>(count);
  AscendC::Muls(scratch, values, 1.0f / 256.0f, n);
  Barrier();
  AscendC::Cast(scratch, scratch, AscendC::RoundMode::CAST_RINT, count);
  Barrier();
  AscendC::Axpy(values, scratch, -256.0f, n);
  AscendC::Cast(halves, scratch, AscendC::RoundMode::CAST_NONE, count);
  Barrier();
  AscendC::Cast(high, halves, AscendC::RoundMode::CAST_RINT, count);
  AscendC::Mins(values, values, 127.0f, n);
  Barrier();
  AscendC::Cast(halves, values, AscendC::RoundMode::CAST_NONE, count);
  Barrier();
  AscendC::Cast(low, halves, AscendC::RoundMode::CAST_RINT, count);
}

// low = high * 256 + low, of int32 in the same places.
__aicore__ inline void JoinHalves(const Floats& low, const Floats& high, uint32_t count) {
  AscendC::Cast(high, high.ReinterpretCast<int32_t>(), AscendC::RoundMode::CAST_NONE, count);
  AscendC::Cast(low, low.ReinterpretCast<int32_t>(), AscendC::RoundMode::CAST_NONE, count);
  Barrier();
  AscendC::Axpy(low, high, 256.0f, static_cast<int32_t>(count));
}

}  // namespace paged_attention_c8

#endif  // ASCEND_PLUGIN_PAGED_ATTENTION_C8_ROWS_H_
