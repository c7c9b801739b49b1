// beam_topk: the k greatest logits of each row and the log-softmax over them, in one launch.
//
// Inputs
//   codes      int8    [rows, vocab]  quantised logits, rows code_stride elements apart, -127..127
//   scales     float32 [rows]         logit ~ code * scale, positive
//   logits     T       [rows, vocab]  exact entries only; rows logits_stride elements apart
// Outputs, contiguous
//   indices    int32   [rows, k]      greatest first; among equals the lower index comes first
//   scores     float32 [rows, k]      code * scale, or the logit itself (at least -FLT_MAX)
//   log_probs  float32 [rows, k]      log-softmax of the row's k scores
// Scratch
//   workspace  8192 bytes per row     the best 16 of each part of a row, as (score, index) records
// 1 <= k <= 16, k <= vocab <= 262144. Vector cores only; every core must be resident, because of
// SyncAll, and that needs a mixed task type (the scheduling module serves it).
//
// Division of work. A row is cut into groups of 128 codes (one repeat of half). When there are more
// cores than rows, its groups are cut into `parts` ranges, at most 64; core c takes the (row, part)
// pairs c, c + cores, ... After SyncAll core c merges rows c, c + cores, ...
//
// A part
//   1. Tiles of 16384 codes stream in, double buffered; one WholeReduceMax gives the greatest code
//      of each group.
//   2. Sorting these gives the k-th greatest, T: k different groups hold a code of at least T, so
//      every group that holds one of the k best has a maximum of at least T.
//   3. Groups at or above T (quantised), or at or above T - 1 (exact) are marked, in order of their
//      index, and only these are read again: codes, or logits, 16 groups at a time. A batch is
//      sorted and merged with the best 16 so far. Sort32 and MrgSort put the earlier of two equals
//      first, and everything is presented in order of the index.
// Exact entries: a logit differs from code * scale by less than one step, mostly half of one. One
// whose code is 2 or more below that of k others is therefore below all of them, so the k best
// are in marked groups. When nearly all groups are marked (flat logits) the part is read whole:
// slower, and still exact; there is no other fallback.
//
// Unified buffer, bytes (of 188160 that InitBuffer hands out)
//   tiles 2 x 16384 | as half 32768 | maxima 4096 | marks 256 | scores 8192 | indices 8192
//   0..2047 8192 | groups read again 2 x 8192 | sorting 2 x 16384 | best 2 x 256
//   records in 8192, out 128 | results 384, scratch 3 x 128                        = 153216
//
// What guards what
//   queues tiles_, groups_, lists_ (MTE2_V, V_MTE2), kept_, results_ (V_MTE3, MTE3_V)
//   V_S (event 0): the scalar unit reads the threshold, the marks, the greatest score, the sum
//   PipeBarrier<PIPE_V>: between a vector instruction and one that reads or rewrites its result
//   SyncAll: all records are in memory before any core merges
#include "kernel_operator.h"

namespace beam_topk {
using namespace AscendC;

constexpr uint32_t kGroup = 128;
constexpr uint32_t kTile = 16384;
constexpr uint32_t kMaxGroups = 2048;
constexpr uint32_t kMaxParts = 64;
constexpr uint32_t kKept = 16;   // records that a part keeps, and the greatest k
constexpr uint32_t kSlots = 16;  // groups scored at once
constexpr uint32_t kScored = kSlots * kGroup;
constexpr uint32_t kRecord = 2;       // floats of a record: score, index
constexpr uint32_t kSortRepeat = 32;  // elements that Sort32 sorts
constexpr uint32_t kMergeWays = 4;    // lists that MrgSort merges
constexpr uint32_t kRow = 32;         // elements that Extract writes
constexpr float kBelowAll = -__builtin_inff();
constexpr float kLowest = -3.402823466e+38f;  // what is real stays above what is padding
constexpr half kNoCode = static_cast<half>(-128.0f);

/// Pointers and numbers of a launch; see the top of this file.
struct Arguments {
  GM_ADDR codes;
  GM_ADDR scales;
  GM_ADDR logits;
  GM_ADDR indices;
  GM_ADDR scores;
  GM_ADDR log_probs;
  GM_ADDR workspace;
  uint32_t rows, vocab, k, code_stride, logits_stride;
};

/// The smallest `unit * 4^n` that holds `count`.
__aicore__ inline uint32_t PaddedCount(uint32_t count, uint32_t unit) {
  uint32_t padded = unit;
  while (padded < count) {
    padded *= kMergeWays;
  }
  return padded;
}

__aicore__ inline uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

__aicore__ inline uint32_t Smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

/// T: what is scored: int8_t (codes), or the type of the logits.
template <typename T>
class BeamTopk {
 public:
  __aicore__ inline void Init(const Arguments& arguments) {
    a_ = arguments;
    total_groups_ = CeilDiv(a_.vocab, kGroup);
    const uint32_t cores = static_cast<uint32_t>(GetBlockNum());
    const uint32_t wanted = Smaller(cores < a_.rows ? 1 : cores / a_.rows, kMaxParts);
    part_groups_ = CeilDiv(total_groups_, wanted);
    parts_ = CeilDiv(total_groups_, part_groups_);
    BindMemory();
    pipe_.InitBuffer(tiles_, 2, kTile);
    pipe_.InitBuffer(groups_, 2, kScored * sizeof(T));
    pipe_.InitBuffer(lists_, 1, kMaxParts * kKept * kRecord * sizeof(float));
    pipe_.InitBuffer(kept_, 1, kKept * kRecord * sizeof(float));
    pipe_.InitBuffer(results_, 1, 3 * kRow * sizeof(float));
    pipe_.InitBuffer(wide_, kTile * sizeof(half));
    pipe_.InitBuffer(maxima_, kMaxGroups * sizeof(half));
    pipe_.InitBuffer(marks_, kMaxGroups / 8);
    pipe_.InitBuffer(scores_, kScored * sizeof(float));
    pipe_.InitBuffer(index_, kScored * sizeof(int32_t));
    pipe_.InitBuffer(count_, kScored * sizeof(int32_t));
    pipe_.InitBuffer(sort_a_, kScored * kRecord * sizeof(float));
    pipe_.InitBuffer(sort_b_, kScored * kRecord * sizeof(float));
    pipe_.InitBuffer(best_a_, 2 * kKept * kRecord * sizeof(float));
    pipe_.InitBuffer(best_b_, 2 * kKept * kRecord * sizeof(float));
    pipe_.InitBuffer(scratch_, 3 * kRow * sizeof(float));
  }

  __aicore__ inline void Process() {
    CreateVecIndex(count_.template Get<int32_t>(), static_cast<int32_t>(0), kScored);
    Duplicate(index_.template Get<int32_t>(), static_cast<int32_t>(0), kScored);
    const uint32_t core = static_cast<uint32_t>(GetBlockIdx());
    const uint32_t cores = static_cast<uint32_t>(GetBlockNum());
    for (uint32_t work = core; work < a_.rows * parts_; work += cores) {
      SelectPart(work / parts_, work % parts_);
    }
    SyncAll<true>();
    for (uint32_t row = core; row < a_.rows; row += cores) {
      MergeRow(row);
    }
  }

 private:
  static constexpr bool kExact = !std::is_same_v<T, int8_t>;

  __aicore__ inline void BindMemory() {
    codes_gm_.SetGlobalBuffer((__gm__ int8_t*)a_.codes);
    scales_gm_.SetGlobalBuffer((__gm__ float*)a_.scales);
    if constexpr (kExact) {
      source_gm_.SetGlobalBuffer((__gm__ T*)a_.logits);
    } else {
      source_gm_.SetGlobalBuffer((__gm__ T*)a_.codes);
    }
    indices_gm_.SetGlobalBuffer((__gm__ int32_t*)a_.indices);
    scores_gm_.SetGlobalBuffer((__gm__ float*)a_.scores);
    log_probs_gm_.SetGlobalBuffer((__gm__ float*)a_.log_probs);
    workspace_gm_.SetGlobalBuffer((__gm__ float*)a_.workspace);
  }

  __aicore__ inline void SelectPart(uint32_t row, uint32_t part) {
    const uint32_t first = part * part_groups_;
    const uint32_t groups = Smaller(part_groups_, total_groups_ - first);
    ReduceGroups(row, first, groups);
    const float kth = KthGreatest(groups);
    MarkGroups(kExact ? kth - 1.0f : kth);
    ScoreMarked(row, first, groups);
    KeepBest(row, part);
  }

  /// Writes the greatest code of each group of a part to maxima_.
  __aicore__ inline void ReduceGroups(uint32_t row, uint32_t first, uint32_t groups) {
    const LocalTensor<half> maxima = maxima_.template Get<half>();
    Duplicate(maxima, kNoCode, kMaxGroups);
    const uint32_t begin = first * kGroup;
    const uint32_t codes = Smaller(groups * kGroup, a_.vocab - begin);
    for (uint32_t done = 0; done < codes; done += kTile) {
      const uint32_t count = Smaller(kTile, codes - done);
      LocalTensor<int8_t> tile = tiles_.template AllocTensor<int8_t>();
      DataCopyPad(tile, codes_gm_[(uint64_t)row * a_.code_stride + begin + done],
                  DataCopyExtParams(1, count, 0, 0, 0), DataCopyPadExtParams<int8_t>());
      tiles_.EnQue(tile);
      ReduceTile(maxima[done / kGroup], count);
    }
  }

  __aicore__ inline void ReduceTile(const LocalTensor<half>& maxima, uint32_t count) {
    LocalTensor<int8_t> tile = tiles_.template DeQue<int8_t>();
    const LocalTensor<half> wide = wide_.template Get<half>();
    const uint32_t groups = CeilDiv(count, kGroup);
    if (count % kGroup != 0) {  // the vocabulary ends inside a group
      Duplicate(wide[(groups - 1) * kGroup], kNoCode, kGroup);
      PipeBarrier<PIPE_V>();
    }
    Cast(wide, tile, RoundMode::CAST_NONE, count);
    PipeBarrier<PIPE_V>();
    tiles_.FreeTensor(tile);
    WholeReduceMax<half>(maxima, wide, kGroup, groups, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    PipeBarrier<PIPE_V>();
  }

  /// Returns the k-th greatest of maxima_ (-128 if a part has fewer groups).
  __aicore__ inline float KthGreatest(uint32_t groups) {
    const uint32_t padded = PaddedCount(groups, kSortRepeat);
    const LocalTensor<float> values = scores_.template Get<float>();
    Cast(values, maxima_.template Get<half>(), RoundMode::CAST_NONE, padded);
    PipeBarrier<PIPE_V>();
    const LocalTensor<float> sorted = Sort(values, count_.template Get<uint32_t>(), padded);
    SetFlag<HardEvent::V_S>(EVENT_ID0);
    WaitFlag<HardEvent::V_S>(EVENT_ID0);
    return sorted.GetValue((a_.k - 1) * kRecord);
  }

  /// Sets the bit of each group whose maximum is `least` or more.
  __aicore__ inline void MarkGroups(float least) {
    Compares(marks_.template Get<uint8_t>(), maxima_.template Get<half>(), static_cast<half>(least),
             CMPMODE::GE, kMaxGroups);
    SetFlag<HardEvent::V_S>(EVENT_ID0);
    WaitFlag<HardEvent::V_S>(EVENT_ID0);
  }

  /// Scores every marked group, in order, and leaves the best records in best_.
  __aicore__ inline void ScoreMarked(uint32_t row, uint32_t first, uint32_t groups) {
    const LocalTensor<uint64_t> marks = marks_.template Get<uint64_t>();
    newest_is_a_ = true;
    Duplicate(best_a_.template Get<float>(), kBelowAll, kKept * kRecord);
    uint32_t slots = 0;
    for (uint32_t word = 0; word < CeilDiv(groups, 64); ++word) {
      for (uint64_t bits = marks.GetValue(word); bits != 0; bits &= bits - 1) {
        const uint32_t group = word * 64 + static_cast<uint32_t>(ScalarGetSFFValue<1>(bits));
        if (group >= groups) {  // padding of maxima_, when a part has few groups
          break;
        }
        LoadGroup(row, first + group, slots++);
        if (slots == kSlots) {
          ScoreBatch(slots);
          slots = 0;
        }
      }
    }
    if (slots != 0) {
      ScoreBatch(slots);
    }
  }

  /// Starts to read a group again into slot `slot` of a batch.
  __aicore__ inline void LoadGroup(uint32_t row, uint32_t group, uint32_t slot) {
    const uint32_t begin = group * kGroup;
    const uint32_t count = Smaller(kGroup, a_.vocab - begin);
    const uint32_t stride = kExact ? a_.logits_stride : a_.code_stride;
    if (slot == 0) {
      batch_ = groups_.template AllocTensor<T>();
    }
    DataCopyPad(batch_[slot * kGroup], source_gm_[(uint64_t)row * stride + begin],
                DataCopyExtParams(1, count * sizeof(T), 0, 0, 0), DataCopyPadExtParams<T>());
    Adds(index_.template Get<int32_t>()[slot * kGroup], count_.template Get<int32_t>(),
         static_cast<int32_t>(begin), kGroup);
    filled_ = slot * kGroup + count;  // only the vocabulary's last group is not full
  }

  /// Sorts the batch and merges it with the best so far.
  __aicore__ inline void ScoreBatch(uint32_t slots) {
    groups_.EnQue(batch_);
    batch_ = groups_.template DeQue<T>();
    const uint32_t padded = PaddedCount(slots * kGroup, kGroup);
    const LocalTensor<float> scores = scores_.template Get<float>();
    Duplicate(scores, kBelowAll, padded);
    PipeBarrier<PIPE_V>();
    ToFloat(scores);
    PipeBarrier<PIPE_V>();
    groups_.FreeTensor(batch_);
    const LocalTensor<float> sorted = Sort(scores, index_.template Get<uint32_t>(), padded);
    const uint16_t lengths[kMergeWays] = {kKept, kKept, 0, 0};
    MrgSort(Best(false), MrgSortSrcList<float>(Best(true), sorted, sorted, sorted),
            MrgSort4Info(lengths, false, 3, 1));
    PipeBarrier<PIPE_V>();
    newest_is_a_ = !newest_is_a_;
  }

  /// Converts the first filled_ elements of the batch.
  __aicore__ inline void ToFloat(const LocalTensor<float>& scores) {
    if constexpr (std::is_same_v<T, int8_t>) {
      const LocalTensor<half> wide = wide_.template Get<half>();
      Cast(wide, batch_, RoundMode::CAST_NONE, filled_);
      PipeBarrier<PIPE_V>();
      Cast(scores, wide, RoundMode::CAST_NONE, filled_);
    } else if constexpr (std::is_same_v<T, float>) {
      Maxs(scores, batch_, kLowest, filled_);
    } else {
      Cast(scores, batch_, RoundMode::CAST_NONE, filled_);
      PipeBarrier<PIPE_V>();
      Maxs(scores, scores, kLowest, filled_);
    }
  }

  __aicore__ inline LocalTensor<float> Best(bool newest) {
    return newest == newest_is_a_ ? best_a_.template Get<float>() : best_b_.template Get<float>();
  }

  /// Sorts `count` values, a product of 32 and a power of 4, greatest first; returns the records.
  __aicore__ inline LocalTensor<float> Sort(const LocalTensor<float>& values,
                                            const LocalTensor<uint32_t>& index, uint32_t count) {
    const LocalTensor<float> sorted = sort_a_.template Get<float>();
    Sort32(sorted, values, index, count / kSortRepeat);
    PipeBarrier<PIPE_V>();
    return MergeLists(kSortRepeat, count);
  }

  /// Merges the sorted lists of `length` records in sort_a_ to one of `count`; returns it.
  __aicore__ inline LocalTensor<float> MergeLists(uint32_t length, uint32_t count) {
    LocalTensor<float> from = sort_a_.template Get<float>();
    LocalTensor<float> to = sort_b_.template Get<float>();
    for (; length < count; length *= kMergeWays) {
      const uint16_t each = static_cast<uint16_t>(length);
      const uint16_t lengths[kMergeWays] = {each, each, each, each};
      const uint32_t step = length * kRecord;
      MrgSort(to, MrgSortSrcList<float>(from, from[step], from[2 * step], from[3 * step]),
              MrgSort4Info(lengths, false, 15, count / (kMergeWays * length)));
      PipeBarrier<PIPE_V>();
      const LocalTensor<float> swapped = from;
      from = to;
      to = swapped;
    }
    return from;
  }

  /// Writes the best records of a part to the workspace.
  __aicore__ inline void KeepBest(uint32_t row, uint32_t part) {
    constexpr uint32_t kFloats = kKept * kRecord;
    LocalTensor<float> kept = kept_.template AllocTensor<float>();
    CopyBits(kept, Best(true), kFloats);
    kept_.EnQue(kept);
    kept = kept_.template DeQue<float>();
    DataCopy(workspace_gm_[(uint64_t)(row * parts_ + part) * kFloats], kept, kFloats);
    kept_.FreeTensor(kept);
  }

  /// Copies records: as integers, for half of them are no numbers.
  __aicore__ inline void CopyBits(const LocalTensor<float>& to, const LocalTensor<float>& from,
                                  uint32_t count) {
    Adds(to.template ReinterpretCast<int32_t>(), from.template ReinterpretCast<int32_t>(),
         static_cast<int32_t>(0), count);
  }

  /// Merges the parts of a row and writes its results.
  __aicore__ inline void MergeRow(uint32_t row) {
    const uint32_t floats = parts_ * kKept * kRecord;
    LocalTensor<float> list = lists_.template AllocTensor<float>();
    DataCopy(list, workspace_gm_[(uint64_t)row * floats], floats);
    lists_.EnQue(list);
    const uint32_t padded = PaddedCount(parts_, kMergeWays) * kKept * kRecord;
    const LocalTensor<float> records = sort_a_.template Get<float>();
    if (padded != floats) {
      Duplicate(records[floats], kBelowAll, padded - floats);
    }
    list = lists_.template DeQue<float>();
    CopyBits(records, list, floats);
    PipeBarrier<PIPE_V>();
    lists_.FreeTensor(list);
    WriteResults(row, MergeLists(kKept, padded / kRecord));
  }

  __aicore__ inline void WriteResults(uint32_t row, const LocalTensor<float>& records) {
    LocalTensor<float> results = results_.template AllocTensor<float>();
    const LocalTensor<float> values = scratch_.template Get<float>();
    Extract(values, results.template ReinterpretCast<uint32_t>(), records, 1);
    PipeBarrier<PIPE_V>();
    Muls(results[kRow], values, kExact ? 1.0f : scales_gm_.GetValue(row), a_.k);
    LogSoftmax(results[2 * kRow], results[kRow]);
    results_.EnQue(results);
    results = results_.template DeQue<float>();
    const DataCopyExtParams params(1, a_.k * sizeof(float), 0, 0, 0);
    const uint64_t at = (uint64_t)row * a_.k;
    DataCopyPad(indices_gm_[at], results.template ReinterpretCast<int32_t>(), params);
    DataCopyPad(scores_gm_[at], results[kRow], params);
    DataCopyPad(log_probs_gm_[at], results[2 * kRow], params);
    results_.FreeTensor(results);
  }

  /// `scores` are sorted, so the first is the greatest. The scalar unit's wait for it orders them.
  __aicore__ inline void LogSoftmax(const LocalTensor<float>& out,
                                    const LocalTensor<float>& scores) {
    const LocalTensor<float> exponentials = scratch_.template Get<float>()[kRow];
    const LocalTensor<float> sum = scratch_.template Get<float>()[2 * kRow];
    SetFlag<HardEvent::V_S>(EVENT_ID0);
    WaitFlag<HardEvent::V_S>(EVENT_ID0);
    Adds(out, scores, -scores.GetValue(0), a_.k);
    PipeBarrier<PIPE_V>();
    Exp(exponentials, out, a_.k);
    PipeBarrier<PIPE_V>();
    ReduceSum(sum, exponentials, scratch_.template Get<float>(), a_.k);
    PipeBarrier<PIPE_V>();
    Ln(sum, sum, 1);
    SetFlag<HardEvent::V_S>(EVENT_ID0);
    WaitFlag<HardEvent::V_S>(EVENT_ID0);
    Adds(out, out, -sum.GetValue(0), a_.k);
  }

  TPipe pipe_;
  TQue<TPosition::VECIN, 2> tiles_;
  TQue<TPosition::VECIN, 2> groups_;
  TQue<TPosition::VECIN, 1> lists_;
  TQue<TPosition::VECOUT, 1> kept_;
  TQue<TPosition::VECOUT, 1> results_;
  TBuf<TPosition::VECCALC> wide_, maxima_, marks_, scores_, index_, count_;
  TBuf<TPosition::VECCALC> sort_a_, sort_b_, best_a_, best_b_, scratch_;
  GlobalTensor<int8_t> codes_gm_;
  GlobalTensor<T> source_gm_;
  GlobalTensor<float> scales_gm_, scores_gm_, log_probs_gm_, workspace_gm_;
  GlobalTensor<int32_t> indices_gm_;
  LocalTensor<T> batch_;
  Arguments a_;
  uint32_t total_groups_, part_groups_, parts_;
  uint32_t filled_;
  bool newest_is_a_;
};

template <typename T>
__aicore__ inline void Run(const Arguments& arguments) {
  BeamTopk<T> kernel;
  kernel.Init(arguments);
  kernel.Process();
}

}  // namespace beam_topk

#define BEAM_TOPK_ENTRY(name, type)                                                           \
  extern "C" __global__ __aicore__ void beam_topk_##name(                                     \
      GM_ADDR codes, GM_ADDR scales, GM_ADDR logits, GM_ADDR indices, GM_ADDR scores,         \
      GM_ADDR log_probs, GM_ADDR workspace, uint32_t rows, uint32_t vocab, uint32_t k,        \
      uint32_t code_stride, uint32_t logits_stride) {                                         \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);                                        \
    beam_topk::Run<type>({codes, scales, logits, indices, scores, log_probs, workspace, rows, \
                          vocab, k, code_stride, logits_stride});                             \
  }

BEAM_TOPK_ENTRY(quantised, int8_t)
BEAM_TOPK_ENTRY(exact_bf16, bfloat16_t)
BEAM_TOPK_ENTRY(exact_fp16, half)
BEAM_TOPK_ENTRY(exact_fp32, float)
