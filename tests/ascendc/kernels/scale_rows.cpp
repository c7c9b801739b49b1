// A small kernel for the tests of the host model: out = x * factor, in tiles, double buffered.
#include "kernel_operator.h"

using namespace AscendC;

namespace {

constexpr uint32_t TILE = 64;

class ScaleRows {
 public:
  __aicore__ inline void Init(GM_ADDR x, GM_ADDR out, uint32_t tiles, float factor) {
    tiles_ = tiles;
    factor_ = factor;
    x_.SetGlobalBuffer((__gm__ float*)x, (uint64_t)tiles * TILE);
    out_.SetGlobalBuffer((__gm__ float*)out, (uint64_t)tiles * TILE);
    pipe_.InitBuffer(in_queue_, 2, TILE * sizeof(float));
    pipe_.InitBuffer(out_queue_, 2, TILE * sizeof(float));
  }

  __aicore__ inline void Process() {
    for (uint32_t tile = GetBlockIdx(); tile < tiles_; tile += GetBlockNum()) {
      LocalTensor<float> in = in_queue_.AllocTensor<float>();
      DataCopy(in, x_[(uint64_t)tile * TILE], TILE);
      in_queue_.EnQue(in);
      LocalTensor<float> loaded = in_queue_.DeQue<float>();
      LocalTensor<float> out = out_queue_.AllocTensor<float>();
      Muls(out, loaded, factor_, TILE);
      in_queue_.FreeTensor(loaded);
      out_queue_.EnQue(out);
      LocalTensor<float> ready = out_queue_.DeQue<float>();
      DataCopy(out_[(uint64_t)tile * TILE], ready, TILE);
      out_queue_.FreeTensor(ready);
    }
  }

 private:
  TPipe pipe_;
  TQue<QuePosition::VECIN, 2> in_queue_;
  TQue<QuePosition::VECOUT, 2> out_queue_;
  GlobalTensor<float> x_;
  GlobalTensor<float> out_;
  uint32_t tiles_;
  float factor_;
};

}  // namespace

extern "C" __global__ __aicore__ void scale_rows(GM_ADDR x, GM_ADDR out, uint32_t tiles,
                                                 float factor) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  ScaleRows op;
  op.Init(x, out, tiles, factor);
  op.Process();
}
