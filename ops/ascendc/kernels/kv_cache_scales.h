// Numbers of whole rows, for kv_cache_write: largest elements, sums, scales. As in kv_cache_rows.h
// every function ends with the barrier that makes its results readable by the vector unit.
#pragma once

#include "kv_cache_rows.h"

namespace kv_cache {

constexpr float kMaxCode = 127.0f;
constexpr float kSmallestScale = 1.17549435e-38f;  // 2^-126: smaller ones have no finite reciprocal

// Compare and Select take whole repeats; what lies behind a tile is computed and never used.
__aicore__ inline uint32_t WholeRepeats(uint32_t count) { return RoundUp(count, kRepeat); }

// The largest element of each row of a tile, which this destroys, to largest[rows].
__aicore__ inline void LargestOfRows(const LocalTensor<float>& largest,
                                     const LocalTensor<float>& tile, const Tile& shape) {
  const uint8_t pitch = shape.dim / kBlock;
  const BinaryRepeatParams rows(1, 1, 1, pitch, pitch, pitch);
  for (uint32_t first = kRepeat; first < shape.dim; first += kRepeat) {
    Max(tile, tile, tile[first], Smaller(shape.dim - first, kRepeat), shape.rows, rows);
    PipeBarrier<PIPE_V>();
  }
  WholeReduceMax(largest, tile, Smaller(shape.dim, kRepeat), shape.rows, 1, 1, pitch,
                 ReduceOrder::ORDER_ONLY_VALUE);
  PipeBarrier<PIPE_V>();
}

// The sum of each row of a tile, which this destroys, to sums[rows]. The order of the additions is
// the chip's: at most 9 roundings meet in a sum of non-negative numbers of 256 columns, so its
// relative error is below 9 * 2^-24.
__aicore__ inline void SumsOfRows(const LocalTensor<float>& sums, const LocalTensor<float>& tile,
                                  const Tile& shape) {
  const uint8_t pitch = shape.dim / kBlock;
  const BinaryRepeatParams rows(1, 1, 1, pitch, pitch, pitch);
  for (uint32_t first = kRepeat; first < shape.dim; first += kRepeat) {
    Add(tile, tile, tile[first], Smaller(shape.dim - first, kRepeat), shape.rows, rows);
    PipeBarrier<PIPE_V>();
  }
  WholeReduceSum(sums, tile, Smaller(shape.dim, kRepeat), shape.rows, 1, 1, pitch);
  PipeBarrier<PIPE_V>();
}

// Scales of rows and their reciprocals, both 0 where the scale would be subnormal.
//   scales = largest / steps;  inverse = 1 / scales;  float32 [64] each, mask 8 bytes.
__aicore__ inline void ScalesOfRows(const LocalTensor<float>& scales,
                                    const LocalTensor<float>& inverse,
                                    const LocalTensor<uint8_t>& mask,
                                    const LocalTensor<float>& largest, float steps) {
  Duplicate(inverse, steps, kMaxRows);
  PipeBarrier<PIPE_V>();
  Div(scales, largest, inverse, kMaxRows);
  PipeBarrier<PIPE_V>();
  CompareScalar(mask, scales, kSmallestScale, CMPMODE::GE, kMaxRows);
  Duplicate(inverse, 1.0f, kMaxRows);
  PipeBarrier<PIPE_V>();
  Select(scales, mask, scales, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, kMaxRows);
  PipeBarrier<PIPE_V>();
  Div(inverse, inverse, scales, kMaxRows);
  PipeBarrier<PIPE_V>();
  Select(inverse, mask, inverse, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, kMaxRows);
  PipeBarrier<PIPE_V>();
}

}  // namespace kv_cache
