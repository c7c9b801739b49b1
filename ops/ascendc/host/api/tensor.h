// GlobalTensor and LocalTensor: typed views of global and on-chip memory.
#pragma once

#include <cstdint>

#include "../model/machine.h"
#include "types.h"

namespace AscendC {

/// Logical places of a tensor; each lies in one physical memory.
enum class TPosition : uint8_t {
  GM,
  A1,
  A2,
  B1,
  B2,
  C1,
  C2,
  CO1,
  CO2,
  VECIN,
  VECOUT,
  VECCALC,
  LCM = VECCALC,
  MAX = VECCALC + 1,
};
using QuePosition = TPosition;

}  // namespace AscendC

namespace ascendc_host {

/// Physical memory of a position. C1 lies in L1; C2 (bias) is not modelled.
constexpr Memory memory_of(AscendC::TPosition position) {
  using AscendC::TPosition;
  switch (position) {
    case TPosition::A1:
    case TPosition::B1:
    case TPosition::C1:
      return Memory::L1;
    case TPosition::A2:
      return Memory::L0A;
    case TPosition::B2:
      return Memory::L0B;
    case TPosition::CO1:
      return Memory::L0C;
    default:
      return Memory::UB;
  }
}

constexpr const char* position_name(AscendC::TPosition position) {
  constexpr const char* NAMES[] = {"GM", "A1",  "A2",  "B1",    "B2",     "C1",
                                   "C2", "CO1", "CO2", "VECIN", "VECOUT", "VECCALC"};
  return NAMES[static_cast<int>(position)];
}

}  // namespace ascendc_host

namespace AscendC {

/// A typed view of on-chip memory, from TQue::AllocTensor or TBuf::Get.
template <class T>
class LocalTensor {
 public:
  using PrimType = T;

  LocalTensor() = default;
  LocalTensor(ascendc_host::Memory memory, TPosition position, uint32_t offset, uint32_t bytes,
              int queue, int buffer, uint32_t generation)
      : memory_(memory),
        position_(position),
        offset_(offset),
        bytes_(bytes),
        queue_(queue),
        buffer_(buffer),
        generation_(generation) {}

  /// The tensor from element `offset` on.
  LocalTensor operator[](uint32_t offset) const {
    const uint64_t skip = ascendc_host::bytes_of<T>(offset);
    HOST_CHECK(skip <= bytes_, "LocalTensor[%u]: the tensor has %u elements", offset, GetSize());
    LocalTensor result = *this;
    result.offset_ += static_cast<uint32_t>(skip);
    result.bytes_ -= static_cast<uint32_t>(skip);
    return result;
  }

  /// Scalar load; what other pipes have not finished is not there yet.
  T GetValue(uint32_t index) const {
    const T* source = pointer("GetValue", index + 1, sizeof(T)) + index;
    ascendc_host::core().scalar_read(access(index, 1, false), "GetValue");
    return *source;
  }

  /// Scalar store; other pipes see it after a flag from pipe S.
  template <class U>
  void SetValue(uint32_t index, U value) const {
    T* target = pointer("SetValue", index + 1, sizeof(T)) + index;
    const T stored = static_cast<T>(value);
    ascendc_host::core().scalar_store(access(index, 1, true), "SetValue",
                                      [target, stored] { *target = stored; });
  }

  template <class U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(memory_, position_, offset_, bytes_, queue_, buffer_, generation_);
  }

  /// Elements to the end of the buffer.
  uint32_t GetSize() const {
    return static_cast<uint32_t>(bytes_ * 8ull / ascendc_host::element_bits<T>);
  }
  uint32_t GetLength() const { return bytes_; }
  TPosition GetPosition() const { return position_; }
  void SetSize(uint32_t elements) {
    const uint64_t wanted = ascendc_host::bytes_of<T>(elements);
    HOST_CHECK(wanted <= bytes_, "SetSize(%u): the tensor has %u elements", elements, GetSize());
    bytes_ = static_cast<uint32_t>(wanted);
  }

  // --- for the model ---------------------------------------------------------------------------
  ascendc_host::Memory memory() const { return memory_; }
  uint32_t offset() const { return offset_; }
  uint32_t bytes() const { return bytes_; }
  int queue() const { return queue_; }
  int buffer() const { return buffer_; }
  void drop() { bytes_ = 0; }

  /// Address of the first element, after the checks of an operand with `elements` elements.
  T* pointer(const char* api, uint64_t elements,
             uint32_t alignment = ascendc_host::BLOCK_BYTES) const {
    HOST_CHECK(bytes_ > 0, "%s: the tensor has no memory (not allocated, or freed)", api);
    if (queue_ >= 0) ascendc_host::core().require_held(queue_, buffer_, generation_, api);
    HOST_CHECK(alignment == 0 || offset_ % alignment == 0,
               "%s: offset %u in %s is not a multiple of %u bytes", api, offset_, memory_name(),
               alignment);
    HOST_CHECK(ascendc_host::bytes_of<T>(elements) <= bytes_,
               "%s: %llu elements of %u bits exceed the tensor's %u bytes in %s", api,
               static_cast<unsigned long long>(elements), ascendc_host::element_bits<T>, bytes_,
               memory_name());
    return reinterpret_cast<T*>(ascendc_host::core().memory(memory_) + offset_);
  }

  /// The access to `count` elements from `first` on.
  ascendc_host::Access access(uint64_t first, uint64_t count, bool write) const {
    return byte_access(ascendc_host::bytes_of<T>(first), ascendc_host::bytes_of<T>(count), write);
  }
  ascendc_host::Access byte_access(uint64_t first, uint64_t length, bool write, uint32_t runs = 1,
                                   uint64_t stride = 0) const {
    return {offset_ + first,
            stride,
            static_cast<uint32_t>(length),
            runs,
            static_cast<ascendc_host::Place>(memory_),
            write};
  }
  const char* memory_name() const {
    return ascendc_host::MEMORY_NAME[static_cast<size_t>(memory_)];
  }

 private:
  ascendc_host::Memory memory_ = ascendc_host::Memory::UB;
  TPosition position_ = TPosition::VECCALC;
  uint32_t offset_ = 0;
  uint32_t bytes_ = 0;
  int queue_ = -1;
  int buffer_ = -1;
  uint32_t generation_ = 0;
};

/// A typed view of global memory.
template <class T>
class GlobalTensor {
 public:
  using PrimType = T;

  void SetGlobalBuffer(T* buffer, uint64_t elements) {
    data_ = buffer;
    size_ = elements;
  }
  void SetGlobalBuffer(T* buffer) { SetGlobalBuffer(buffer, UINT64_MAX / 16); }

  GlobalTensor operator[](uint64_t offset) const {
    HOST_CHECK(offset <= size_, "GlobalTensor[%llu]: the tensor has %llu elements",
               static_cast<unsigned long long>(offset), static_cast<unsigned long long>(size_));
    GlobalTensor result;
    result.data_ = data_ + offset;
    result.size_ = size_ - offset;
    return result;
  }

  /// Scalar load through the data cache: old if others have written since the line was loaded.
  T GetValue(uint64_t index) const {
    require(index + 1, "GlobalTensor::GetValue");
    T value;
    ascendc_host::core().global_read(access(index, 1, false), "GlobalTensor::GetValue", &value);
    return value;
  }

  /// Scalar store into the data cache; DataCacheCleanAndInvalid brings it to memory.
  void SetValue(uint64_t index, T value) const {
    require(index + 1, "GlobalTensor::SetValue");
    ascendc_host::core().global_write(access(index, 1, true), "GlobalTensor::SetValue", &value);
  }

  T* GetPhyAddr() const { return data_; }
  uint64_t GetSize() const { return size_; }

  // --- for the model ---------------------------------------------------------------------------
  /// Fails unless the tensor has `elements` elements.
  void require(uint64_t elements, const char* api) const {
    HOST_CHECK(elements <= size_, "%s: %llu elements from here on, the GlobalTensor has %llu", api,
               static_cast<unsigned long long>(elements), static_cast<unsigned long long>(size_));
  }
  ascendc_host::Access access(uint64_t first, uint64_t count, bool write) const {
    return byte_access(first * sizeof(T), count * sizeof(T), write);
  }
  ascendc_host::Access byte_access(uint64_t first, uint64_t length, bool write, uint32_t runs = 1,
                                   uint64_t stride = 0) const {
    return {reinterpret_cast<uintptr_t>(data_) + first,
            stride,
            static_cast<uint32_t>(length),
            runs,
            ascendc_host::Place::GM,
            write,
            write && ascendc_host::core().atomic_type != 0};
  }

 private:
  T* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace AscendC
