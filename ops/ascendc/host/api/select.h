// Comparisons into masks of bits, selection by them, and gathering.
#pragma once

#include "vector.h"

namespace AscendC {

enum class CMPMODE : uint8_t { LT = 0, GT, EQ, LE, GE, NE };

enum class SELMODE : uint8_t {
  VSEL_CMPMASK_SPR = 0,
  VSEL_TENSOR_SCALAR_MODE,
  VSEL_TENSOR_TENSOR_MODE,
};

}  // namespace AscendC

namespace ascendc_host {

using AscendC::CMPMODE;
using AscendC::SELMODE;

template <class T>
bool compare_elements(CMPMODE mode, T a, T b) {
  switch (mode) {
    case CMPMODE::LT:
      return a < b;
    case CMPMODE::GT:
      return a > b;
    case CMPMODE::EQ:
      return a == b;
    case CMPMODE::LE:
      return a <= b;
    case CMPMODE::GE:
      return a >= b;
    case CMPMODE::NE:
      return a != b;
  }
  return false;
}

template <class T, class U>
void check_compare(const char* api, CMPMODE mode, uint32_t count) {
  static_assert(is_one_of<T, half, float, int32_t>, "Compare: half, float and int32_t only");
  static_assert(is_one_of<U, uint8_t, int8_t>, "Compare: the result is uint8_t or int8_t");
  HOST_CHECK((!is_one_of<T, int32_t> || mode == CMPMODE::EQ),
             "%s: int32_t can only be compared for EQ", api);
  HOST_CHECK(count > 0 && count * sizeof(T) % REPEAT_BYTES == 0,
             "%s: %u elements are %llu bytes, no positive multiple of 256; the rest would be left "
             "out",
             api, count, static_cast<unsigned long long>(uint64_t{count} * sizeof(T)));
}

/// Bit i of dst = f(i), for whole repeats; element 0 is the lowest bit of the first byte.
template <class T, class U, class F>
void run_compare(const char* api, const AscendC::LocalTensor<U>& dst, Accesses accesses,
                 uint32_t count, F f) {
  HOST_CHECK(dst.memory() == Memory::UB, "%s: operands lie in UB, not in %s", api,
             dst.memory_name());
  auto* to = reinterpret_cast<uint8_t*>(dst.pointer(api, count / 8));
  accesses.push_back(dst.byte_access(0, count / 8, true));
  Lanes lanes;
  lanes.count = count;
  issue_vector(
      api,
      [=] {
        for (uint32_t first = 0; first < count; first += 8) {
          int bits = 0;
          for (uint32_t i = 0; i < 8; ++i) bits |= f(first + i) ? 1 << i : 0;
          to[first / 8] = static_cast<uint8_t>(bits);
        }
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), 1));
}

/// dst = bit of the mask ? a : b(i).
template <class T, class U, class F>
void run_select(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<U>& mask,
                const AscendC::LocalTensor<T>& a, Accesses accesses, uint32_t count, F other) {
  static_assert(is_one_of<T, half, float>, "Select: half and float only");
  static_assert(std::is_unsigned_v<U>,
                "Select: the mask is uint8_t, uint16_t, uint32_t or uint64_t");
  constexpr const char* API = "Select";
  const Lanes lanes = lanes_of_count(API, count);
  T* to = operand(API, dst, lanes, {});
  const T* x = operand(API, a, lanes, {});
  const uint64_t mask_bytes = (uint64_t{count} + 7) / 8;
  const auto* bits =
      reinterpret_cast<const uint8_t*>(mask.pointer(API, (mask_bytes + sizeof(U) - 1) / sizeof(U)));
  add_access(accesses, a, lanes, {}, false);
  accesses.push_back(mask.byte_access(0, mask_bytes, false));
  add_access(accesses, dst, lanes, {}, true);
  issue_vector(
      API,
      [=] {
        for (uint32_t i = 0; i < count; ++i) {
          to[i] = (bits[i / 8] >> (i % 8) & 1) != 0 ? x[i] : other(i);
        }
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), 1));
}

}  // namespace ascendc_host

namespace AscendC {

template <class T, class U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
             CMPMODE mode, uint32_t count) {
  using namespace ascendc_host;
  check_compare<T, U>("Compare", mode, count);
  const Lanes lanes = lanes_of_count("Compare", count);
  const T* x = operand("Compare", src0, lanes, {});
  const T* y = operand("Compare", src1, lanes, {});
  Accesses accesses;
  add_access(accesses, src0, lanes, {}, false);
  add_access(accesses, src1, lanes, {}, false);
  run_compare<T>("Compare", dst, std::move(accesses), count,
                 [=](uint32_t i) { return compare_elements(mode, x[i], y[i]); });
}

template <class T, class U>
void Compares(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T scalar, CMPMODE mode,
              uint32_t count) {
  using namespace ascendc_host;
  check_compare<T, U>("Compares", mode, count);
  const Lanes lanes = lanes_of_count("Compares", count);
  const T* x = operand("Compares", src0, lanes, {});
  Accesses accesses;
  add_access(accesses, src0, lanes, {}, false);
  run_compare<T>("Compares", dst, std::move(accesses), count,
                 [=](uint32_t i) { return compare_elements(mode, x[i], scalar); });
}

/// The former name of Compares.
template <class T, class U>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T scalar,
                   CMPMODE mode, uint32_t count) {
  Compares(dst, src0, scalar, mode, count);
}

/// dst = bit ? src0 : src1.
template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, uint32_t count) {
  using namespace ascendc_host;
  HOST_CHECK(mode == SELMODE::VSEL_TENSOR_TENSOR_MODE,
             "Select of two tensors: SELMODE %d; the model has VSEL_TENSOR_TENSOR_MODE",
             static_cast<int>(mode));
  const Lanes lanes = lanes_of_count("Select", count);
  const T* y = operand("Select", src1, lanes, {});
  Accesses accesses;
  add_access(accesses, src1, lanes, {}, false);
  run_select(dst, selMask, src0, std::move(accesses), count, [y](uint32_t i) { return y[i]; });
}

/// dst = bit ? src0 : scalar.
template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            T scalar, SELMODE mode, uint32_t count) {
  HOST_CHECK(mode == SELMODE::VSEL_TENSOR_SCALAR_MODE,
             "Select of a tensor and a scalar: SELMODE %d; it is VSEL_TENSOR_SCALAR_MODE",
             static_cast<int>(mode));
  ascendc_host::run_select(dst, selMask, src0, {}, count, [scalar](uint32_t) { return scalar; });
}

/// dst[i] = src at byte `srcBaseAddr + srcOffset[i]`.
template <class T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src,
            const LocalTensor<uint32_t>& srcOffset, const uint32_t srcBaseAddr,
            const uint32_t count) {
  using namespace ascendc_host;
  static_assert(is_one_of<T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float>,
                "Gather: elements of 16 and 32 bits only");
  constexpr const char* API = "Gather";
  const Lanes lanes = lanes_of_count(API, count);
  T* to = operand(API, dst, lanes, {});
  const uint32_t* offsets = operand(API, srcOffset, lanes, {});
  HOST_CHECK(src.memory() == Memory::UB, "%s: operands lie in UB, not in %s", API,
             src.memory_name());
  const auto* from = reinterpret_cast<const uint8_t*>(src.pointer(API, 1));
  const uint32_t available = src.bytes();
  Accesses accesses{srcOffset.access(0, count, false), src.byte_access(0, available, false),
                    dst.access(0, count, true)};
  issue_vector(
      API,
      [=] {
        for (uint32_t i = 0; i < count; ++i) {
          const uint64_t at = uint64_t{srcBaseAddr} + offsets[i];
          HOST_CHECK(at % sizeof(T) == 0 && at + sizeof(T) <= available,
                     "Gather: offset %u of element %u (base %u) is not aligned or leaves the "
                     "source's %u bytes",
                     offsets[i], i, srcBaseAddr, available);
          std::memcpy(to + i, from + at, sizeof(T));
        }
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), SLOW_VECTOR_FACTOR));
}

/// Strides of GatherMask's sources, in blocks of 32 bytes.
struct GatherMaskParams {
  GatherMaskParams() = default;
  GatherMaskParams(uint8_t block, uint16_t repeats, uint16_t repeat, uint8_t pattern_repeat)
      : src0BlockStride(block),
        repeatTimes(repeats),
        src0RepeatStride(repeat),
        src1RepeatStride(pattern_repeat) {}

  uint8_t src0BlockStride = 1;
  uint16_t repeatTimes = 0;
  uint16_t src0RepeatStride = 8;
  uint8_t src1RepeatStride = 8;
};

}  // namespace AscendC

namespace ascendc_host {

/// Packs the elements that `keep(repeat, element of the repeat)` chooses; returns how many.
template <class T, class F>
uint64_t run_gather_mask(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
                         bool counter, uint32_t mask, const AscendC::GatherMaskParams& params,
                         Accesses accesses, uint64_t most, F keep) {
  static_assert(is_one_of<T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float>,
                "GatherMask: elements of 16 and 32 bits only");
  constexpr const char* API = "GatherMask";
  constexpr uint32_t PER_REPEAT = REPEAT_BYTES / sizeof(T);
  const uint32_t length = counter ? mask : PER_REPEAT;
  HOST_CHECK(length > 0 && params.repeatTimes > 0,
             "GatherMask: mask %u and repeatTimes %u must be positive", mask, params.repeatTimes);
  HOST_CHECK(src.memory() == Memory::UB && dst.memory() == Memory::UB,
             "GatherMask: operands lie in UB, not in %s and %s", src.memory_name(),
             dst.memory_name());
  const Stride stride{params.src0BlockStride, params.src0RepeatStride};
  const uint32_t repeats = params.repeatTimes;
  const uint64_t end = lane_offset<T>(stride, repeats - 1, length - 1) + 1;
  const T* from = src.pointer(API, end);
  T* to = dst.pointer(API, most);
  accesses.push_back(src.access(0, end, false));
  accesses.push_back(dst.access(0, most, true));
  issue_vector(
      API,
      [=] {
        uint64_t kept = 0;
        for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
          for (uint32_t i = 0; i < length; ++i) {
            if (keep(repeat, i)) to[kept++] = from[lane_offset<T>(stride, repeat, i)];
          }
        }
      },
      std::move(accesses),
      VECTOR_START_CYCLES + repeats * ((length + PER_REPEAT - 1) / PER_REPEAT));
  return most;
}

}  // namespace ascendc_host

namespace AscendC {

/// Packs what a fixed pattern chooses: 1 even, 2 odd elements, 3 to 6 every fourth from 0 to 3, 7
/// all. With `reduceMode` each repeat has `mask` elements, else 256 bytes.
template <class T>
void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const uint8_t src1Pattern,
                const bool reduceMode, const uint32_t mask, const GatherMaskParams& params,
                uint64_t& rsvdCnt) {
  using namespace ascendc_host;
  HOST_CHECK(src1Pattern >= 1 && src1Pattern <= 7, "GatherMask: pattern %u is not in 1..7",
             src1Pattern);
  const uint8_t pattern = src1Pattern;
  const auto keep = [pattern](uint32_t, uint32_t i) {
    if (pattern == 7) return true;
    return pattern <= 2 ? i % 2 == pattern - 1u : i % 4 == pattern - 3u;
  };
  const uint32_t length = reduceMode ? mask : REPEAT_BYTES / sizeof(T);
  uint64_t most = 0;
  for (uint32_t i = 0; i < length; ++i) most += keep(0, i) ? 1 : 0;
  rsvdCnt =
      run_gather_mask(dst, src0, reduceMode, mask, params, {}, most * params.repeatTimes, keep);
}

/// Packs the elements whose bit of `src1Pattern` is set.
///
/// The count is read back by the scalar unit, so this waits for the vector pipe, as on the chip.
template <class T, class U>
void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src0,
                const LocalTensor<U>& src1Pattern, const bool reduceMode, const uint32_t mask,
                const GatherMaskParams& params, uint64_t& rsvdCnt) {
  using namespace ascendc_host;
  static_assert(
      (sizeof(T) == 2 && is_one_of<U, uint16_t>) || (sizeof(T) == 4 && is_one_of<U, uint32_t>),
      "GatherMask: the pattern is uint16_t for 16-bit and uint32_t for 32-bit elements");
  const uint32_t length = reduceMode ? mask : REPEAT_BYTES / sizeof(T);
  const uint64_t stride = uint64_t{params.src1RepeatStride} * BLOCK_BYTES;
  const uint64_t row_bytes = (uint64_t{length} + 7) / 8;
  const uint64_t bytes = (params.repeatTimes - 1) * stride + row_bytes;
  const auto* bits = reinterpret_cast<const uint8_t*>(
      src1Pattern.pointer("GatherMask", (bytes + sizeof(U) - 1) / sizeof(U)));
  const auto keep = [=](uint32_t repeat, uint32_t i) {
    return (bits[repeat * stride + i / 8] >> (i % 8) & 1) != 0;
  };
  core().wait_for_vector("GatherMask");
  uint64_t most = 0;
  for (uint32_t repeat = 0; repeat < params.repeatTimes; ++repeat) {
    for (uint32_t i = 0; i < length; ++i) most += keep(repeat, i) ? 1 : 0;
  }
  Accesses accesses{src1Pattern.byte_access(0, bytes, false)};
  rsvdCnt = most;
  if (most == 0) return;
  run_gather_mask(dst, src0, reduceMode, mask, params, std::move(accesses), most, keep);
}

}  // namespace AscendC
