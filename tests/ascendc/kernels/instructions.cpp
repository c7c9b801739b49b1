// Single instructions of the vector unit, for the tests of the host model: copy in, run, copy out.
#include "kernel_operator.h"

using namespace AscendC;

namespace {

/// Buffers for the tensors of one test, by name of use.
class Bench {
 public:
  __aicore__ inline Bench() {
    pipe_.InitBuffer(first_, 16 * 1024);
    pipe_.InitBuffer(second_, 16 * 1024);
    pipe_.InitBuffer(third_, 16 * 1024);
    pipe_.InitBuffer(result_, 16 * 1024);
  }

  template <class T>
  __aicore__ inline LocalTensor<T> Load(TBuf<TPosition::VECCALC>& buffer, GM_ADDR source,
                                        uint32_t bytes) {
    GlobalTensor<uint8_t> gm;
    gm.SetGlobalBuffer((__gm__ uint8_t*)source, bytes);
    LocalTensor<uint8_t> local = buffer.Get<uint8_t>();
    DataCopyPad(local, gm, DataCopyExtParams(1, bytes, 0, 0, 0),
                DataCopyPadExtParams<uint8_t>(true, 0, 0, 0));
    PipeBarrier<PIPE_ALL>();
    return local.ReinterpretCast<T>();
  }

  template <class T>
  __aicore__ inline LocalTensor<T> First(GM_ADDR source, uint32_t bytes) {
    return Load<T>(first_, source, bytes);
  }
  template <class T>
  __aicore__ inline LocalTensor<T> Second(GM_ADDR source, uint32_t bytes) {
    return Load<T>(second_, source, bytes);
  }
  template <class T>
  __aicore__ inline LocalTensor<T> Scratch() {
    return third_.Get<T>();
  }

  /// The result's tensor holds what `out` does now, so that gaps can be seen.
  template <class T>
  __aicore__ inline LocalTensor<T> Result(GM_ADDR out, uint32_t bytes) {
    return Load<T>(result_, out, bytes);
  }

  __aicore__ inline void Store(GM_ADDR out, uint32_t bytes) {
    PipeBarrier<PIPE_ALL>();
    GlobalTensor<uint8_t> gm;
    gm.SetGlobalBuffer((__gm__ uint8_t*)out, bytes);
    DataCopyPad(gm, result_.Get<uint8_t>(), DataCopyExtParams(1, bytes, 0, 0, 0));
  }

 private:
  TPipe pipe_;
  TBuf<TPosition::VECCALC> first_;
  TBuf<TPosition::VECCALC> second_;
  TBuf<TPosition::VECCALC> third_;
  TBuf<TPosition::VECCALC> result_;
};

template <class S, class D>
__aicore__ inline void RunCast(GM_ADDR x, GM_ADDR out, uint32_t count, uint32_t mode,
                               uint32_t x_bytes, uint32_t out_bytes) {
  Bench bench;
  LocalTensor<S> source = bench.First<S>(x, x_bytes);
  LocalTensor<D> target = bench.Result<D>(out, out_bytes);
  Cast(target, source, static_cast<RoundMode>(mode), count);
  bench.Store(out, out_bytes);
}

}  // namespace

#define CAST_ENTRY(NAME, S, D)                                                       \
  extern "C" __global__ __aicore__ void NAME(GM_ADDR x, GM_ADDR out, uint32_t count, \
                                             uint32_t mode, uint32_t x_bytes,        \
                                             uint32_t out_bytes) {                   \
    RunCast<S, D>(x, out, count, mode, x_bytes, out_bytes);                          \
  }

CAST_ENTRY(cast_float_half, float, half)
CAST_ENTRY(cast_float_bfloat16, float, bfloat16_t)
CAST_ENTRY(cast_float_float, float, float)
CAST_ENTRY(cast_float_int32, float, int32_t)
CAST_ENTRY(cast_float_int16, float, int16_t)
CAST_ENTRY(cast_half_int8, half, int8_t)
CAST_ENTRY(cast_int8_half, int8_t, half)
CAST_ENTRY(cast_half_int4, half, int4b_t)
CAST_ENTRY(cast_int4_half, int4b_t, half)
CAST_ENTRY(cast_int32_int16, int32_t, int16_t)
CAST_ENTRY(cast_bfloat16_float, bfloat16_t, float)

// out = a + b over `repeat` repeats; b is one block for all.
extern "C" __global__ __aicore__ void add_broadcast(GM_ADDR a, GM_ADDR b, GM_ADDR out,
                                                    uint32_t mask, uint32_t repeat) {
  Bench bench;
  const uint32_t bytes = repeat * 256;
  LocalTensor<float> x = bench.First<float>(a, bytes);
  LocalTensor<float> y = bench.Second<float>(b, 32);
  LocalTensor<float> sum = bench.Result<float>(out, bytes);
  Add(sum, x, y, (uint64_t)mask, (uint8_t)repeat, {1, 1, 0, 8, 8, 0});
  bench.Store(out, bytes);
}

// The lanes whose bits are set are multiplied by 3; the others stay.
extern "C" __global__ __aicore__ void scale_bits(GM_ADDR x, GM_ADDR out, uint64_t low,
                                                 uint64_t high) {
  Bench bench;
  LocalTensor<half> values = bench.First<half>(x, 512);
  LocalTensor<half> target = bench.Result<half>(out, 512);
  uint64_t mask[2] = {low, high};
  Muls(target, values, (half)3, mask, 2, {1, 1, 8, 8});
  bench.Store(out, 512);
}

// Largest, smallest (value, index) and sum of each repeat.
extern "C" __global__ __aicore__ void reduce_repeats(GM_ADDR x, GM_ADDR out, uint32_t mask,
                                                     uint32_t repeat) {
  Bench bench;
  LocalTensor<float> values = bench.First<float>(x, repeat * 256);
  LocalTensor<float> target = bench.Result<float>(out, 1024);
  WholeReduceMax(target, values, (int32_t)mask, repeat, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
  WholeReduceSum(target[64], values, (int32_t)mask, repeat, 1, 1, 8);
  WholeReduceMin(target[128], values, (int32_t)mask, repeat, 1, 1, 8);
  BlockReduceMax(target[192], values, 1, (int32_t)mask, 1, 1, 8);
  bench.Store(out, 1024);
}

// Sum and largest (with index) of `count` values.
extern "C" __global__ __aicore__ void reduce_all(GM_ADDR x, GM_ADDR out, uint32_t count) {
  Bench bench;
  LocalTensor<float> values = bench.First<float>(x, count * 4);
  LocalTensor<float> target = bench.Result<float>(out, 64);
  LocalTensor<float> scratch = bench.Scratch<float>();
  ReduceSum(target, values, scratch, (int32_t)count);
  ReduceMax(target[8], values, scratch, (int32_t)count, true);
  bench.Store(out, 64);
}

// out = x >= limit ? x : other.
extern "C" __global__ __aicore__ void keep_large(GM_ADDR x, GM_ADDR out, uint32_t count,
                                                 float limit, float other) {
  Bench bench;
  LocalTensor<float> values = bench.First<float>(x, count * 4);
  LocalTensor<float> target = bench.Result<float>(out, count * 4);
  LocalTensor<uint8_t> bits = bench.Scratch<uint8_t>();
  CompareScalar(bits, values, limit, CMPMODE::GE, count);
  PipeBarrier<PIPE_V>();
  Select(target, bits, values, other, SELMODE::VSEL_TENSOR_SCALAR_MODE, count);
  bench.Store(out, count * 4);
}

// out = x[offsets / 4]; then the elements of a pattern behind it, and how many there are.
extern "C" __global__ __aicore__ void gather(GM_ADDR x, GM_ADDR offsets, GM_ADDR out,
                                             uint32_t count, uint32_t pattern) {
  Bench bench;
  LocalTensor<float> values = bench.First<float>(x, count * 4);
  LocalTensor<uint32_t> places = bench.Second<uint32_t>(offsets, count * 4);
  LocalTensor<float> target = bench.Result<float>(out, count * 8 + 32);
  Gather(target, values, places, 0u, count);
  uint64_t kept = 0;
  GatherMask(target[count], values, (uint8_t)pattern, true, count, {1, 1, 8, 0}, kept);
  PipeBarrier<PIPE_ALL>();
  target.SetValue(2 * count, (float)kept);
  bench.Store(out, count * 8 + 32);
}

// The elements whose bit of the mask is set.
extern "C" __global__ __aicore__ void gather_bits(GM_ADDR x, GM_ADDR bits, GM_ADDR out,
                                                  uint32_t count) {
  Bench bench;
  LocalTensor<float> values = bench.First<float>(x, count * 4);
  LocalTensor<uint32_t> mask = bench.Second<uint32_t>(bits, count / 8);
  LocalTensor<float> target = bench.Result<float>(out, count * 4);
  uint64_t kept = 0;
  GatherMask(target, values, mask, true, count, {1, 1, 8, 0}, kept);
  bench.Store(out, count * 4);
}

// Each of 16 elements over a block; 0, 1, 2, ...; x * 2 + 1 by Axpy; x >> 3.
extern "C" __global__ __aicore__ void fill(GM_ADDR x, GM_ADDR out) {
  Bench bench;
  LocalTensor<float> values = bench.First<float>(x, 64);
  LocalTensor<float> target = bench.Result<float>(out, 1024);
  Brcb(target, values, 2, {1, 8});
  LocalTensor<int32_t> numbers = target[128].ReinterpretCast<int32_t>();
  CreateVecIndex(numbers, (int32_t)-4, 16);
  Duplicate(target[160], 1.0f, 16);
  PipeBarrier<PIPE_V>();
  Axpy(target[160], values, 2.0f, 16);
  ShiftRight(numbers[64], numbers, (int32_t)3, 16);
  bench.Store(out, 1024);
}

// 128 scores in descending order with their indices: four sorts of 32, one merge.
extern "C" __global__ __aicore__ void sort(GM_ADDR x, GM_ADDR out, GM_ADDR indices) {
  Bench bench;
  LocalTensor<float> scores = bench.First<float>(x, 512);
  LocalTensor<uint32_t> order = bench.Second<uint32_t>(indices, 512);
  LocalTensor<float> lists = bench.Scratch<float>();
  LocalTensor<float> merged = lists[512];
  Sort32(lists, scores, order, 4);
  PipeBarrier<PIPE_V>();
  const uint16_t lengths[4] = {32, 32, 32, 32};
  MrgSort(merged, MrgSortSrcList<float>(lists, lists[64], lists[128], lists[192]),
          MrgSort4Info(lengths, false, 15, 1));
  PipeBarrier<PIPE_V>();
  LocalTensor<float> target = bench.Result<float>(out, 1024);
  Extract(target, target[128].ReinterpretCast<uint32_t>(), merged, 4);
  bench.Store(out, 1024);
}
