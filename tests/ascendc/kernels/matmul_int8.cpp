// A small mixed kernel for the tests of the host model: C = (A * B^T) * scale, int8 operands.
//
// The cube core multiplies 16 rows of A (m x k) with all of B (n x k) into a workspace in GM; the
// two vector cores scale a half of the 16 rows each.
#include "kernel_operator.h"

using namespace AscendC;

namespace {

constexpr uint32_t ROWS = 16;
constexpr uint16_t PRODUCT_READY = 0;
constexpr uint16_t WORKSPACE_FREE = 1;

enum Fault : uint32_t {
  NONE,
  NO_WAIT_FOR_PRODUCT,
  NO_WAIT_FOR_WORKSPACE,
  SIGNAL_TOO_EARLY,
  FREE_TOO_EARLY,
  NEVER_SIGNALLED,
  SIGNALLED_TWICE,
  NO_CUBE_BARRIER,
  NO_MTE1_M,
  FORGOTTEN_INITIAL,
  VECTOR_ON_CUBE,
  QUANT_MODE,
  MISALIGNED_L0,
};

struct Arguments {
  GM_ADDR a;
  GM_ADDR b;
  GM_ADDR c;
  GM_ADDR workspace;
  uint32_t m;
  uint32_t n;
  uint32_t k;
  float scale;
  uint32_t fault;
};

class CubeSide {
 public:
  __aicore__ inline void Init(const Arguments& args) {
    args_ = args;
    a_.SetGlobalBuffer((__gm__ int8_t*)args.a, (uint64_t)args.m * args.k);
    b_.SetGlobalBuffer((__gm__ int8_t*)args.b, (uint64_t)args.n * args.k);
    workspace_.SetGlobalBuffer((__gm__ int32_t*)args.workspace + GetBlockIdx() * ROWS * args.n,
                               ROWS * args.n);
    pipe_.InitBuffer(a1_, 2, ROWS * args.k);
    pipe_.InitBuffer(b1_, 1, args.n * args.k);
    pipe_.InitBuffer(a2_, 2, ROWS * args.k);
    pipe_.InitBuffer(b2_, 1, args.n * args.k);
    pipe_.InitBuffer(c_, 1, ROWS * args.n * sizeof(int32_t));
  }

  __aicore__ inline void Process() {
    LocalTensor<int8_t> b1 = b1_.AllocTensor<int8_t>();
    DataCopy(b1, b_, Nd2NzParams(1, args_.n, args_.k, 0, args_.k, args_.n, 1, 0));
    b1_.EnQue(b1);
    b1 = b1_.DeQue<int8_t>();
    LocalTensor<int8_t> b2 = b2_.AllocTensor<int8_t>();
    // NZ in L1 is (k1, n1) row by row already: what L0B wants.
    LoadData(b2, b1, LoadData2DParams(0, args_.n / 16 * (args_.k / 32), 1, 0, 0, false, 0));
    b1_.FreeTensor(b1);
    b2_.EnQue(b2);
    b2 = b2_.DeQue<int8_t>();
    bool first = true;
    for (uint32_t row = GetBlockIdx() * ROWS; row < args_.m; row += GetBlockNum() * ROWS) {
      Multiply(row, b2);
      if (!first && args_.fault != NO_WAIT_FOR_WORKSPACE) {
        CrossCoreWaitFlag(WORKSPACE_FREE);
      }
      first = false;
      Store();
      Signal();
    }
    if (!first) {
      CrossCoreWaitFlag(WORKSPACE_FREE);
    }
    b2_.FreeTensor(b2);
    if (args_.fault == VECTOR_ON_CUBE) {
      PipeBarrier<PIPE_V>();
    }
  }

 private:
  __aicore__ inline void Signal() {
    if (args_.fault == SIGNAL_TOO_EARLY) {
      CrossCoreSetFlag<2, PIPE_MTE2>(PRODUCT_READY);  // MTE2 knows nothing of Fixpipe
    } else if (args_.fault != NEVER_SIGNALLED) {
      CrossCoreSetFlag<2, PIPE_FIX>(PRODUCT_READY);
    }
    if (args_.fault == SIGNALLED_TWICE) {
      CrossCoreSetFlag<2, PIPE_FIX>(2);
    }
  }

  __aicore__ inline void Multiply(uint32_t row, LocalTensor<int8_t>& b2) {
    LocalTensor<int8_t> a1 = a1_.AllocTensor<int8_t>();
    DataCopy(a1, a_[(uint64_t)row * args_.k],
             Nd2NzParams(1, ROWS, args_.k, 0, args_.k, ROWS, 1, 0));
    a1_.EnQue(a1);
    a1 = a1_.DeQue<int8_t>();
    LocalTensor<int8_t> a2 = a2_.AllocTensor<int8_t>();
    if (args_.fault == MISALIGNED_L0) {
      LoadData(a2[32], a1, LoadData2DParams(0, 1, 1, 0, 0, false, 0));
    }
    LoadData(a2, a1, LoadData2DParams(0, args_.k / 32, 1, 0, 0, false, 0));
    a1_.FreeTensor(a1);
    LocalTensor<int32_t> c = c_.AllocTensor<int32_t>();
    const uint32_t half = args_.k / 2;
    const bool fresh = args_.fault == FORGOTTEN_INITIAL;
    if (args_.fault == NO_MTE1_M) {
      // The flag of the queue comes after the first half only.
      Mmad(c, a2, b2, MmadParams(ROWS, args_.n, half, 0, false, true));
    }
    a2_.EnQue(a2);
    a2 = a2_.DeQue<int8_t>();
    Mmad(c, a2, b2, MmadParams(ROWS, args_.n, half, 0, false, true));
    if (args_.fault != NO_CUBE_BARRIER) {
      PipeBarrier<PIPE_M>();
    }
    Mmad(c, a2[ROWS * half], b2[half * args_.n], MmadParams(ROWS, args_.n, half, 0, false, fresh));
    a2_.FreeTensor(a2);
    c_.EnQue(c);
  }

  __aicore__ inline void Store() {
    LocalTensor<int32_t> c = c_.DeQue<int32_t>();
    FixpipeParamsV220 params;
    params.nSize = args_.n;
    params.mSize = ROWS;
    params.srcStride = ROWS;
    params.dstStride = args_.n;
    params.quantPre = args_.fault == QUANT_MODE ? F322BF16 : NoQuant;
    Fixpipe(workspace_, c, params);
    c_.FreeTensor(c);
  }

  Arguments args_;
  TPipe pipe_;
  TQue<TPosition::A1, 2> a1_;
  TQue<TPosition::B1, 1> b1_;
  TQue<TPosition::A2, 2> a2_;
  TQue<TPosition::B2, 1> b2_;
  TQue<TPosition::CO1, 1> c_;
  GlobalTensor<int8_t> a_;
  GlobalTensor<int8_t> b_;
  GlobalTensor<int32_t> workspace_;
};

class VectorSide {
 public:
  __aicore__ inline void Init(const Arguments& args) {
    args_ = args;
    block_ = GetBlockIdx() / 2;
    half_rows_ = GetSubBlockIdx() * (ROWS / 2);
    elements_ = ROWS / 2 * args.n;
    workspace_.SetGlobalBuffer((__gm__ int32_t*)args.workspace + block_ * ROWS * args.n,
                               ROWS * args.n);
    c_.SetGlobalBuffer((__gm__ float*)args.c, (uint64_t)args.m * args.n);
    pipe_.InitBuffer(in_, 1, elements_ * sizeof(int32_t));
    pipe_.InitBuffer(out_, 1, elements_ * sizeof(float));
  }

  __aicore__ inline void Process() {
    for (uint32_t row = block_ * ROWS; row < args_.m; row += GetBlockNum() * ROWS) {
      if (args_.fault != NO_WAIT_FOR_PRODUCT) {
        CrossCoreWaitFlag(PRODUCT_READY);
      }
      LocalTensor<int32_t> product = in_.AllocTensor<int32_t>();
      if (args_.fault == FREE_TOO_EARLY) {
        CrossCoreSetFlag<2, PIPE_MTE2>(WORKSPACE_FREE);
      }
      DataCopy(product, workspace_[half_rows_ * args_.n], elements_);
      if (args_.fault != FREE_TOO_EARLY) {
        CrossCoreSetFlag<2, PIPE_MTE2>(WORKSPACE_FREE);
      }
      in_.EnQue(product);
      product = in_.DeQue<int32_t>();
      LocalTensor<float> out = out_.AllocTensor<float>();
      Cast(out, product, RoundMode::CAST_RINT, elements_);
      PipeBarrier<PIPE_V>();
      Muls(out, out, args_.scale, elements_);
      in_.FreeTensor(product);
      out_.EnQue(out);
      out = out_.DeQue<float>();
      DataCopy(c_[(uint64_t)(row + half_rows_) * args_.n], out, elements_);
      out_.FreeTensor(out);
    }
  }

 private:
  Arguments args_;
  TPipe pipe_;
  TQue<TPosition::VECIN, 1> in_;
  TQue<TPosition::VECOUT, 1> out_;
  GlobalTensor<int32_t> workspace_;
  GlobalTensor<float> c_;
  uint32_t block_;
  uint32_t half_rows_;
  uint32_t elements_;
};

}  // namespace

// m % 16 == 0, n % 16 == 0, k % 64 == 0; workspace: block_dim * 16 * n int32.
extern "C" __global__ __aicore__ void matmul_int8(GM_ADDR a, GM_ADDR b, GM_ADDR c,
                                                  GM_ADDR workspace, uint32_t m, uint32_t n,
                                                  uint32_t k, float scale, uint32_t fault) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  const Arguments args{a, b, c, workspace, m, n, k, scale, fault};
  if ASCEND_IS_AIC {
    CubeSide cube;
    cube.Init(args);
    cube.Process();
  }
  if ASCEND_IS_AIV {
    VectorSide vector;
    vector.Init(args);
    vector.Process();
  }
}
