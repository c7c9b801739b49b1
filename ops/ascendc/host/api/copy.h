// DataCopy and DataCopyPad: transfers between global memory, unified buffer and L1.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>

#include "../model/costs.h"
#include "atomic.h"
#include "tensor.h"

namespace AscendC {

/// Blocks of `blockLen` x 32 bytes; strides are the gaps between them, in 32 bytes.
struct DataCopyParams {
  DataCopyParams() = default;
  DataCopyParams(uint16_t count, uint16_t length, uint16_t source, uint16_t target)
      : blockCount(count), blockLen(length), srcStride(source), dstStride(target) {}

  uint16_t blockCount = 1;
  uint16_t blockLen = 0;
  union {
    uint16_t srcStride = 0;
    uint16_t srcGap;
  };
  union {
    uint16_t dstStride = 0;
    uint16_t dstGap;
  };
};

/// Blocks of `blockLen` bytes; gaps are in bytes in GM and in 32 bytes on chip.
struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(uint16_t count, uint32_t length, uint32_t source, uint32_t target,
                    uint32_t reserved)
      : blockCount(count), blockLen(length), srcStride(source), dstStride(target), rsv(reserved) {}

  uint16_t blockCount = 1;
  uint32_t blockLen = 0;
  uint32_t srcStride = 0;
  uint32_t dstStride = 0;
  uint32_t rsv = 0;
};

/// What fills a block on chip up to 32 bytes. Not padded, the rest of the block is undefined.
template <class T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  template <class U>
  DataCopyPadExtParams(bool pad, uint8_t left, uint8_t right, U value)
      : isPad(pad), leftPadding(left), rightPadding(right) {
    if constexpr (std::is_same_v<T, bfloat16_t> && !std::is_same_v<U, bfloat16_t>) {
      paddingValue = ToBfloat16(static_cast<float>(value));
    } else {
      paddingValue = value;
    }
  }

  bool isPad = false;
  uint8_t leftPadding = 0;
  uint8_t rightPadding = 0;
  T paddingValue{};
};

}  // namespace AscendC

namespace ascendc_host {

/// Cycles that a transfer of `bytes` from or to GM keeps its pipe busy.
inline uint64_t gm_cycles(uint64_t bytes) {
  return COPY_START_CYCLES + (bytes + GM_BYTES_PER_CYCLE - 1) / GM_BYTES_PER_CYCLE;
}

/// Runs of bytes on either side of a transfer.
struct Runs {
  uint32_t count;
  uint64_t length;
  uint64_t source_step;
  uint64_t target_step;
};

inline void copy_runs(uint8_t* target, const uint8_t* source, const Runs& runs) {
  for (uint32_t i = 0; i < runs.count; ++i) {
    std::memcpy(target + i * runs.target_step, source + i * runs.source_step, runs.length);
  }
}

/// Adds `source` to what GM holds, as a copy does after SetAtomicAdd.
template <class T>
void add_runs(uint8_t* target, const uint8_t* source, const Runs& runs) {
  for (uint32_t i = 0; i < runs.count; ++i) {
    T* to = reinterpret_cast<T*>(target + i * runs.target_step);
    const T* from = reinterpret_cast<const T*>(source + i * runs.source_step);
    for (uint64_t k = 0; k < runs.length / sizeof(T); ++k) {
      if constexpr (is_one_of<T, half, bfloat16_t>) {
        to[k] = from_float<T>(to_float(to[k]) + to_float(from[k]));
      } else {
        to[k] = static_cast<T>(to[k] + from[k]);
      }
    }
  }
}

/// The work of a copy to GM, with the atomic mode that holds when it is issued.
template <class T>
std::function<void()> store_work(T* target, const T* source, const Runs& runs) {
  auto* to = reinterpret_cast<uint8_t*>(target);
  const auto* from = reinterpret_cast<const uint8_t*>(source);
  if (core().atomic_type == 0) return [=] { copy_runs(to, from, runs); };
  HOST_CHECK(core().atomic_type == atomic_code<T>,
             "DataCopy: SetAtomicAdd was called for another data type than the tensor's");
  if constexpr (atomic_code<T> != 0) {
    return [=] { add_runs<T>(to, from, runs); };
  } else {
    fail("DataCopy: SetAtomicAdd does not support this data type");
  }
}

inline void check_copy(const char* api, uint32_t count, uint32_t length, uint32_t limit) {
  HOST_CHECK(count >= 1 && count <= 4095, "%s: blockCount %u is not in 1..4095", api, count);
  HOST_CHECK(length >= 1 && length <= limit, "%s: blockLen %u is not in 1..%u", api, length, limit);
}

/// Issues a transfer from GM into on-chip memory.
template <class T>
void issue_load(const char* api, const AscendC::LocalTensor<T>& target,
                const AscendC::GlobalTensor<T>& source, const Runs& runs, uint64_t target_written,
                std::function<void()> work) {
  const Memory memory = target.memory();
  HOST_CHECK(memory == Memory::UB || memory == Memory::L1,
             "%s: GM is copied to UB or L1, not to %s", api, target.memory_name());
  if (memory == Memory::UB) core().require_pipe(PIPE_V, api);
  if (memory == Memory::L1) core().require_pipe(PIPE_MTE1, api);
  Instruction instruction;
  instruction.api = api;
  instruction.work = std::move(work);
  instruction.accesses = {
      source.byte_access(0, runs.length, false, runs.count, runs.source_step),
      target.byte_access(0, target_written, true, runs.count, runs.target_step)};
  instruction.accesses[0].atomic = false;
  instruction.cycles = gm_cycles(runs.count * runs.length);
  core().issue(PIPE_MTE2, std::move(instruction));
}

/// Issues a transfer from UB to GM.
template <class T>
void issue_store(const char* api, const AscendC::GlobalTensor<T>& target,
                 const AscendC::LocalTensor<T>& source, const Runs& runs, const T* from) {
  HOST_CHECK(source.memory() == Memory::UB, "%s: GM is written from UB, not from %s", api,
             source.memory_name());
  core().require_pipe(PIPE_V, api);
  Instruction instruction;
  instruction.api = api;
  instruction.work = store_work(target.GetPhyAddr(), from, runs);
  instruction.accesses = {source.byte_access(0, runs.length, false, runs.count, runs.source_step),
                          target.byte_access(0, runs.length, true, runs.count, runs.target_step)};
  instruction.cycles = gm_cycles(runs.count * runs.length);
  core().issue(PIPE_MTE3, std::move(instruction));
}

template <class T>
void check_gm_alignment(const AscendC::GlobalTensor<T>& tensor, const char* api) {
  HOST_CHECK(reinterpret_cast<uintptr_t>(tensor.GetPhyAddr()) % sizeof(T) == 0,
             "%s: the GM address is not a multiple of the element's %zu bytes", api, sizeof(T));
}

template <class T>
bool bytes_equal(const T& left, const T& right) {
  return std::memcmp(&left, &right, sizeof(T)) == 0;
}

inline uint64_t span_of(uint32_t count, uint64_t length, uint64_t step) {
  return (count - 1) * step + length;
}

/// Length in blocks of a plain copy; the chip would drop the rest without a word.
template <class T>
uint16_t whole_blocks(const char* api, uint32_t count) {
  const uint64_t bytes = bytes_of<T>(count);
  HOST_CHECK(count > 0 && bytes % BLOCK_BYTES == 0,
             "%s: %u elements are %llu bytes, no positive multiple of 32 (use DataCopyPad)", api,
             count, static_cast<unsigned long long>(bytes));
  HOST_CHECK(bytes / BLOCK_BYTES <= 65535, "%s: %u elements are more than 65535 blocks of 32 bytes",
             api, count);
  return static_cast<uint16_t>(bytes / BLOCK_BYTES);
}

}  // namespace ascendc_host

namespace AscendC {

/// GM to UB or L1, in whole blocks of 32 bytes.
template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& params) {
  using namespace ascendc_host;
  constexpr const char* API = "DataCopy (GM to local)";
  check_copy(API, params.blockCount, params.blockLen, 65535);
  check_gm_alignment(src, API);
  const uint64_t length = params.blockLen * 32ull;
  const Runs runs{params.blockCount, length, length + params.srcStride * 32ull,
                  length + params.dstStride * 32ull};
  src.require(span_of(runs.count, length, runs.source_step) / sizeof(T), API);
  auto* to = reinterpret_cast<uint8_t*>(
      dst.pointer(API, span_of(runs.count, length, runs.target_step) / sizeof(T)));
  const auto* from = reinterpret_cast<const uint8_t*>(src.GetPhyAddr());
  issue_load(API, dst, src, runs, length, [=] { copy_runs(to, from, runs); });
}

/// UB to GM, in whole blocks of 32 bytes.
template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params) {
  using namespace ascendc_host;
  constexpr const char* API = "DataCopy (local to GM)";
  check_copy(API, params.blockCount, params.blockLen, 65535);
  check_gm_alignment(dst, API);
  const uint64_t length = params.blockLen * 32ull;
  const Runs runs{params.blockCount, length, length + params.srcStride * 32ull,
                  length + params.dstStride * 32ull};
  dst.require(span_of(runs.count, length, runs.target_step) / sizeof(T), API);
  const T* from = src.pointer(API, span_of(runs.count, length, runs.source_step) / sizeof(T));
  issue_store(API, dst, src, runs, from);
}

/// UB to UB, by the vector unit.
template <class T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params) {
  using namespace ascendc_host;
  constexpr const char* API = "DataCopy (local to local)";
  check_copy(API, params.blockCount, params.blockLen, 65535);
  HOST_CHECK(dst.memory() == Memory::UB && src.memory() == Memory::UB,
             "%s: UB to UB only, not %s to %s", API, src.memory_name(), dst.memory_name());
  const uint64_t length = params.blockLen * 32ull;
  const Runs runs{params.blockCount, length, length + params.srcStride * 32ull,
                  length + params.dstStride * 32ull};
  auto* to = reinterpret_cast<uint8_t*>(
      dst.pointer(API, span_of(runs.count, length, runs.target_step) / sizeof(T)));
  const auto* from = reinterpret_cast<const uint8_t*>(
      src.pointer(API, span_of(runs.count, length, runs.source_step) / sizeof(T)));
  Instruction instruction;
  instruction.api = API;
  instruction.work = [=] { copy_runs(to, from, runs); };
  instruction.accesses = {src.byte_access(0, length, false, runs.count, runs.source_step),
                          dst.byte_access(0, length, true, runs.count, runs.target_step)};
  instruction.cycles = VECTOR_START_CYCLES + runs.count * length / VECTOR_BYTES_PER_CYCLE;
  core().issue(PIPE_V, std::move(instruction));
}

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const uint32_t count) {
  const uint16_t blocks = ascendc_host::whole_blocks<T>("DataCopy (GM to local)", count);
  DataCopy(dst, src, DataCopyParams(1, blocks, 0, 0));
}
template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count) {
  const uint16_t blocks = ascendc_host::whole_blocks<T>("DataCopy (local to GM)", count);
  DataCopy(dst, src, DataCopyParams(1, blocks, 0, 0));
}
template <class T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count) {
  const uint16_t blocks = ascendc_host::whole_blocks<T>("DataCopy (local to local)", count);
  DataCopy(dst, src, DataCopyParams(1, blocks, 0, 0));
}

/// GM to UB with blocks of any number of bytes; each starts a new 32-byte block on chip.
template <class T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                 const DataCopyExtParams& params, const DataCopyPadExtParams<T>& pad) {
  using namespace ascendc_host;
  constexpr const char* API = "DataCopyPad (GM to UB)";
  check_copy(API, params.blockCount, params.blockLen, 2097151);
  check_gm_alignment(src, API);
  HOST_CHECK(params.blockLen % sizeof(T) == 0, "%s: blockLen %u is not whole elements of %zu bytes",
             API, params.blockLen, sizeof(T));
  const uint64_t left = pad.leftPadding * sizeof(T);
  const uint64_t right = pad.rightPadding * sizeof(T);
  HOST_CHECK(left <= 32 && right <= 32, "%s: leftPadding %u or rightPadding %u exceed 32 bytes",
             API, pad.leftPadding, pad.rightPadding);
  const uint64_t padded = (left + params.blockLen + right + 31) / 32 * 32;
  const Runs runs{params.blockCount, params.blockLen, params.blockLen + uint64_t{params.srcStride},
                  padded + params.dstStride * 32ull};
  src.require((span_of(runs.count, runs.length, runs.source_step) + sizeof(T) - 1) / sizeof(T),
              API);
  auto* to = reinterpret_cast<uint8_t*>(
      dst.pointer(API, span_of(runs.count, padded, runs.target_step) / sizeof(T)));
  const auto* from = reinterpret_cast<const uint8_t*>(src.GetPhyAddr());
  HOST_CHECK(sizeof(T) < 8 || bytes_equal(pad.paddingValue, T{}),
             "%s: paddingValue of a 64-bit type must be 0", API);
  const bool fill = pad.isPad;
  const T value = pad.paddingValue;
  issue_load(API, dst, src, runs, padded, [=] {
    for (uint32_t i = 0; i < runs.count; ++i) {
      uint8_t* row = to + i * runs.target_step;
      auto* elements = reinterpret_cast<T*>(row);
      if (fill) {
        std::fill(elements, elements + padded / sizeof(T), value);
      } else {
        std::memset(row, UNDEFINED_BYTE, padded);
      }
      std::memcpy(row + left, from + i * runs.source_step, runs.length);
    }
  });
}

/// UB to GM with blocks of any number of bytes; each starts a new 32-byte block on chip.
template <class T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                 const DataCopyExtParams& params) {
  using namespace ascendc_host;
  constexpr const char* API = "DataCopyPad (UB to GM)";
  check_copy(API, params.blockCount, params.blockLen, 2097151);
  check_gm_alignment(dst, API);
  HOST_CHECK(params.blockLen % sizeof(T) == 0, "%s: blockLen %u is not whole elements of %zu bytes",
             API, params.blockLen, sizeof(T));
  const uint64_t padded = (params.blockLen + 31ull) / 32 * 32;
  const Runs runs{params.blockCount, params.blockLen, padded + params.srcStride * 32ull,
                  params.blockLen + uint64_t{params.dstStride}};
  dst.require(span_of(runs.count, runs.length, runs.target_step) / sizeof(T), API);
  const T* from = src.pointer(API, span_of(runs.count, runs.length, runs.source_step) / sizeof(T));
  issue_store(API, dst, src, runs, from);
}

}  // namespace AscendC
