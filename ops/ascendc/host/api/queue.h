// TPipe, TQue, TQueBind and TBuf: on-chip memory and the flags that guard its buffers.
#pragma once

#include "tensor.h"

namespace ascendc_host {

/// The events of a queue: set by EnQue and awaited by DeQue, set by FreeTensor and awaited by
/// AllocTensor.
struct QueueEvents {
  AscendC::HardEvent full;
  AscendC::HardEvent free;
};

constexpr QueueEvents queue_events(AscendC::TPosition source, AscendC::TPosition target) {
  using AscendC::HardEvent;
  using AscendC::TPosition;
  const bool from_gm = source == TPosition::GM;
  const Memory to = memory_of(target);
  const Memory from = memory_of(source);
  if (from_gm && to == Memory::UB) return {HardEvent::MTE2_V, HardEvent::V_MTE2};
  if (from_gm && to == Memory::L1) return {HardEvent::MTE2_MTE1, HardEvent::MTE1_MTE2};
  if (from_gm) return {HardEvent::MTE2_M, HardEvent::M_MTE2};
  if (target == TPosition::GM && from == Memory::UB) {
    return {HardEvent::V_MTE3, HardEvent::MTE3_V};
  }
  if (target == TPosition::GM) return {HardEvent::M_FIX, HardEvent::FIX_M};
  if (from == Memory::UB) return {HardEvent::MTE2_MTE3, HardEvent::MTE3_MTE2};
  return {HardEvent::MTE1_M, HardEvent::M_MTE1};
}

/// Source and target of the queue of one position.
constexpr AscendC::TPosition queue_source(AscendC::TPosition position) {
  using AscendC::TPosition;
  switch (position) {
    case TPosition::A2:
      return TPosition::A1;
    case TPosition::B2:
      return TPosition::B1;
    case TPosition::VECIN:
    case TPosition::A1:
    case TPosition::B1:
    case TPosition::C1:
      return TPosition::GM;
    default:
      return position;
  }
}
constexpr AscendC::TPosition queue_target(AscendC::TPosition position) {
  using AscendC::TPosition;
  switch (position) {
    case TPosition::VECOUT:
    case TPosition::CO1:
      return TPosition::GM;
    default:
      return position;
  }
}

}  // namespace ascendc_host

namespace AscendC {

using TEventID = int8_t;

/// A queue of buffers between the pipe that fills them and the pipe that empties them.
///
/// Args: `depth` tensors may wait in it; `mask` (layout conversion) is not modelled.
template <TPosition source, TPosition target, int32_t depth, auto mask = 0>
class TQueBind {
 public:
  static_assert(depth >= 1 && depth <= 8, "the model has queues of depth 1 to 8");
  static constexpr ascendc_host::QueueEvents EVENTS = ascendc_host::queue_events(source, target);
  static constexpr TPosition POSITION = target == TPosition::GM ? source : target;
  static constexpr ascendc_host::Memory MEMORY = ascendc_host::memory_of(POSITION);

  template <class T>
  LocalTensor<T> AllocTensor() {
    auto& buffers = state("AllocTensor").buffers;
    for (size_t i = 0; i < buffers.size(); ++i) {
      const size_t index = (cursor_ + i) % buffers.size();
      ascendc_host::QueueBuffer& buffer = buffers[index];
      if (buffer.state != ascendc_host::BufferState::FREE) continue;
      cursor_ = (index + 1) % buffers.size();
      buffer.state = ascendc_host::BufferState::OCCUPIED;
      ++buffer.generation;
      await_free(buffer, "AllocTensor");
      return view<T>(buffer, static_cast<int>(index));
    }
    ascendc_host::fail(
        "AllocTensor: all %zu buffers of the %s queue are in use (FreeTensor is "
        "missing, or too few buffers)",
        buffers.size(), ascendc_host::position_name(POSITION));
  }

  template <class T>
  bool EnQue(const LocalTensor<T>& tensor) {
    auto& queue = state("EnQue");
    ascendc_host::QueueBuffer& buffer = held(tensor, "EnQue");
    HOST_CHECK(static_cast<int32_t>(queue.order.size()) < depth,
               "EnQue: the %s queue of depth %d already holds %zu tensors",
               ascendc_host::position_name(POSITION), depth, queue.order.size());
    buffer.state = ascendc_host::BufferState::ENQUEUED;
    ascendc_host::Core& core = ascendc_host::core();
    buffer.enqueue_event = core.allocate_event(EVENTS.full, "EnQue", true);
    core.set_flag(EVENTS.full, buffer.enqueue_event, "EnQue");
    queue.order.push_back(tensor.buffer());
    return true;
  }

  template <class T>
  LocalTensor<T> DeQue() {
    auto& queue = state("DeQue");
    HOST_CHECK(!queue.order.empty(), "DeQue: the %s queue is empty; EnQue is missing",
               ascendc_host::position_name(POSITION));
    const int index = queue.order.front();
    queue.order.pop_front();
    ascendc_host::QueueBuffer& buffer = queue.buffers[index];
    buffer.state = ascendc_host::BufferState::DEQUEUED;
    ascendc_host::Core& core = ascendc_host::core();
    core.wait_flag(EVENTS.full, buffer.enqueue_event, "DeQue");
    core.release_event(EVENTS.full, buffer.enqueue_event);
    buffer.enqueue_event = -1;
    return view<T>(buffer, index);
  }

  template <class T>
  void FreeTensor(LocalTensor<T>& tensor) {
    ascendc_host::QueueBuffer& buffer = held(tensor, "FreeTensor");
    ascendc_host::Core& core = ascendc_host::core();
    const int id = core.allocate_event(EVENTS.free, "FreeTensor", true);
    core.set_flag(EVENTS.free, id, "FreeTensor");
    buffer.free_event = static_cast<int>(EVENTS.free) * ascendc_host::EVENT_IDS + id;
    buffer.state = ascendc_host::BufferState::FREE;
    tensor.drop();
  }

  bool HasTensorInQue() { return !state("HasTensorInQue").order.empty(); }
  bool VacantInQue() { return static_cast<int32_t>(state("VacantInQue").order.size()) < depth; }
  int32_t GetTensorCountInQue() {
    return static_cast<int32_t>(state("GetTensorCountInQue").order.size());
  }
  bool HasIdleBuffer() {
    for (const auto& buffer : state("HasIdleBuffer").buffers) {
      if (buffer.state == ascendc_host::BufferState::FREE) return true;
    }
    return false;
  }
  void FreeAllEvent() {
    for (auto& buffer : state("FreeAllEvent").buffers) await_free(buffer, "FreeAllEvent");
  }

  /// Called by TPipe::InitBuffer.
  void init(uint8_t number, uint32_t bytes) {
    HOST_CHECK(number > 0, "InitBuffer: 0 buffers for a %s queue",
               ascendc_host::position_name(POSITION));
    HOST_CHECK(bytes > 0, "InitBuffer: 0 bytes for a %s queue",
               ascendc_host::position_name(POSITION));
    ascendc_host::Core& core = ascendc_host::core();
    if (index_ < 0) {
      index_ = static_cast<int>(core.queues.size());
      core.queues.emplace_back();
    }
    ascendc_host::QueueState& queue = core.queues[index_];
    queue.position = ascendc_host::position_name(POSITION);
    queue.buffers.clear();
    for (int i = 0; i < number; ++i) {
      ascendc_host::QueueBuffer buffer;
      buffer.bytes = (bytes + ascendc_host::BLOCK_BYTES - 1) / ascendc_host::BLOCK_BYTES *
                     ascendc_host::BLOCK_BYTES;
      buffer.offset = core.allocate(MEMORY, bytes);
      queue.buffers.push_back(buffer);
    }
  }

 private:
  ascendc_host::QueueState& state(const char* api) {
    HOST_CHECK(index_ >= 0, "%s: the %s queue has no buffers; TPipe::InitBuffer is missing", api,
               ascendc_host::position_name(POSITION));
    return ascendc_host::core().queues[index_];
  }

  template <class T>
  LocalTensor<T> view(const ascendc_host::QueueBuffer& buffer, int index) {
    return LocalTensor<T>(MEMORY, POSITION, buffer.offset, buffer.bytes, index_, index,
                          buffer.generation);
  }

  /// The buffer of `tensor`, which must be allocated or dequeued, and of this queue.
  template <class T>
  ascendc_host::QueueBuffer& held(const LocalTensor<T>& tensor, const char* api) {
    auto& queue = state(api);
    HOST_CHECK(tensor.bytes() > 0, "%s: the tensor was freed already, or never allocated", api);
    HOST_CHECK(tensor.queue() == index_, "%s: the tensor is not of this %s queue", api,
               ascendc_host::position_name(POSITION));
    ascendc_host::QueueBuffer& buffer = queue.buffers[tensor.buffer()];
    HOST_CHECK(buffer.state == ascendc_host::BufferState::OCCUPIED ||
                   buffer.state == ascendc_host::BufferState::DEQUEUED,
               "%s: the tensor of the %s queue is %s; it must be allocated or dequeued", api,
               ascendc_host::position_name(POSITION),
               ascendc_host::buffer_state_name(buffer.state));
    return buffer;
  }

  void await_free(ascendc_host::QueueBuffer& buffer, const char* api) {
    if (buffer.free_event < 0) return;
    ascendc_host::Core& core = ascendc_host::core();
    const int id = buffer.free_event % ascendc_host::EVENT_IDS;
    core.wait_flag(EVENTS.free, id, api);
    core.release_event(EVENTS.free, id);
    buffer.free_event = -1;
  }

  int index_ = -1;
  size_t cursor_ = 0;
};

/// A queue of one position, as TQueBind between the places that the position stands for.
template <TPosition position, int32_t depth, auto mask = 0>
class TQue : public TQueBind<ascendc_host::queue_source(position),
                             ascendc_host::queue_target(position), depth, mask> {};

/// Memory that no queue guards; flags around it are the kernel's own.
template <TPosition position = TPosition::VECCALC>
class TBuf {
 public:
  template <class T>
  LocalTensor<T> Get() {
    return Get<T>(static_cast<uint32_t>(bytes_ * 8ull / ascendc_host::element_bits<T>));
  }
  template <class T>
  LocalTensor<T> Get(uint32_t elements) {
    return GetWithOffset<T>(elements, 0);
  }
  template <class T>
  LocalTensor<T> GetWithOffset(uint32_t elements, uint32_t byte_offset) {
    HOST_CHECK(bytes_ > 0, "TBuf::Get: the buffer has no memory; TPipe::InitBuffer is missing");
    const uint64_t bytes = ascendc_host::bytes_of<T>(elements);
    HOST_CHECK(bytes + byte_offset <= bytes_,
               "TBuf::Get: %u elements of %u bits at byte %u exceed the buffer's %u bytes",
               elements, ascendc_host::element_bits<T>, byte_offset, bytes_);
    return LocalTensor<T>(ascendc_host::memory_of(position), position, offset_ + byte_offset,
                          static_cast<uint32_t>(bytes), -1, -1, 0);
  }

  /// Called by TPipe::InitBuffer.
  void init(uint32_t bytes) {
    HOST_CHECK(bytes > 0, "InitBuffer: 0 bytes for a TBuf");
    offset_ = ascendc_host::core().allocate(ascendc_host::memory_of(position), bytes);
    bytes_ = (bytes + ascendc_host::BLOCK_BYTES - 1) / ascendc_host::BLOCK_BYTES *
             ascendc_host::BLOCK_BYTES;
  }

 private:
  uint32_t offset_ = 0;
  uint32_t bytes_ = 0;
};

/// Hands out on-chip memory and event ids; one per core.
class TPipe {
 public:
  TPipe() {
    ascendc_host::Core& core = ascendc_host::core();
    HOST_CHECK(!core.pipe_object_alive, "TPipe: a core has one TPipe at a time");
    core.pipe_object_alive = true;
    core.free_all();
    owner_ = &core;
  }
  ~TPipe() { owner_->pipe_object_alive = false; }
  TPipe(const TPipe&) = delete;
  TPipe& operator=(const TPipe&) = delete;

  template <TPosition source, TPosition target, int32_t depth, auto mask>
  bool InitBuffer(TQueBind<source, target, depth, mask>& queue, uint8_t number, uint32_t bytes) {
    queue.init(number, bytes);
    return true;
  }
  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, uint32_t bytes) {
    buffer.init(bytes);
    return true;
  }

  /// Reserves an event id until ReleaseEventID.
  template <HardEvent event>
  TEventID AllocEventID() {
    return static_cast<TEventID>(ascendc_host::core().allocate_event(event, "AllocEventID", false));
  }
  template <HardEvent event>
  void ReleaseEventID(TEventID id) {
    ascendc_host::core().release_event(event, id);
  }
  /// An id that no queue holds now; not reserved.
  template <HardEvent event>
  TEventID FetchEventID() {
    return FetchEventID(event);
  }
  TEventID FetchEventID(HardEvent event) {
    return static_cast<TEventID>(ascendc_host::core().free_event(event, "FetchEventID"));
  }

  /// Waits for every pipe and gives all memory back.
  void Reset() {
    ascendc_host::core().barrier(PIPE_ALL);
    ascendc_host::core().free_all();
  }
  void Destroy() { Reset(); }

 private:
  ascendc_host::Core* owner_;
};

}  // namespace AscendC
