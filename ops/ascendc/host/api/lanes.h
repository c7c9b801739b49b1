// How a vector instruction walks over its operands: a count of elements, or repeats with a mask.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>

#include "../model/costs.h"
#include "tensor.h"

namespace AscendC {

/// Strides of an instruction with one source, in blocks of 32 bytes.
struct UnaryRepeatParams {
  UnaryRepeatParams() = default;
  UnaryRepeatParams(uint16_t dst_block, uint16_t src_block, uint8_t dst_repeat, uint8_t src_repeat)
      : dstBlkStride(dst_block),
        srcBlkStride(src_block),
        dstRepStride(dst_repeat),
        srcRepStride(src_repeat) {}

  uint16_t dstBlkStride = 1;
  uint16_t srcBlkStride = 1;
  uint8_t dstRepStride = 8;
  uint8_t srcRepStride = 8;
};

/// Strides of an instruction with two sources, in blocks of 32 bytes.
struct BinaryRepeatParams {
  BinaryRepeatParams() = default;
  BinaryRepeatParams(uint8_t dst_block, uint8_t src0_block, uint8_t src1_block, uint8_t dst_repeat,
                     uint8_t src0_repeat, uint8_t src1_repeat)
      : dstBlkStride(dst_block),
        src0BlkStride(src0_block),
        src1BlkStride(src1_block),
        dstRepStride(dst_repeat),
        src0RepStride(src0_repeat),
        src1RepStride(src1_repeat) {}

  uint8_t dstBlkStride = 1;
  uint8_t src0BlkStride = 1;
  uint8_t src1BlkStride = 1;
  uint8_t dstRepStride = 8;
  uint8_t src0RepStride = 8;
  uint8_t src1RepStride = 8;
};

}  // namespace AscendC

namespace ascendc_host {

constexpr uint32_t MAX_LANES = 128;

/// The elements an instruction works on.
///
/// Either `count` contiguous elements, or `repeats` times the `active` lanes out of `per_repeat`.
struct Lanes {
  uint32_t count = 0;
  uint32_t repeats = 0;
  uint32_t per_repeat = 0;
  uint32_t active_count = 0;
  uint8_t active[MAX_LANES];

  bool contiguous() const { return per_repeat == 0; }
  uint32_t last_lane() const { return active_count == 0 ? 0 : active[active_count - 1]; }
};

/// Where an operand's lanes lie: strides of blocks within a repeat and of repeats, in 32 bytes.
struct Stride {
  uint32_t block = 1;
  uint32_t repeat = 8;
};

/// `count` contiguous elements.
inline Lanes lanes_of_count(const char* api, int64_t count) {
  HOST_CHECK(count > 0, "%s: count %lld; at least 1 element", api, static_cast<long long>(count));
  Lanes lanes;
  lanes.count = static_cast<uint32_t>(count);
  return lanes;
}

/// The first `mask` lanes of each repeat of `per_repeat` lanes.
inline Lanes lanes_of_mask(const char* api, uint64_t mask, uint32_t repeats, uint32_t per_repeat) {
  HOST_CHECK(mask >= 1 && mask <= per_repeat,
             "%s: mask %llu; a repeat of this type has 1 to %u elements", api,
             static_cast<unsigned long long>(mask), per_repeat);
  HOST_CHECK(repeats <= 255, "%s: repeatTime %u exceeds 255", api, repeats);
  Lanes lanes;
  lanes.repeats = repeats;
  lanes.per_repeat = per_repeat;
  lanes.active_count = static_cast<uint32_t>(mask);
  for (uint32_t i = 0; i < mask; ++i) lanes.active[i] = static_cast<uint8_t>(i);
  return lanes;
}

/// The lanes whose bit is set in mask[0] (lanes 0 to 63) and mask[1] (64 to 127).
inline Lanes lanes_of_bits(const char* api, const uint64_t mask[], uint32_t repeats,
                           uint32_t per_repeat) {
  HOST_CHECK(repeats <= 255, "%s: repeatTime %u exceeds 255", api, repeats);
  HOST_CHECK(mask[0] != 0 || (per_repeat > 64 && mask[1] != 0), "%s: the mask has no bit set", api);
  Lanes lanes;
  lanes.repeats = repeats;
  lanes.per_repeat = per_repeat;
  for (uint32_t i = 0; i < per_repeat; ++i) {
    if ((mask[i / 64] >> (i % 64) & 1) != 0) {
      lanes.active[lanes.active_count++] = static_cast<uint8_t>(i);
    }
  }
  return lanes;
}

/// Elements from the operand's start of lane `lane` in repeat `repeat`.
template <class T>
uint64_t lane_offset(const Stride& stride, uint32_t repeat, uint32_t lane) {
  constexpr uint32_t PER_BLOCK = block_elements<T>;
  return (uint64_t{repeat} * stride.repeat + uint64_t{lane / PER_BLOCK} * stride.block) *
             PER_BLOCK +
         lane % PER_BLOCK;
}

/// Elements from the operand's start to the end of its last lane.
template <class T>
uint64_t extent(const Lanes& lanes, const Stride& stride) {
  if (lanes.contiguous()) return lanes.count;
  if (lanes.repeats == 0) return 0;
  return lane_offset<T>(stride, lanes.repeats - 1, lanes.last_lane()) + 1;
}

/// Adds the accesses of an operand to `accesses`.
template <class T>
void add_access(Accesses& accesses, const AscendC::LocalTensor<T>& tensor, const Lanes& lanes,
                const Stride& stride, bool write) {
  if (lanes.contiguous()) {
    accesses.push_back(tensor.access(0, lanes.count, write));
    return;
  }
  if (lanes.repeats == 0) return;
  const uint32_t lane_count = lanes.last_lane() + 1;
  constexpr uint32_t PER_BLOCK = block_elements<T>;
  if (stride.block == 1) {
    accesses.push_back(tensor.byte_access(0, bytes_of<T>(lane_count), write, lanes.repeats,
                                          uint64_t{stride.repeat} * BLOCK_BYTES));
    return;
  }
  for (uint32_t first = 0; first < lane_count; first += PER_BLOCK) {
    const uint64_t start = uint64_t{first / PER_BLOCK} * stride.block * BLOCK_BYTES;
    accesses.push_back(
        tensor.byte_access(start, bytes_of<T>(std::min(PER_BLOCK, lane_count - first)), write,
                           lanes.repeats, uint64_t{stride.repeat} * BLOCK_BYTES));
  }
}

/// Cycles of a vector instruction whose widest operand has elements of `bytes` bytes.
inline uint64_t vector_cycles(const Lanes& lanes, uint32_t bytes, uint32_t factor) {
  const uint64_t repeats =
      lanes.contiguous()
          ? (uint64_t{lanes.count} * bytes + VECTOR_BYTES_PER_CYCLE - 1) / VECTOR_BYTES_PER_CYCLE
          : lanes.repeats;
  return VECTOR_START_CYCLES + repeats * factor;
}

/// An operand of a vector instruction: in UB, on a boundary of 32 bytes, with room for its lanes.
template <class T>
T* operand(const char* api, const AscendC::LocalTensor<T>& tensor, const Lanes& lanes,
           const Stride& stride) {
  HOST_CHECK(tensor.memory() == Memory::UB, "%s: operands lie in UB, not in %s", api,
             tensor.memory_name());
  if (!lanes.contiguous() && lanes.repeats == 0) return nullptr;
  return tensor.pointer(api, extent<T>(lanes, stride));
}

/// Fails if two operands of a contiguous instruction overlap without being the same.
template <class A, class B>
void check_overlap(const char* api, const AscendC::LocalTensor<A>& target,
                   const AscendC::LocalTensor<B>& source, const Lanes& lanes) {
  if (!lanes.contiguous() || target.offset() == source.offset()) return;
  const uint64_t target_end = target.offset() + bytes_of<A>(lanes.count);
  const uint64_t source_end = source.offset() + bytes_of<B>(lanes.count);
  HOST_CHECK(target_end <= source.offset() || source_end <= target.offset(),
             "%s: destination at %u and source at %u overlap partly in UB; they must be the same "
             "or apart",
             api, target.offset(), source.offset());
}

/// Calls `f(repeat, lane)` for each active lane.
template <class F>
void for_each_lane(const Lanes& lanes, F&& f) {
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    for (uint32_t i = 0; i < lanes.active_count; ++i) f(repeat, lanes.active[i]);
  }
}

inline void issue_vector(const char* api, std::function<void()> work, Accesses accesses,
                         uint64_t cycles) {
  Instruction instruction;
  instruction.api = api;
  instruction.work = std::move(work);
  instruction.accesses = std::move(accesses);
  instruction.cycles = cycles;
  core().issue(PIPE_V, std::move(instruction));
}

/// dst = f(a, b) element by element.
template <class D, class A, class B, class F>
void vector_binary(const char* api, const AscendC::LocalTensor<D>& dst,
                   const AscendC::LocalTensor<A>& a, const AscendC::LocalTensor<B>& b,
                   const Lanes& lanes, const AscendC::BinaryRepeatParams& params, F f,
                   uint32_t factor = 1) {
  const Stride target{params.dstBlkStride, params.dstRepStride};
  const Stride first{params.src0BlkStride, params.src0RepStride};
  const Stride second{params.src1BlkStride, params.src1RepStride};
  D* to = operand(api, dst, lanes, target);
  const A* x = operand(api, a, lanes, first);
  const B* y = operand(api, b, lanes, second);
  check_overlap(api, dst, a, lanes);
  check_overlap(api, dst, b, lanes);
  Accesses accesses;
  accesses.reserve(3);
  add_access(accesses, a, lanes, first, false);
  add_access(accesses, b, lanes, second, false);
  add_access(accesses, dst, lanes, target, true);
  const uint64_t cycles = vector_cycles(lanes, sizeof(D), factor);
  if (lanes.contiguous()) {
    const uint32_t count = lanes.count;
    issue_vector(
        api,
        [=] {
          for (uint32_t i = 0; i < count; ++i) to[i] = f(x[i], y[i]);
        },
        std::move(accesses), cycles);
    return;
  }
  issue_vector(
      api,
      [=] {
        for_each_lane(lanes, [&](uint32_t repeat, uint32_t lane) {
          to[lane_offset<D>(target, repeat, lane)] =
              f(x[lane_offset<A>(first, repeat, lane)], y[lane_offset<B>(second, repeat, lane)]);
        });
      },
      std::move(accesses), cycles);
}

/// dst = f(a) element by element, or f(dst, a) where `reads_target`.
template <bool reads_target = false, class D, class A, class F>
void vector_unary(const char* api, const AscendC::LocalTensor<D>& dst,
                  const AscendC::LocalTensor<A>& a, const Lanes& lanes,
                  const AscendC::UnaryRepeatParams& params, F f, uint32_t factor = 1) {
  const Stride target{params.dstBlkStride, params.dstRepStride};
  const Stride source{params.srcBlkStride, params.srcRepStride};
  D* to = operand(api, dst, lanes, target);
  const A* x = operand(api, a, lanes, source);
  check_overlap(api, dst, a, lanes);
  Accesses accesses;
  accesses.reserve(2);
  add_access(accesses, a, lanes, source, false);
  add_access(accesses, dst, lanes, target, true);
  const auto apply = [f](D& element, A value) {
    if constexpr (reads_target) {
      element = f(element, value);
    } else {
      element = f(value);
    }
  };
  const uint64_t cycles = vector_cycles(lanes, std::max(sizeof(D), sizeof(A)), factor);
  if (lanes.contiguous()) {
    const uint32_t count = lanes.count;
    issue_vector(
        api,
        [=] {
          for (uint32_t i = 0; i < count; ++i) apply(to[i], x[i]);
        },
        std::move(accesses), cycles);
    return;
  }
  issue_vector(
      api,
      [=] {
        for_each_lane(lanes, [&](uint32_t repeat, uint32_t lane) {
          apply(to[lane_offset<D>(target, repeat, lane)], x[lane_offset<A>(source, repeat, lane)]);
        });
      },
      std::move(accesses), cycles);
}

/// Lanes of a repeat for operands of the types given: 256 bytes of the widest.
template <class... T>
constexpr uint32_t lanes_per_repeat =
    REPEAT_BYTES / static_cast<uint32_t>(std::max({sizeof(T)...}));

}  // namespace ascendc_host
