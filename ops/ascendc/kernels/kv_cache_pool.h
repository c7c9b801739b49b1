// Where patches of C8P pages lie.
#pragma once

#include "kernel_operator.h"

namespace kv_cache {

// A pool of patches, one per (plane, kv head), in bytes from the first byte behind all planes:
//   tags int16 [slots] | scales float32 [slots] | codes uint8 [slots][head_dim / 2] | zeros
struct PoolGeometry {
  uint32_t slots, codeBytes, poolBytes;

  __aicore__ inline void Init(uint32_t blockSize, uint32_t headDim) {
    slots = blockSize / 8;
    codeBytes = headDim / 2;
    poolBytes = slots * (sizeof(int16_t) + sizeof(float) + codeBytes) + blockSize / 4;
  }
  __aicore__ inline uint64_t Tag(uint64_t run, uint32_t slot) const {
    return run * poolBytes + slot * sizeof(int16_t);
  }
  __aicore__ inline uint64_t Scale(uint64_t run, uint32_t slot) const {
    return run * poolBytes + slots * sizeof(int16_t) + slot * sizeof(float);
  }
  __aicore__ inline uint64_t Codes(uint64_t run, uint32_t slot) const {
    return run * poolBytes + slots * (sizeof(int16_t) + sizeof(float)) + slot * codeBytes;
  }
};

}  // namespace kv_cache
