// Packed integer weights (ops/packed_weight.py): blocks of 32 columns; within a block steps of 64
// bytes x 2, columns 0 to 15 and 16 to 31, a 32-bit word per column. 4 bits: a word is 8
// consecutive k, the even ones in the lower half, lowest bits first. 8 bits: a word is 4
// consecutive k. Integers are two's complement. k is padded to a whole word with zeros, columns to
// a whole block.
#pragma once

#include "element.h"

namespace ascend {

constexpr int kBlockColumns = 32;
// How far ahead of the products weights are fetched.
constexpr int64_t kPrefetchBytes = 2048;

// kLanes elements as floats.
ASCEND_INLINE Vf load_floats(int dtype, const void *data, int64_t index) {
  if (dtype == ASCEND_BFLOAT16) return Bfloat16::widen(load<Vh>((const uint16_t *)data + index));
  if (dtype == ASCEND_FLOAT16) return Float16::widen(load<Vh>((const uint16_t *)data + index));
  return load<Vf>((const float *)data + index);
}

// Rounds value(c), a vector of columns from c, for a block of which the first `count` exist.
template <class E, class Value>
ASCEND_INLINE void store_columns(const Value &value, int64_t count, typename E::Storage *out) {
  // Always a whole block, so that the compiler knows every c.
  typename E::Storage block[kBlockColumns];
  typename E::Storage *to = count == kBlockColumns ? out : block;
  ASCEND_UNROLL
  for (int c = 0; c < kBlockColumns; c += 2 * kLanes) {
    store_two<E>(value(c), value(c + kLanes), to + c);
  }
  if (to == block) memcpy(out, block, sizeof *out * count);
}

// One block of columns and a range of k.
struct BlockWork {
  const char *weights;  // of `begin`
  const void *scales;   // of the block: [groups][32]
  const int8_t *zeros;  // likewise, or null
  int scale_dtype;
  int64_t group;       // k per scale
  int64_t begin, end;  // whole words

  ASCEND_INLINE int64_t group_of(int64_t k) const { return k / group; }
  ASCEND_INLINE int64_t group_end(int64_t k) const {
    const int64_t next = (k / group + 1) * group;
    return next < end ? next : end;
  }
  // A group may be cut into ranges of k; its zero points are taken into account in the first.
  ASCEND_INLINE bool begins_group(int64_t k) const { return k % group == 0; }
  // Vector c of the block's columns.
  ASCEND_INLINE Vf scale(int64_t group, int c) const {
    return load_floats(scale_dtype, scales, group * kBlockColumns + c * kLanes);
  }
  ASCEND_INLINE Vf zero(int64_t group, int c) const {
    return widen_bytes(load<Vb>(zeros + group * kBlockColumns + c * kLanes));
  }
};

}  // namespace ascend
