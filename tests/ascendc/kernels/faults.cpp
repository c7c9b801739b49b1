// A vector kernel that can be told to make one mistake, for the tests of the host model.
//
// Without a mistake: out[tile] = x[tile] * 2 / max|x[tile]|, and counts[tile] = tile + 1. The check
// of a mistake is that the model refuses it, so each stands where a real kernel could have it.
#include "kernel_operator.h"

using namespace AscendC;

namespace {

constexpr uint32_t TILE = 64;
constexpr uint32_t TILE_BYTES = TILE * sizeof(float);

enum Fault : uint32_t {
  NONE,
  NO_V_S,
  NO_VECTOR_BARRIER,
  NO_S_MTE3,
  NO_V_MTE2,
  NO_MTE3_MTE2,
  NO_STORE_BARRIER,
  ALLOC_FOR_DEQUE,
  NO_FREE,
  NO_ENQUEUE,
  FREE_TWICE,
  USE_AFTER_FREE,
  USE_WHILE_QUEUED,
  MISALIGNED,
  PARTIAL_BLOCK,
  OUTSIDE_GM,
  NULL_POINTER,
  UB_OVERFLOW,
  TENSOR_OVERFLOW,
  SET_TWICE,
  NEVER_WAITED,
  NEVER_SET,
  EVENT_ID,
  QUEUE_EVENT,
  CORES_OVERLAP,
  ROUND_MODE,
  CUBE_ON_VECTOR,
  MASK_TOO_LARGE,
  PARTIAL_OVERLAP,
  COMPARE_COUNT,
  GATHER_OUTSIDE,
  UNSORTED,
  DIRTY_CACHE,
  SYNC_WITHOUT_SCHEDULER,
  NO_LOAD,
};

class Faults {
 public:
  __aicore__ inline void Init(GM_ADDR x, GM_ADDR out, GM_ADDR counts, uint32_t tiles,
                              uint32_t fault) {
    tiles_ = tiles;
    fault_ = fault;
    x_.SetGlobalBuffer((__gm__ float*)x);
    out_.SetGlobalBuffer((__gm__ float*)out);
    counts_.SetGlobalBuffer((__gm__ int32_t*)counts);
    pipe_.InitBuffer(in_queue_, 2, TILE_BYTES);
    pipe_.InitBuffer(out_queue_, 2, TILE_BYTES);
    pipe_.InitBuffer(magnitudes_, fault == UB_OVERFLOW ? 192 * 1024 : TILE_BYTES);
    pipe_.InitBuffer(scratch_, 2 * TILE_BYTES);
    pipe_.InitBuffer(count_, 32);
  }

  __aicore__ inline void Process() {
    for (uint32_t tile = GetBlockIdx(); tile < tiles_; tile += GetBlockNum()) {
      Load(tile);
      Compute();
      Store(tile);
      Count(tile);
    }
    Finally();
  }

 private:
  __aicore__ inline void Load(uint32_t tile) {
    LocalTensor<float> in = in_queue_.AllocTensor<float>();
    if (fault_ == OUTSIDE_GM) {
      DataCopy(in, x_[(uint64_t)tiles_ * TILE - 8], TILE);
    } else if (fault_ == PARTIAL_BLOCK) {
      DataCopy(in, x_[(uint64_t)tile * TILE], TILE - 3);
    } else if (fault_ != NO_LOAD) {
      DataCopy(in, x_[(uint64_t)tile * TILE], TILE);
    }
    if (fault_ != NO_ENQUEUE) {
      in_queue_.EnQue(in);
    }
    if (fault_ == QUEUE_EVENT) {
      SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
      WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
    }
    if (fault_ == USE_WHILE_QUEUED) {
      Adds(in, in, 1.0f, TILE);
    }
  }

  __aicore__ inline void Compute() {
    LocalTensor<float> in = in_queue_.DeQue<float>();
    LocalTensor<float> magnitudes = magnitudes_.Get<float>(TILE);
    LocalTensor<float> work = scratch_.Get<float>();
    Abs(magnitudes, in, TILE);
    if (fault_ != NO_VECTOR_BARRIER) {
      PipeBarrier<PIPE_V>();
    }
    // The work space lies behind the result.
    ReduceMax(work, magnitudes, work[8], (int32_t)TILE);
    if (fault_ != NO_V_S) {
      const TEventID id = pipe_.FetchEventID<HardEvent::V_S>();
      SetFlag<HardEvent::V_S>(id);
      WaitFlag<HardEvent::V_S>(id);
    }
    const float largest = work.GetValue(0);
    LocalTensor<float> out = out_queue_.AllocTensor<float>();
    Operands(out, in, 2.0f / largest);
    in_queue_.FreeTensor(in);
    if (fault_ == FREE_TWICE) {
      in_queue_.FreeTensor(in);
    }
    out_queue_.EnQue(out);
  }

  __aicore__ inline void Operands(LocalTensor<float>& out, LocalTensor<float>& in, float factor) {
    if (fault_ == MISALIGNED) {
      Muls(out, in[1], factor, TILE - 1);
    } else if (fault_ == TENSOR_OVERFLOW) {
      Muls(out, in, factor, TILE + 1);
    } else if (fault_ == MASK_TOO_LARGE) {
      Muls(out, in, factor, (uint64_t)65, 1, {1, 1, 8, 8});
    } else if (fault_ == PARTIAL_OVERLAP) {
      Muls(in[8], in, factor, TILE - 8);
    } else {
      Muls(out, in, factor, TILE);
    }
  }

  __aicore__ inline void Store(uint32_t tile) {
    LocalTensor<float> out =
        fault_ == ALLOC_FOR_DEQUE ? out_queue_.AllocTensor<float>() : out_queue_.DeQue<float>();
    DataCopy(out_[(uint64_t)tile * TILE], out, TILE);
    if (fault_ == NO_STORE_BARRIER) {
      DataCopy(out_[(uint64_t)tile * TILE], out, TILE);
    }
    if (fault_ == NO_MTE3_MTE2) {
      LocalTensor<float> back = in_queue_.AllocTensor<float>();
      DataCopy(back, out_[(uint64_t)tile * TILE], TILE);
      in_queue_.FreeTensor(back);
    }
    LocalTensor<float> stale = out[8];
    if (fault_ != NO_FREE) {
      out_queue_.FreeTensor(out);
    }
    if (fault_ == USE_AFTER_FREE) {
      Adds(stale, stale, 1.0f, 8);
    }
  }

  __aicore__ inline void Count(uint32_t tile) {
    LocalTensor<int32_t> count = count_.Get<int32_t>();
    count.SetValue(0, (int32_t)tile + 1);
    const TEventID id = pipe_.FetchEventID<HardEvent::S_MTE3>();
    if (fault_ != NO_S_MTE3) {
      SetFlag<HardEvent::S_MTE3>(id);
      WaitFlag<HardEvent::S_MTE3>(id);
    }
    if (fault_ == CORES_OVERLAP) {
      DataCopy(counts_[tile], count, 8);  // 8 counts, 7 of them other tiles'
    } else {
      DataCopyPad(counts_[tile], count, DataCopyExtParams(1, sizeof(int32_t), 0, 0, 0));
    }
    SetFlag<HardEvent::MTE3_S>(EVENT_ID0);
    WaitFlag<HardEvent::MTE3_S>(EVENT_ID0);
  }

  /// Mistakes that stand alone.
  __aicore__ inline void Finally() {
    LocalTensor<float> values = scratch_.Get<float>(TILE);
    LocalTensor<float> more = magnitudes_.Get<float>(TILE);
    PipeBarrier<PIPE_ALL>();
    Duplicate(values, 1.0f, TILE);
    PipeBarrier<PIPE_V>();
    if (fault_ == NO_V_MTE2) {
      DataCopy(values, x_, TILE);  // overwrites what the vector unit still writes
    } else if (fault_ == NULL_POINTER) {
      GlobalTensor<float> nowhere;
      nowhere.SetGlobalBuffer((__gm__ float*)nullptr, TILE);
      DataCopy(values, nowhere, TILE);
    } else if (fault_ == SET_TWICE) {
      SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
      SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    } else if (fault_ == NEVER_WAITED) {
      SetFlag<HardEvent::MTE2_MTE3>(EVENT_ID1);
    } else if (fault_ == NEVER_SET) {
      WaitFlag<HardEvent::V_S>(EVENT_ID3);
    } else if (fault_ == EVENT_ID) {
      SetFlag<HardEvent::V_S>(8);
    } else if (fault_ == ROUND_MODE) {
      Cast(more.ReinterpretCast<int32_t>(), values, RoundMode::CAST_NONE, TILE);
    } else if (fault_ == CUBE_ON_VECTOR) {
      PipeBarrier<PIPE_M>();
    } else if (fault_ == COMPARE_COUNT) {
      CompareScalar(more.ReinterpretCast<uint8_t>(), values, 0.0f, CMPMODE::GE, 60);
    } else if (fault_ == GATHER_OUTSIDE) {
      Gather(more, values, values.ReinterpretCast<uint32_t>(), 0, 8);
    } else if (fault_ == UNSORTED) {
      Unsorted(values, more);
    } else if (fault_ == DIRTY_CACHE) {
      counts_.SetValue(0, 7);
    } else if (fault_ == SYNC_WITHOUT_SCHEDULER) {
      SyncAll();
    }
  }

  __aicore__ inline void Unsorted(LocalTensor<float>& values, LocalTensor<float>& more) {
    const uint16_t lengths[4] = {2, 2, 0, 0};
    PipeBarrier<PIPE_ALL>();
    values.SetValue(2, 5.0f);  // the score of the second record
    SetFlag<HardEvent::S_V>(EVENT_ID0);
    WaitFlag<HardEvent::S_V>(EVENT_ID0);
    MrgSort(more, MrgSortSrcList<float>(values, values[8], values, values),
            MrgSort4Info(lengths, false, 3, 1));
  }

  TPipe pipe_;
  TQue<QuePosition::VECIN, 2> in_queue_;
  TQue<QuePosition::VECOUT, 2> out_queue_;
  TBuf<TPosition::VECCALC> magnitudes_;
  TBuf<TPosition::VECCALC> scratch_;
  TBuf<TPosition::VECCALC> count_;
  GlobalTensor<float> x_;
  GlobalTensor<float> out_;
  GlobalTensor<int32_t> counts_;
  uint32_t tiles_;
  uint32_t fault_;
};

}  // namespace

extern "C" __global__ __aicore__ void faults(GM_ADDR x, GM_ADDR out, GM_ADDR counts, uint32_t tiles,
                                             uint32_t fault) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  Faults op;
  op.Init(x, out, counts, tiles, fault);
  op.Process();
}
