// Arithmetic on tiles of rows in the unified buffer (UB), shared by kv_cache_write and
// kv_cache_gather. A row is the head_dim elements of one token and kv head, of K or of V; a tile is
// float32 [rows, dim], contiguous. It follows ops/quantise.py operation by operation: float32, one
// rounding per operation.
//
// Every function here ends with the barrier that makes its results readable by the vector unit.
#pragma once

#include "kernel_operator.h"

namespace kv_cache {

using namespace AscendC;

constexpr uint32_t kRowBytes = 32;       // of a fractal, and of a block of UB
constexpr uint32_t kRepeat = 64;         // floats that one repeat of a vector instruction covers
constexpr uint32_t kBlock = 8;           // floats in a block of UB
constexpr uint32_t kMaxRows = 64;        // of a tile: a number for each of them fits into a repeat
constexpr uint32_t kMaxElements = 4096;  // of a tile

struct Tile {
  uint32_t rows;
  uint32_t dim;  // a multiple of 32

  __aicore__ inline uint32_t Size() const { return rows * dim; }
};

__aicore__ inline uint32_t Smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

__aicore__ inline uint32_t RoundUp(uint32_t n, uint32_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Copies each of numbers[rows] to a block of its own: spread[rows][8], for RoundUp(rows, 8) rows.
__aicore__ inline void SpreadOverBlocks(const LocalTensor<float>& spread,
                                        const LocalTensor<float>& numbers, uint32_t rows) {
  Brcb(spread, numbers, static_cast<uint8_t>(RoundUp(rows, kBlock) / kBlock),
       BrcbRepeatParams(1, kBlock));
  PipeBarrier<PIPE_V>();
}

// out = each row times a number of its own, given as spread[rows][8].
__aicore__ inline void MultiplyRows(const LocalTensor<float>& out, const LocalTensor<float>& tile,
                                    const LocalTensor<float>& spread, const Tile& shape) {
  const uint8_t pitch = shape.dim / kBlock;
  const BinaryRepeatParams rows(1, 1, 0, pitch, pitch, 1);
  for (uint32_t first = 0; first < shape.dim; first += kRepeat) {
    Mul(out[first], tile[first], spread, Smaller(shape.dim - first, kRepeat), shape.rows, rows);
  }
  PipeBarrier<PIPE_V>();
}

// How many channels a rotation mixes: the largest power of two in head_dim.
__aicore__ inline uint32_t RotatedChannels(uint32_t dim) { return dim & (~dim + 1); }

// Walsh-Hadamard transform of each power-of-two block of channels, in place, not normalised.
//
// Butterflies of stride 1, 2, 4 ... would need scattered operands. So each stage takes the even and
// the odd channels apart, which is one instruction each, and puts sums into the first half of a
// block and differences into the second: the channel's lowest bit becomes its highest. The next
// stage then finds the next bit lowest; after all stages the order is the natural one again. The
// operands of every addition are those of ops/quantise.py, and so is every rounding.
//
// scratch: float32 [size of the tile].
__aicore__ inline void Rotate(const LocalTensor<float>& tile, const LocalTensor<float>& scratch,
                              const Tile& shape) {
  const uint32_t size = shape.Size(), channels = RotatedChannels(shape.dim), half = channels / 2;
  const LocalTensor<float> even = scratch, odd = scratch[size / 2];
  const uint8_t blocks = size / channels, pitch = channels / kBlock, halfPitch = half / kBlock;
  const BinaryRepeatParams params(1, 1, 1, pitch, halfPitch, halfPitch);
  uint64_t kept = 0;
  for (uint32_t mixed = 1; mixed < channels; mixed *= 2) {
    GatherMask(even, tile, 1, true, size, GatherMaskParams(1, 1, 8, 0), kept);
    GatherMask(odd, tile, 2, true, size, GatherMaskParams(1, 1, 8, 0), kept);
    PipeBarrier<PIPE_V>();
    for (uint32_t first = 0; first < half; first += kRepeat) {
      const uint32_t mask = Smaller(half - first, kRepeat);
      Add(tile[first], even[first], odd[first], mask, blocks, params);
      Sub(tile[half + first], even[first], odd[first], mask, blocks, params);
    }
    PipeBarrier<PIPE_V>();
  }
}

}  // namespace kv_cache
