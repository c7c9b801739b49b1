// C = A * B with B (k x n) row by row, for the tests of the host model: B is transposed into L0B by
// LoadDataWithTranspose. One core, everything at once.
#include "kernel_operator.h"

using namespace AscendC;

namespace {

/// Types of the operands, the sums and the result.
template <class A, class C, class T>
__aicore__ inline void Multiply(GM_ADDR a, GM_ADDR b, GM_ADDR c, uint32_t m, uint32_t n, uint32_t k,
                                QuantMode_t quant) {
  constexpr uint32_t C0 = 32 / sizeof(A);
  constexpr uint32_t SQUARE = C0;  // rows and columns of what is transposed at once
  TPipe pipe;
  TQue<TPosition::A1, 1> a1_queue;
  TQue<TPosition::B1, 1> b1_queue;
  TQue<TPosition::A2, 1> a2_queue;
  TQue<TPosition::B2, 1> b2_queue;
  TQue<TPosition::CO1, 1> c_queue;
  GlobalTensor<A> a_gm;
  GlobalTensor<A> b_gm;
  GlobalTensor<T> c_gm;
  a_gm.SetGlobalBuffer((__gm__ A*)a, m * k);
  b_gm.SetGlobalBuffer((__gm__ A*)b, k * n);
  c_gm.SetGlobalBuffer((__gm__ T*)c, m * n);
  pipe.InitBuffer(a1_queue, 1, m * k * sizeof(A));
  pipe.InitBuffer(b1_queue, 1, n * k * sizeof(A));
  pipe.InitBuffer(a2_queue, 1, m * k * sizeof(A));
  pipe.InitBuffer(b2_queue, 1, n * k * sizeof(A));
  pipe.InitBuffer(c_queue, 1, m * n * 4);
  LocalTensor<A> a1 = a1_queue.template AllocTensor<A>();
  LocalTensor<A> b1 = b1_queue.template AllocTensor<A>();
  DataCopy(a1, a_gm, Nd2NzParams(1, m, k, 0, k, m, 1, 0));
  DataCopy(b1, b_gm, Nd2NzParams(1, k, n, 0, n, k, 1, 0));
  a1_queue.EnQue(a1);
  b1_queue.EnQue(b1);
  a1 = a1_queue.template DeQue<A>();
  b1 = b1_queue.template DeQue<A>();
  LocalTensor<A> a2 = a2_queue.template AllocTensor<A>();
  LocalTensor<A> b2 = b2_queue.template AllocTensor<A>();
  for (uint32_t row = 0; row < m / 16; ++row) {
    LoadData(a2[row * 16 * k], a1[row * 16 * C0],
             LoadData2DParams(0, k / C0, m / 16, 0, 0, false, 0));
  }
  for (uint32_t column = 0; column < n / SQUARE; ++column) {
    const uint32_t squares = k / SQUARE;
    LoadDataWithTranspose(b2[column * SQUARE * C0], b1,
                          LoadData2dTransposeParams(column * squares, squares, 1, n / 16 - 1, 0));
  }
  a1_queue.FreeTensor(a1);
  b1_queue.FreeTensor(b1);
  a2_queue.EnQue(a2);
  b2_queue.EnQue(b2);
  a2 = a2_queue.template DeQue<A>();
  b2 = b2_queue.template DeQue<A>();
  LocalTensor<C> sums = c_queue.template AllocTensor<C>();
  Mmad(sums, a2, b2, MmadParams(m, n, k, 0, false, true));
  a2_queue.FreeTensor(a2);
  b2_queue.FreeTensor(b2);
  c_queue.EnQue(sums);
  sums = c_queue.template DeQue<C>();
  Fixpipe(c_gm, sums, FixpipeParamsV220(n, m, m, n, false, quant, 0, 1, 0, 0, 0));
  c_queue.FreeTensor(sums);
}

}  // namespace

extern "C" __global__ __aicore__ void multiply_int8(GM_ADDR a, GM_ADDR b, GM_ADDR c, uint32_t m,
                                                    uint32_t n, uint32_t k) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);
  Multiply<int8_t, int32_t, int32_t>(a, b, c, m, n, k, NoQuant);
}

extern "C" __global__ __aicore__ void multiply_half(GM_ADDR a, GM_ADDR b, GM_ADDR c, uint32_t m,
                                                    uint32_t n, uint32_t k) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);
  Multiply<half, float, float>(a, b, c, m, n, k, NoQuant);
}

extern "C" __global__ __aicore__ void multiply_bfloat16(GM_ADDR a, GM_ADDR b, GM_ADDR c, uint32_t m,
                                                        uint32_t n, uint32_t k) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);
  Multiply<bfloat16_t, float, bfloat16_t>(a, b, c, m, n, k, F322BF16);
}
