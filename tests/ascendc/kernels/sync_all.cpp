// Two phases with a SyncAll between, for the tests of the host model: every vector core writes its
// row of a table, then reads the row of the next one. It can be told to make a mistake.
#include "kernel_operator.h"

using namespace AscendC;

namespace {

constexpr uint32_t ROW = 8;

enum Fault : uint32_t {
  NONE,
  NO_SYNC,
  ONE_CORE_LEAVES,
  STALE_CACHE,
};

__aicore__ inline void Exchange(GM_ADDR table, GM_ADDR out, uint32_t fault) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  GlobalTensor<float> table_gm;
  GlobalTensor<float> out_gm;
  table_gm.SetGlobalBuffer((__gm__ float*)table);
  out_gm.SetGlobalBuffer((__gm__ float*)out);
  pipe.InitBuffer(buffer, ROW * sizeof(float));
  LocalTensor<float> row = buffer.Get<float>();
  const uint32_t own = GetBlockIdx();
  const uint32_t next = (own + 1) % GetBlockNum();
  float sum = 0;
  if (fault == STALE_CACHE) {
    sum = table_gm.GetValue(own * ROW);  // loads the line of the data cache
  }
  Duplicate(row, (float)own, ROW);
  PipeBarrier<PIPE_ALL>();
  DataCopy(table_gm[own * ROW], row, ROW);
  if (fault == ONE_CORE_LEAVES && own == 0) {
    return;
  }
  if (fault != NO_SYNC) {
    SyncAll();
  } else {
    PipeBarrier<PIPE_ALL>();
  }
  if (fault == STALE_CACHE) {
    sum = table_gm.GetValue(own * ROW);
    Duplicate(row, sum, ROW);
  } else {
    DataCopy(row, table_gm[next * ROW], ROW);
  }
  PipeBarrier<PIPE_ALL>();
  DataCopy(out_gm[own * ROW], row, ROW);
}

}  // namespace

extern "C" __global__ __aicore__ void sync_all(GM_ADDR table, GM_ADDR out, uint32_t fault) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
  Exchange(table, out, fault);
}

// Every core adds its row of ones to the same place, and stores its number by the scalar unit.
extern "C" __global__ __aicore__ void add_rows(GM_ADDR sums, GM_ADDR numbers, uint32_t atomic) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  GlobalTensor<float> sums_gm;
  GlobalTensor<int32_t> numbers_gm;
  sums_gm.SetGlobalBuffer((__gm__ float*)sums);
  numbers_gm.SetGlobalBuffer((__gm__ int32_t*)numbers);
  pipe.InitBuffer(buffer, ROW * sizeof(float));
  LocalTensor<float> row = buffer.Get<float>();
  Duplicate(row, 1.0f, ROW);
  PipeBarrier<PIPE_ALL>();
  if (atomic != 0) {
    SetAtomicAdd<float>();
  }
  DataCopy(sums_gm, row, ROW);
  SetAtomicNone();
  // A cache line of 64 bytes for each core.
  numbers_gm.SetValue(GetBlockIdx() * 16, (int32_t)GetBlockIdx() + 1);
  DataCacheCleanAndInvalid<int32_t, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(
      numbers_gm[GetBlockIdx() * 16]);
}
