// Sums, maxima and minima over a repeat, a block or a whole tensor; half and float.
#pragma once

#include <limits>
#include <vector>

#include "atomic.h"
#include "vector.h"

namespace AscendC {

/// What a reduction to a maximum or minimum stores.
enum class ReduceOrder : uint8_t {
  ORDER_VALUE_INDEX = 0,
  ORDER_INDEX_VALUE,
  ORDER_ONLY_VALUE,
  ORDER_ONLY_INDEX,
};

}  // namespace AscendC

namespace ascendc_host {

using AscendC::ReduceOrder;

enum class Reduction : uint8_t { SUM, MAX, MIN };

/// Sum of `values` as a binary tree of neighbours, each step rounded to T.
template <class T>
T tree_sum(std::vector<T>& values) {
  size_t width = 1;
  while (width < values.size()) width *= 2;
  values.resize(width, T{0});
  for (; width > 1; width /= 2) {
    for (size_t i = 0; i < width / 2; ++i) {
      values[i] =
          static_cast<T>(static_cast<float>(values[2 * i]) + static_cast<float>(values[2 * i + 1]));
    }
  }
  return values[0];
}

template <Reduction kind, class T>
bool better(T candidate, T best) {
  return kind == Reduction::MAX ? candidate > best : candidate < best;
}

/// Bits of an index, stored in the place of an element.
template <class T>
void store_index(T* target, uint32_t index) {
  if constexpr (sizeof(T) == 2) {
    const auto narrow = static_cast<uint16_t>(index);
    std::memcpy(target, &narrow, sizeof narrow);
  } else {
    std::memcpy(target, &index, sizeof index);
  }
}

/// Bytes of a result and of the unit of dstRepStride.
template <class T>
uint32_t result_bytes(Reduction kind, ReduceOrder order) {
  if (kind == Reduction::SUM || order == ReduceOrder::ORDER_ONLY_VALUE) return sizeof(T);
  if (order == ReduceOrder::ORDER_ONLY_INDEX) return 4;
  return 2 * sizeof(T);
}

template <class T>
void store_extremum(uint8_t* target, T value, uint32_t index, ReduceOrder order) {
  T* elements = reinterpret_cast<T*>(target);
  switch (order) {
    case ReduceOrder::ORDER_VALUE_INDEX:
      elements[0] = value;
      store_index(elements + 1, index);
      break;
    case ReduceOrder::ORDER_INDEX_VALUE:
      store_index(elements, index);
      elements[1] = value;
      break;
    case ReduceOrder::ORDER_ONLY_VALUE:
      elements[0] = value;
      break;
    case ReduceOrder::ORDER_ONLY_INDEX:
      std::memcpy(target, &index, sizeof index);
      break;
  }
}

/// One result per repeat.
template <Reduction kind, class T>
void run_whole_reduce(const char* api, const AscendC::LocalTensor<T>& dst,
                      const AscendC::LocalTensor<T>& src, const Lanes& lanes,
                      int32_t dst_repeat_stride, const Stride& stride, ReduceOrder order) {
  static_assert(is_one_of<T, half, float>, "WholeReduce*: half and float only");
  if (lanes.repeats == 0) return;
  const uint32_t unit = result_bytes<T>(kind, order);
  const uint64_t step = uint64_t{unit} * dst_repeat_stride;
  const T* from = operand(api, src, lanes, stride);
  HOST_CHECK(dst.memory() == Memory::UB, "%s: operands lie in UB, not in %s", api,
             dst.memory_name());
  auto* to = reinterpret_cast<uint8_t*>(
      dst.pointer(api, ((lanes.repeats - 1) * step + unit) / sizeof(T), unit));
  Accesses accesses;
  add_access(accesses, src, lanes, stride, false);
  accesses.push_back(dst.byte_access(0, unit, true, lanes.repeats, step));
  issue_vector(
      api,
      [=] {
        for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
          if constexpr (kind == Reduction::SUM) {
            std::vector<T> values(lanes.per_repeat, T{0});
            for (uint32_t i = 0; i < lanes.active_count; ++i) {
              values[lanes.active[i]] = from[lane_offset<T>(stride, repeat, lanes.active[i])];
            }
            *reinterpret_cast<T*>(to + repeat * step) = tree_sum(values);
          } else {
            uint32_t index = lanes.active[0];
            T best = from[lane_offset<T>(stride, repeat, index)];
            for (uint32_t i = 1; i < lanes.active_count; ++i) {
              const T value = from[lane_offset<T>(stride, repeat, lanes.active[i])];
              if (better<kind>(value, best)) {
                best = value;
                index = lanes.active[i];
              }
            }
            store_extremum(to + repeat * step, best, index, order);
          }
        }
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), 1));
}

/// One result per block of 32 bytes, 8 a repeat.
template <Reduction kind, class T>
void run_block_reduce(const char* api, const AscendC::LocalTensor<T>& dst,
                      const AscendC::LocalTensor<T>& src, const Lanes& lanes,
                      int32_t dst_repeat_stride, const Stride& stride) {
  static_assert(is_one_of<T, half, float>, "BlockReduce*: half and float only");
  if (lanes.repeats == 0) return;
  constexpr uint32_t PER_BLOCK = block_elements<T>;
  const T* from = operand(api, src, lanes, stride);
  const uint32_t blocks = lanes.last_lane() / PER_BLOCK + 1;
  const uint64_t step = 8ull * dst_repeat_stride;
  T* to = dst.pointer(api, (lanes.repeats - 1) * step + blocks, 8 * sizeof(T));
  Accesses accesses;
  add_access(accesses, src, lanes, stride, false);
  accesses.push_back(dst.byte_access(0, blocks * sizeof(T), true, lanes.repeats, step * sizeof(T)));
  issue_vector(
      api,
      [=] {
        for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
          std::vector<T> found[8];
          for (uint32_t i = 0; i < lanes.active_count; ++i) {
            const uint32_t lane = lanes.active[i];
            found[lane / PER_BLOCK].push_back(from[lane_offset<T>(stride, repeat, lane)]);
          }
          for (uint32_t block = 0; block < blocks; ++block) {
            if (found[block].empty()) continue;
            T result = found[block][0];
            if constexpr (kind == Reduction::SUM) {
              result = tree_sum(found[block]);
            } else {
              for (T value : found[block]) result = better<kind>(value, result) ? value : result;
            }
            to[repeat * step + block] = result;
          }
        }
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), 1));
}

/// Elements of work space that ReduceMax and ReduceMin need, as documented.
template <class T>
uint32_t extremum_work(uint32_t count, bool with_index) {
  constexpr uint32_t PER_REPEAT = REPEAT_BYTES / sizeof(T);
  constexpr uint32_t PER_BLOCK = block_elements<T>;
  uint32_t total = 0;
  uint32_t elements = count;
  do {
    elements = (elements + PER_REPEAT - 1) / PER_REPEAT * 2;
    total += (elements + PER_BLOCK - 1) / PER_BLOCK * PER_BLOCK;
  } while (with_index && elements > 2);
  return total;
}

template <Reduction kind, class T>
void run_extremum(const char* api, const AscendC::LocalTensor<T>& dst,
                  const AscendC::LocalTensor<T>& src, const AscendC::LocalTensor<T>& work,
                  int32_t count, bool with_index) {
  static_assert(is_one_of<T, half, float>, "ReduceMax and ReduceMin: half and float only");
  const Lanes lanes = lanes_of_count(api, count);
  const uint32_t results = with_index ? 2 : 1;
  const T* from = operand(api, src, lanes, {});
  const uint32_t needed = extremum_work<T>(lanes.count, with_index);
  T* scratch = work.pointer(api, needed);
  T* to = dst.pointer(api, results, results * sizeof(T));
  Accesses accesses;
  add_access(accesses, src, lanes, {}, false);
  accesses.push_back(work.access(0, needed, true));
  accesses.push_back(dst.access(0, results, true));
  issue_vector(
      api,
      [=] {
        uint32_t index = 0;
        for (uint32_t i = 1; i < lanes.count; ++i) {
          if (better<kind>(from[i], from[index])) index = i;
        }
        const T best = from[index];
        std::memset(scratch, UNDEFINED_BYTE, needed * sizeof(T));
        to[0] = best;
        if (with_index) store_index(to + 1, index);
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), 2) + 2 * VECTOR_START_CYCLES);
}

}  // namespace ascendc_host

// Masks by count of lanes and by bits; repeatTime and mask in the order of the vendor's signatures.
#define ASCENDC_HOST_WHOLE_REDUCE(NAME, KIND)                                                     \
  namespace AscendC {                                                                             \
  template <class T, bool isSetMask = true>                                                       \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,             \
            const int32_t repeatTime, const int32_t dstRepStride, const int32_t srcBlkStride,     \
            const int32_t srcRepStride, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {     \
    ascendc_host::run_whole_reduce<ascendc_host::Reduction::KIND>(                                \
        #NAME, dst, src,                                                                          \
        ascendc_host::masked<T, isSetMask>(#NAME, static_cast<uint64_t>(mask), repeatTime),       \
        dstRepStride, {static_cast<uint32_t>(srcBlkStride), static_cast<uint32_t>(srcRepStride)}, \
        order);                                                                                   \
  }                                                                                               \
  template <class T, bool isSetMask = true>                                                       \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[],          \
            const int32_t repeatTime, const int32_t dstRepStride, const int32_t srcBlkStride,     \
            const int32_t srcRepStride, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {     \
    ascendc_host::run_whole_reduce<ascendc_host::Reduction::KIND>(                                \
        #NAME, dst, src, ascendc_host::masked<T, isSetMask>(#NAME, mask, repeatTime),             \
        dstRepStride, {static_cast<uint32_t>(srcBlkStride), static_cast<uint32_t>(srcRepStride)}, \
        order);                                                                                   \
  }                                                                                               \
  }

#define ASCENDC_HOST_BLOCK_REDUCE(NAME, KIND)                                                      \
  namespace AscendC {                                                                              \
  template <class T, bool isSetMask = true>                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t repeatTime,        \
            const int32_t mask, const int32_t dstRepStride, const int32_t srcBlkStride,            \
            const int32_t srcRepStride) {                                                          \
    ascendc_host::run_block_reduce<ascendc_host::Reduction::KIND>(                                 \
        #NAME, dst, src,                                                                           \
        ascendc_host::masked<T, isSetMask>(#NAME, static_cast<uint64_t>(mask), repeatTime),        \
        dstRepStride, {static_cast<uint32_t>(srcBlkStride), static_cast<uint32_t>(srcRepStride)}); \
  }                                                                                                \
  }

ASCENDC_HOST_WHOLE_REDUCE(WholeReduceSum, SUM)
ASCENDC_HOST_WHOLE_REDUCE(WholeReduceMax, MAX)
ASCENDC_HOST_WHOLE_REDUCE(WholeReduceMin, MIN)
ASCENDC_HOST_BLOCK_REDUCE(BlockReduceSum, SUM)
ASCENDC_HOST_BLOCK_REDUCE(BlockReduceMax, MAX)
ASCENDC_HOST_BLOCK_REDUCE(BlockReduceMin, MIN)

namespace AscendC {

/// Largest of `count` elements; with `calIndex` also the index of its first occurrence.
template <class T>
void ReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src,
               const LocalTensor<T>& sharedTmpBuffer, const int32_t count, bool calIndex = false) {
  ascendc_host::run_extremum<ascendc_host::Reduction::MAX>("ReduceMax", dst, src, sharedTmpBuffer,
                                                           count, calIndex);
}
template <class T>
void ReduceMin(const LocalTensor<T>& dst, const LocalTensor<T>& src,
               const LocalTensor<T>& sharedTmpBuffer, const int32_t count, bool calIndex = false) {
  ascendc_host::run_extremum<ascendc_host::Reduction::MIN>("ReduceMin", dst, src, sharedTmpBuffer,
                                                           count, calIndex);
}

/// Sum of `count` elements: a tree within each repeat, the repeats in order. On this chip the
/// temporary buffer is not used.
template <class T>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
               [[maybe_unused]] const LocalTensor<T>& sharedTmpBuffer, const int32_t count) {
  using namespace ascendc_host;
  static_assert(is_one_of<T, half, float>, "ReduceSum: half and float only");
  const Lanes lanes = lanes_of_count("ReduceSum", count);
  const T* from = operand("ReduceSum", src, lanes, {});
  T* to = dst.pointer("ReduceSum", 1, sizeof(T));
  Accesses accesses;
  add_access(accesses, src, lanes, {}, false);
  accesses.push_back(dst.access(0, 1, true));
  issue_vector(
      "ReduceSum",
      [=] {
        constexpr uint32_t PER_REPEAT = REPEAT_BYTES / sizeof(T);
        float sum = 0;
        for (uint32_t first = 0; first < lanes.count; first += PER_REPEAT) {
          const uint32_t last = std::min(lanes.count, first + PER_REPEAT);
          std::vector<T> values(from + first, from + last);
          values.resize(PER_REPEAT, T{0});
          sum = static_cast<float>(static_cast<T>(sum + static_cast<float>(tree_sum(values))));
        }
        to[0] = static_cast<T>(sum);
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), 2) + VECTOR_START_CYCLES);
}

}  // namespace AscendC
