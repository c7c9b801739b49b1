// Flags and barriers within a core and between cores; which core this is.
#pragma once

#include "tensor.h"

/// Guards of code for one kind of core: `if ASCEND_IS_AIC { ... }`.
#define ASCEND_IS_AIC (::ascendc_host::core().kind() == ::ascendc_host::Core::Kind::AIC)
#define ASCEND_IS_AIV (::ascendc_host::core().kind() == ::ascendc_host::Core::Kind::AIV)
#define ASCEND_IS_NOT_AIC (!ASCEND_IS_AIC)
#define ASCEND_IS_NOT_AIV (!ASCEND_IS_AIV)

/// The build reads this from the text of the entry point; here it is nothing.
#define KERNEL_TASK_TYPE_DEFAULT(type)

namespace AscendC {

/// Sets a flag once the source pipe has finished what it was given before.
template <HardEvent event>
void SetFlag(int32_t id) {
  ascendc_host::core().forbid_queue_event(event, id, "SetFlag");
  ascendc_host::core().set_flag(event, id, "SetFlag");
}

/// Lets the target pipe wait for the flag, and clears it.
template <HardEvent event>
void WaitFlag(int32_t id) {
  ascendc_host::core().forbid_queue_event(event, id, "WaitFlag");
  ascendc_host::core().wait_flag(event, id, "WaitFlag");
}

/// Later instructions of `pipe` start after the earlier ones have ended.
template <pipe_t pipe>
void PipeBarrier() {
  ascendc_host::core().barrier(pipe);
}

/// Index among the cores of this kind: 0..blocks-1 on a cube core, 0..blocks*ratio-1 on a vector
/// core.
inline int64_t GetBlockIdx() { return ascendc_host::core().block(); }
/// The block dimension of the launch.
inline int64_t GetBlockNum() { return ascendc_host::machine().options().block_dim; }
/// Index of a vector core within its group; 0 on a cube core.
inline int64_t GetSubBlockIdx() { return ascendc_host::core().sub_block(); }
inline int64_t GetSubBlockNum() { return ascendc_host::machine().vectors_per_cube(); }
inline int64_t GetTaskRation() { return ascendc_host::machine().vectors_per_cube(); }
inline int64_t GetTaskRatio() { return ascendc_host::machine().vectors_per_cube(); }

/// Signals other cores once `pipe` has finished what it was given before.
///
/// Mode 0: all cores of this kind; mode 1: the vector cores of the group; mode 2: between the cube
/// core and the vector cores of the group. The flag reaches its targets when all members have set
/// it.
template <uint8_t mode, pipe_t pipe>
void CrossCoreSetFlag(uint16_t flag) {
  static_assert(mode <= 2, "CrossCoreSetFlag: modes 0, 1 and 2 exist on this chip");
  static_assert(pipe != PIPE_S && pipe != PIPE_ALL,
                "CrossCoreSetFlag: the pipe is V, M, MTE1, MTE2, MTE3 or FIX");
  ascendc_host::machine().require_cross_core("CrossCoreSetFlag");
  ascendc_host::core().cross_set(mode, pipe, flag);
}

/// Holds back every later instruction of this core until the flag has come. On this chip mode and
/// pipe have no effect.
template <uint8_t mode = 0, pipe_t pipe = PIPE_S>
void CrossCoreWaitFlag(uint16_t flag) {
  ascendc_host::machine().require_cross_core("CrossCoreWaitFlag");
  ascendc_host::core().cross_wait(flag);
}

/// Waits for all vector cores (`vectors_only`), or for all cores of a mixed kernel.
template <bool vectors_only = true>
void SyncAll() {
  ascendc_host::machine().require_cross_core("SyncAll");
  ascendc_host::core().sync_all(vectors_only);
}

}  // namespace AscendC
