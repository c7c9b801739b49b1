// Instructions that create or spread values: Duplicate, CreateVecIndex, Brcb, Axpy, ShiftRight.
#pragma once

#include "vector.h"

namespace ascendc_host {

template <class T>
void run_duplicate(const AscendC::LocalTensor<T>& dst, T value, const Lanes& lanes,
                   const Stride& stride) {
  static_assert(is_one_of<T, half, bfloat16_t, int16_t, uint16_t, int32_t, uint32_t, float>,
                "Duplicate: the chip supports elements of 16 and 32 bits only");
  T* to = operand("Duplicate", dst, lanes, stride);
  Accesses accesses;
  add_access(accesses, dst, lanes, stride, true);
  issue_vector(
      "Duplicate",
      [=] {
        if (lanes.contiguous()) std::fill(to, to + lanes.count, value);
        for_each_lane(lanes, [&](uint32_t repeat, uint32_t lane) {
          to[lane_offset<T>(stride, repeat, lane)] = value;
        });
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), 1));
}

/// x shifted right: arithmetic if signed; rounded, the bit shifted out last is added.
template <class T>
T shift_right(T x, T bits, bool round) {
  const int64_t wide = x;
  const int64_t result = wide >> bits;
  return static_cast<T>(result + (round && bits > 0 ? wide >> (bits - 1) & 1 : 0));
}

template <class T>
void run_shift_right(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src, T bits,
                     bool round, const Lanes& lanes, const AscendC::UnaryRepeatParams& params) {
  static_assert(is_one_of<T, int16_t, uint16_t, int32_t, uint32_t>,
                "ShiftRight: int16_t, uint16_t, int32_t and uint32_t only");
  HOST_CHECK(bits >= T{0} && static_cast<uint32_t>(bits) <= 8 * sizeof(T),
             "ShiftRight: %lld bits; allowed are 0 to %zu", static_cast<long long>(bits),
             8 * sizeof(T));
  HOST_CHECK(!round || std::is_signed_v<T>, "ShiftRight: roundEn is for signed types only");
  vector_unary("ShiftRight", dst, src, lanes, params,
               [=](T x) { return shift_right(x, bits, round); });
}

template <class D, class S>
void run_axpy(const AscendC::LocalTensor<D>& dst, const AscendC::LocalTensor<S>& src, S scalar,
              const Lanes& lanes, const AscendC::UnaryRepeatParams& params) {
  static_assert((is_one_of<D, half> && is_one_of<S, half>) ||
                    (is_one_of<D, float> && is_one_of<S, half, float>),
                "Axpy: half to half, float to float, or half to float only");
  vector_unary<true>("Axpy", dst, src, lanes, params, [scalar](D sum, S x) {
    // One rounding: the documentation calls it a fused multiply-add.
    return static_cast<D>(
        std::fma(static_cast<double>(x), static_cast<double>(scalar), static_cast<double>(sum)));
  });
}

}  // namespace ascendc_host

namespace AscendC {

template <class T>
void Duplicate(const LocalTensor<T>& dst, const T& value, const int32_t& count) {
  ascendc_host::run_duplicate(dst, value, ascendc_host::lanes_of_count("Duplicate", count), {});
}
template <class T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& value, uint64_t mask, const uint8_t repeatTime,
               const uint16_t dstBlockStride, const uint8_t dstRepeatStride) {
  ascendc_host::run_duplicate(dst, value,
                              ascendc_host::masked<T, isSetMask>("Duplicate", mask, repeatTime),
                              {dstBlockStride, dstRepeatStride});
}
template <class T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& value, uint64_t mask[], const uint8_t repeatTime,
               const uint16_t dstBlockStride, const uint8_t dstRepeatStride) {
  ascendc_host::run_duplicate(dst, value,
                              ascendc_host::masked<T, isSetMask>("Duplicate", mask, repeatTime),
                              {dstBlockStride, dstRepeatStride});
}

template <class T>
void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& bits,
                const int32_t& count) {
  ascendc_host::run_shift_right(dst, src, bits, false,
                                ascendc_host::lanes_of_count("ShiftRight", count), {});
}
template <class T, bool isSetMask = true>
void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& bits, uint64_t mask,
                const uint8_t repeatTime, const UnaryRepeatParams& params, bool roundEn = false) {
  ascendc_host::run_shift_right(dst, src, bits, roundEn,
                                ascendc_host::masked<T, isSetMask>("ShiftRight", mask, repeatTime),
                                params);
}

/// dst = dst + src * scalar.
template <class T, class U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar,
          const int32_t& count) {
  ascendc_host::run_axpy(dst, src, scalar, ascendc_host::lanes_of_count("Axpy", count), {});
}
template <class T, class U, bool isSetMask = true>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar, uint64_t mask,
          const uint8_t repeatTime, const UnaryRepeatParams& params) {
  ascendc_host::run_axpy(dst, src, scalar,
                         ascendc_host::masked<T, isSetMask>("Axpy", mask, repeatTime), params);
}

/// first, first + 1, ...
template <class T>
void CreateVecIndex(LocalTensor<T> dst, const T& first, uint32_t count) {
  using namespace ascendc_host;
  static_assert(is_one_of<T, int16_t, half, int32_t, float>,
                "CreateVecIndex: int16_t, half, int32_t and float only");
  const Lanes lanes = lanes_of_count("CreateVecIndex", count);
  T* to = operand("CreateVecIndex", dst, lanes, {});
  Accesses accesses;
  add_access(accesses, dst, lanes, {}, true);
  issue_vector(
      "CreateVecIndex",
      [=] {
        for (uint32_t i = 0; i < count; ++i) {
          to[i] = static_cast<T>(static_cast<Wide<T>>(first) + static_cast<Wide<T>>(i));
        }
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), 1));
}

/// The former name of CreateVecIndex.
template <class T>
void ArithProgression(const LocalTensor<T>& dst, const T first, const T step, const int32_t count) {
  using namespace ascendc_host;
  static_assert(is_one_of<T, int16_t, half, int32_t, float>,
                "ArithProgression: int16_t, half, int32_t and float only");
  const Lanes lanes = lanes_of_count("ArithProgression", count);
  T* to = operand("ArithProgression", dst, lanes, {});
  Accesses accesses;
  add_access(accesses, dst, lanes, {}, true);
  issue_vector(
      "ArithProgression",
      [=] {
        T value = first;
        for (int32_t i = 0; i < count; ++i) {
          to[i] = value;
          value = static_cast<T>(static_cast<Wide<T>>(value) + static_cast<Wide<T>>(step));
        }
      },
      std::move(accesses), vector_cycles(lanes, sizeof(T), 1));
}

/// Strides of Brcb, in blocks of 32 bytes.
struct BrcbRepeatParams {
  BrcbRepeatParams() = default;
  BrcbRepeatParams(uint16_t block, uint16_t repeat) : dstBlkStride(block), dstRepStride(repeat) {}

  uint16_t dstBlkStride = 1;
  uint16_t dstRepStride = 8;
};

/// Spreads each of 8 elements a repeat over a block of 32 bytes.
template <class T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint8_t repeatTime,
          const BrcbRepeatParams& params) {
  using namespace ascendc_host;
  static_assert(is_one_of<T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float>,
                "Brcb: elements of 16 and 32 bits only");
  if (repeatTime == 0) return;
  constexpr uint32_t PER_BLOCK = block_elements<T>;
  const uint32_t block = params.dstBlkStride == 0 ? 1 : params.dstBlkStride;
  const uint64_t last = (uint64_t{repeatTime} - 1) * params.dstRepStride + 7ull * block;
  HOST_CHECK(dst.memory() == Memory::UB && src.memory() == Memory::UB,
             "Brcb: operands lie in UB, not in %s and %s", dst.memory_name(), src.memory_name());
  T* to = dst.pointer("Brcb", (last + 1) * PER_BLOCK);
  const T* from = src.pointer("Brcb", uint64_t{repeatTime} * 8);
  Accesses accesses{src.access(0, uint64_t{repeatTime} * 8, false)};
  for (uint32_t k = 0; k < 8; ++k) {
    accesses.push_back(dst.byte_access(uint64_t{k} * block * BLOCK_BYTES, BLOCK_BYTES, true,
                                       repeatTime, uint64_t{params.dstRepStride} * BLOCK_BYTES));
  }
  const uint32_t repeat_stride = params.dstRepStride;
  issue_vector(
      "Brcb",
      [=] {
        for (uint32_t i = 0; i < repeatTime * 8u; ++i) {
          T* start = to + (uint64_t{i / 8} * repeat_stride + uint64_t{i % 8} * block) * PER_BLOCK;
          std::fill(start, start + PER_BLOCK, from[i]);
        }
      },
      std::move(accesses), VECTOR_START_CYCLES + repeatTime);
}

}  // namespace AscendC
