// SetAtomicAdd: copies to GM add instead of overwriting. Cache control of scalar accesses.
#pragma once

#include "tensor.h"

namespace ascendc_host {

/// Bytes that an instruction leaves undefined.
constexpr int UNDEFINED_BYTE = 0xA5;

/// Non-zero for element types that SetAtomicAdd accepts.
template <class T>
constexpr int atomic_code = is_one_of<T, float>        ? 1
                            : is_one_of<T, half>       ? 2
                            : is_one_of<T, int16_t>    ? 3
                            : is_one_of<T, int32_t>    ? 4
                            : is_one_of<T, int8_t>     ? 5
                            : is_one_of<T, bfloat16_t> ? 6
                                                       : 0;

}  // namespace ascendc_host

namespace AscendC {

/// Later copies from UB or L0C to GM add; the order among cores is open.
template <class T>
void SetAtomicAdd() {
  static_assert(ascendc_host::atomic_code<T> != 0,
                "SetAtomicAdd: float, half, int16_t, int32_t, int8_t or bfloat16_t");
  ascendc_host::core().atomic_type = ascendc_host::atomic_code<T>;
}

inline void SetAtomicNone() { ascendc_host::core().atomic_type = 0; }
inline void DisableDmaAtomic() { SetAtomicNone(); }

enum class CacheLine : uint64_t { SINGLE_CACHE_LINE = 0, ENTIRE_DATA_CACHE };
enum class DcciDst : uint64_t { CACHELINE_ALL = 0, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

/// Writes scalar stores to GM back and drops the line (from the tensor's start to the line's end),
/// or the whole cache.
template <class T, CacheLine entireType, DcciDst dcciDst = DcciDst::CACHELINE_OUT>
void DataCacheCleanAndInvalid(const GlobalTensor<T>& dst) {
  static_assert(dcciDst == DcciDst::CACHELINE_OUT || dcciDst == DcciDst::CACHELINE_ALL,
                "DataCacheCleanAndInvalid: the model has CACHELINE_OUT and CACHELINE_ALL");
  ascendc_host::core().clean_cache(reinterpret_cast<uintptr_t>(dst.GetPhyAddr()),
                                   entireType == CacheLine::ENTIRE_DATA_CACHE);
}

}  // namespace AscendC
