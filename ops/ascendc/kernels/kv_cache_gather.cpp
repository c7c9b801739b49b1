// kv_cache_gather: pages of sequences into contiguous K and V, dequantised, patched, keys rotated
// back.
//
// Inputs
//   pages           int8 planes (K of block 0, V of block 0, K of block 1 ...), each [kv_heads,
//                   head_dim / 32, block_size, 32]
//   extras          what lies behind the planes, in their order. c8d: scales, float32 [kv_heads,
//                   block_size] per plane; c8p: pools of patches [kv_heads] per plane
//                   (kv_cache_pool.h); c8s: null
//   channel_scales  float32 [2 (K, V), kv_heads, head_dim]; c8s and c8p
//   block_table     int32 [sequences, table_stride]: block j of sequence s at s * table_stride + j;
//                   rows of a block outside the pages are left as they are
//   seq_lens        int32 [sequences]: tokens to gather
//   starts          int32 [sequences]: row of key and value at which a sequence begins
//   patch_code      c8p: 0: int4, 1: e3m0
// Outputs
//   key, value      bf16 or fp16 [rows, kv_heads, head_dim], contiguous
// Limits: head_dim a multiple of 32 up to 256; block_size a multiple of 16 up to 256. The
// arithmetic is that of dequantise_pages in ops/quantise.py, in float32, rounded once at the end:
// to the bit.
//
// Tiling: a unit is one block of one sequence, one head, K or V. Units are numbered through all
// sequences and core c takes c, c + cores, c + 2 * cores ... Its tiles are stretches of tokens, as
// many as 4096 elements hold, at most 64. Codes keep their NZ order until they become half; the
// cast puts the columns of a row side by side.
//
// UB budget in bytes, for a tile of 4096 elements
//                                        c8d      c8s      c8p
//   codes in, two                       8192     8192     8192
//   scales of tokens in, two             512        -        -
//   channel scales, pool in, two           -     2048    10624
//   half                                8192     8192     8192
//   row (float32)                      16384    16384    16384
//   scratch (float32)                  16384        -    16384
//   out, two                           16384    16384    16384
//   spread scales                       2048        -        -
//   patch, tables                          -        -     3648
//   sum, at most                       68096    51200    79808    of 196608
//
// Synchronisation
//   codes, scales, head    queues MTE2 -> V -> MTE2: the next tile comes in during this one
//   out                    queue V -> MTE3 -> V
//   MTE2_S 0 and 1         tags and patch scales of the unit, even or odd, may be read by the
//   scalar
//                          unit
//   S_V 0                  the tables of patches are written
//   PIPE_V                 between dependent vector instructions
#include "kernel_operator.h"
#include "kv_cache_pool.h"
#include "kv_cache_rows.h"

namespace kv_cache {

struct GatherArguments {
  // GM_ADDR is a macro with an asterisk: one declaration each.
  GM_ADDR pages;
  GM_ADDR extras;
  GM_ADDR channelScales;
  GM_ADDR blockTable;
  GM_ADDR seqLens;
  GM_ADDR starts;
  GM_ADDR key;
  GM_ADDR value;
  uint32_t sequences, kvHeads, headDim, blockSize, numBlocks, tableStride, patchCode;
};

enum class Kind { kDynamic, kStatic, kPatched };

// Some tokens of one block, of one head of K or V.
struct GatherTile {
  uint64_t run;    // which (plane, kv head) of the pages
  uint64_t row;    // of key or value, of the first token
  uint32_t plane;  // 0: K, 1: V
  uint32_t head;
  uint32_t parity;  // of the unit, among those of this core
  uint32_t first;   // token of the block
  uint32_t tokens;
  bool last;  // of its unit
};

template <typename T, Kind kKind>
class Gatherer {
 public:
  __aicore__ inline void Run(const GatherArguments& args) {
    TPipe pipe;
    args_ = args;
    Bind();
    InitBuffers(pipe);
    const GlobalTensor<int32_t> lengths = Metadata(args.seqLens), starts = Metadata(args.starts);
    uint32_t next = GetBlockIdx();  // unit, counted from the sequence's first
    for (uint32_t sequence = 0; sequence < args.sequences; ++sequence) {
      const int32_t length = lengths.GetValue(sequence);
      const uint32_t tokens = length > 0 ? length : 0;
      const uint32_t blocks = (tokens + args.blockSize - 1) / args.blockSize;
      const uint32_t units = blocks * 2 * args.kvHeads;
      for (; next < units; next += GetBlockNum()) {
        GatherUnit(sequence, next, tokens, starts.GetValue(sequence));
      }
      next -= units;
    }
    if (waiting_) {
      Finish(before_);
    }
  }

 private:
  static constexpr bool kDynamic = kKind == Kind::kDynamic;
  static constexpr bool kPatched = kKind == Kind::kPatched;
  static constexpr uint32_t kTableBytes = 16 * sizeof(float);

  __aicore__ inline GlobalTensor<int32_t> Metadata(GM_ADDR address) const {
    GlobalTensor<int32_t> numbers;
    numbers.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(address));
    return numbers;
  }

  __aicore__ inline void Bind() {
    pages_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(args_.pages));
    floats_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(args_.extras));
    bytes_.SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(args_.extras));
    channels_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(args_.channelScales));
    out_[0].SetGlobalBuffer(reinterpret_cast<__gm__ T*>(args_.key));
    out_[1].SetGlobalBuffer(reinterpret_cast<__gm__ T*>(args_.value));
    table_ = Metadata(args_.blockTable);
    pool_.Init(args_.blockSize, args_.headDim);
    tileTokens_ = Smaller(Smaller(kMaxRows, kMaxElements / args_.headDim), args_.blockSize);
  }

  // A unit's buffer (not c8d): channel scales; c8p: then tags and scales of the pool, then its
  // codes, each slot's on a block of its own.
  __aicore__ inline void InitBuffers(TPipe& pipe) {
    const uint32_t size = tileTokens_ * args_.headDim, dim = args_.headDim;
    tagsAt_ = dim * sizeof(float);
    codesAt_ = tagsAt_ + RoundUp(pool_.slots * (sizeof(int16_t) + sizeof(float)), kRowBytes);
    codePitch_ = RoundUp(pool_.codeBytes, kRowBytes);
    pipe.InitBuffer(codes_, 2, size);
    pipe.InitBuffer(results_, 2, size * sizeof(T));
    pipe.InitBuffer(halves_, size * sizeof(half));
    pipe.InitBuffer(row_, size * sizeof(float));
    if constexpr (kDynamic || kPatched) {
      pipe.InitBuffer(scratch_, size * sizeof(float));
    }
    if constexpr (kDynamic) {
      pipe.InitBuffer(scales_, 2, RoundUp(tileTokens_ * sizeof(float), kRowBytes));
      pipe.InitBuffer(spread_, RoundUp(tileTokens_, kBlock) * kRowBytes);
    } else {
      pipe.InitBuffer(units_, 2, kPatched ? codesAt_ + pool_.slots * codePitch_ : tagsAt_);
    }
    if constexpr (kPatched) {
      pipe.InitBuffer(patch_, 2 * dim * sizeof(float));
      pipe.InitBuffer(tables_, kTableBytes + dim * sizeof(uint32_t));
      pipe.InitBuffer(fifteens_, dim * sizeof(int16_t));
      Duplicate(fifteens_.Get<int16_t>(), static_cast<int16_t>(15), dim);
      FillTables();
    }
  }

  // Values of the 16 nibbles; and where column d lies if even columns come before odd ones.
  __aicore__ inline void FillTables() {
    const LocalTensor<float> values = tables_.Get<float>();
    const LocalTensor<uint32_t> order = tables_.Get<uint32_t>()[kTableBytes / 4];
    for (int32_t nibble = 0; nibble < 16; ++nibble) {
      const int32_t low = nibble & 7, power = low ? 1 << (low - 1) : 0;
      const int32_t magnitude = args_.patchCode ? power : low;
      const int32_t negative = args_.patchCode ? -power : low - 8;
      values.SetValue(nibble, static_cast<float>(nibble < 8 ? magnitude : negative));
    }
    for (uint32_t column = 0; column < args_.headDim; ++column) {
      const uint32_t index = column / 2 + column % 2 * (args_.headDim / 2);
      order.SetValue(column, static_cast<uint32_t>(index * sizeof(float)));
    }
    SetFlag<HardEvent::S_V>(EVENT_ID0);
    WaitFlag<HardEvent::S_V>(EVENT_ID0);
  }

  // Asks for each tile before it works on the one before.
  __aicore__ inline void GatherUnit(uint32_t sequence, uint32_t unit, uint32_t tokens,
                                    int32_t start) {
    const uint32_t runs = 2 * args_.kvHeads, j = unit / runs;
    const uint32_t plane = unit % runs / args_.kvHeads, head = unit % args_.kvHeads;
    const uint64_t entry = static_cast<uint64_t>(sequence) * args_.tableStride + j;
    const int32_t block = table_.GetValue(entry);
    if (static_cast<uint32_t>(block) >= args_.numBlocks) {
      return;
    }
    const uint32_t skipped = j * args_.blockSize;
    const uint32_t count = Smaller(args_.blockSize, tokens - skipped);
    const uint64_t run = (2ull * block + plane) * args_.kvHeads + head;
    const uint64_t row = static_cast<uint64_t>(start) + skipped;
    for (uint32_t first = 0; first < count; first += tileTokens_) {
      const uint32_t some = Smaller(tileTokens_, count - first);
      const bool last = first + some == count;
      const GatherTile tile = {run, row + first, plane, head, parity_, first, some, last};
      CopyIn(tile);
      if (waiting_) {
        Finish(before_);
      }
      before_ = tile;
      waiting_ = true;
    }
    parity_ ^= 1;
  }

  __aicore__ inline void CopyIn(const GatherTile& tile) {
    const uint32_t size = args_.blockSize;
    LocalTensor<int8_t> codes = codes_.AllocTensor<int8_t>();
    const uint16_t columns = args_.headDim / kRowBytes, gap = size - tile.tokens;
    DataCopy(codes, pages_[tile.run * args_.headDim * size + tile.first * kRowBytes],
             DataCopyParams(columns, tile.tokens, gap, 0));
    codes_.EnQue(codes);
    if constexpr (kDynamic) {
      LocalTensor<float> scales = scales_.AllocTensor<float>();
      const uint32_t bytes = tile.tokens * sizeof(float);
      DataCopyPad(scales, floats_[tile.run * size + tile.first],
                  DataCopyExtParams(1, bytes, 0, 0, 0), DataCopyPadExtParams<float>());
      scales_.EnQue(scales);
    } else if (tile.first == 0) {
      CopyUnitIn(tile);
    }
  }

  __aicore__ inline void CopyUnitIn(const GatherTile& tile) {
    LocalTensor<uint8_t> unit = units_.AllocTensor<uint8_t>();
    const uint32_t channel = (tile.plane * args_.kvHeads + tile.head) * args_.headDim;
    DataCopy(unit.ReinterpretCast<float>(), channels_[channel], args_.headDim);
    if constexpr (kPatched) {
      const uint32_t heads = pool_.slots * (sizeof(int16_t) + sizeof(float));
      const uint16_t slots = pool_.slots;
      DataCopyPad(unit[tagsAt_], bytes_[pool_.Tag(tile.run, 0)],
                  DataCopyExtParams(1, heads, 0, 0, 0), DataCopyPadExtParams<uint8_t>());
      DataCopyPad(unit[codesAt_], bytes_[pool_.Codes(tile.run, 0)],
                  DataCopyExtParams(slots, pool_.codeBytes, 0, 0, 0),
                  DataCopyPadExtParams<uint8_t>());
      SetFlag<HardEvent::MTE2_S>(tile.parity);
    }
    units_.EnQue(unit);
  }

  __aicore__ inline void Finish(const GatherTile& tile) {
    shape_ = {tile.tokens, args_.headDim};
    Widen();
    if constexpr (kDynamic) {
      ScaleTokens();
      if (tile.plane == 0) {
        RotateBack();
      }
    } else {
      ScaleChannels(tile);
    }
    LocalTensor<T> result = results_.AllocTensor<T>();
    Cast(result, row_.Get<float>(), RoundMode::CAST_RINT, shape_.Size());
    results_.EnQue(result);
    CopyOut(tile);
  }

  // Codes in NZ order to float32 [tokens, head_dim].
  __aicore__ inline void Widen() {
    LocalTensor<int8_t> codes = codes_.DeQue<int8_t>();
    const LocalTensor<half> halves = halves_.Get<half>();
    const uint8_t pitch = shape_.dim / (kRowBytes / sizeof(half));
    for (uint32_t column = 0; column < shape_.dim; column += kRowBytes) {
      Cast(halves[column], codes[column * shape_.rows], RoundMode::CAST_NONE, kRowBytes,
           static_cast<uint8_t>(shape_.rows), UnaryRepeatParams(1, 1, pitch, 1));
    }
    codes_.FreeTensor(codes);
    PipeBarrier<PIPE_V>();
    Cast(row_.Get<float>(), halves, RoundMode::CAST_NONE, shape_.Size());
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void ScaleTokens() {
    const LocalTensor<float> row = row_.Get<float>();
    const LocalTensor<float> spread = spread_.Get<float>();
    LocalTensor<float> scales = scales_.DeQue<float>();
    SpreadOverBlocks(spread, scales, shape_.rows);
    scales_.FreeTensor(scales);
    MultiplyRows(row, row, spread, shape_);
  }

  // Applied twice, a rotation multiplies by the number of channels that it mixes.
  __aicore__ inline void RotateBack() {
    const LocalTensor<float> row = row_.Get<float>();
    Rotate(row, scratch_.Get<float>(), shape_);
    Muls(row, row, 1.0f / static_cast<float>(RotatedChannels(shape_.dim)), shape_.Size());
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void ScaleChannels(const GatherTile& tile) {
    const LocalTensor<float> row = row_.Get<float>();
    if (tile.first == 0) {
      unit_ = units_.DeQue<uint8_t>();
      if constexpr (kPatched) {
        WaitFlag<HardEvent::MTE2_S>(tile.parity);
      }
    }
    if constexpr (kPatched) {
      AddPatches(tile);
    }
    const uint8_t pitch = shape_.dim / kBlock;
    const BinaryRepeatParams rows(1, 1, 1, pitch, pitch, 0);
    const LocalTensor<float> channels = unit_.ReinterpretCast<float>();
    for (uint32_t first = 0; first < shape_.dim; first += kRepeat) {
      Mul(row[first], row[first], channels[first], Smaller(shape_.dim - first, kRepeat),
          shape_.rows, rows);
    }
    PipeBarrier<PIPE_V>();
    if (tile.last) {
      units_.FreeTensor(unit_);
    }
  }

  // A patch is used if its tag names a token of its slot, and one of this tile.
  __aicore__ inline void AddPatches(const GatherTile& tile) {
    const LocalTensor<int16_t> tags = unit_[tagsAt_].ReinterpretCast<int16_t>();
    const LocalTensor<float> scales = tags[pool_.slots].ReinterpretCast<float>();
    for (uint32_t slot = 0; slot < pool_.slots; ++slot) {
      const int32_t token = tags.GetValue(slot) - 1, first = tile.first;
      if (token >= first && token < first + static_cast<int32_t>(tile.tokens) &&
          token % pool_.slots == slot) {
        AddPatch(slot, token - first, scales.GetValue(slot));
      }
    }
  }

  // Adds code * scale to a row of codes. Bytes hold an even column in their low half, the next in
  // the high one: values are looked up for all even columns, then all odd ones, then put in order.
  __aicore__ inline void AddPatch(uint32_t slot, uint32_t row, float scale) {
    const uint32_t dim = shape_.dim;
    const LocalTensor<uint32_t> tables = tables_.Get<uint32_t>();
    const LocalTensor<float> values = patch_.Get<float>(), ordered = values[dim];
    const LocalTensor<int32_t> offsets = ordered.ReinterpretCast<int32_t>();
    const LocalTensor<float> target = row_.Get<float>()[row * dim];
    Cast(values, Nibbles(unit_[codesAt_ + slot * codePitch_]), RoundMode::CAST_NONE, dim);
    PipeBarrier<PIPE_V>();
    Muls(values, values, 4.0f, dim);
    PipeBarrier<PIPE_V>();
    Cast(offsets, values, RoundMode::CAST_RINT, dim);
    PipeBarrier<PIPE_V>();
    Gather(values, tables.ReinterpretCast<float>(), offsets.ReinterpretCast<uint32_t>(), 0, dim);
    PipeBarrier<PIPE_V>();
    Gather(ordered, values, tables[kTableBytes / 4], 0, dim);
    PipeBarrier<PIPE_V>();
    Muls(ordered, ordered, scale, dim);
    PipeBarrier<PIPE_V>();
    Add(target, target, ordered, dim);
    PipeBarrier<PIPE_V>();
  }

  // int16 [head_dim]: low halves of the bytes, then high halves.
  __aicore__ inline LocalTensor<int16_t> Nibbles(const LocalTensor<uint8_t>& packed) {
    const uint32_t bytes = shape_.dim / 2;
    const LocalTensor<int16_t> low = scratch_.Get<int16_t>(), high = low[bytes];
    const LocalTensor<half> halves = halves_.Get<half>();
    Cast(halves, packed, RoundMode::CAST_NONE, bytes);
    PipeBarrier<PIPE_V>();
    Cast(high, halves, RoundMode::CAST_RINT, bytes);
    PipeBarrier<PIPE_V>();
    And(low, high, fifteens_.Get<int16_t>(), bytes);
    PipeBarrier<PIPE_V>();
    ShiftRight(high, high, static_cast<int16_t>(4), bytes);
    PipeBarrier<PIPE_V>();
    return low;
  }

  __aicore__ inline void CopyOut(const GatherTile& tile) {
    LocalTensor<T> result = results_.DeQue<T>();
    const uint16_t tokens = tile.tokens;
    const uint32_t bytes = args_.headDim * sizeof(T), gap = (args_.kvHeads - 1) * bytes;
    DataCopyPad(out_[tile.plane][(tile.row * args_.kvHeads + tile.head) * args_.headDim], result,
                DataCopyExtParams(tokens, bytes, 0, gap, 0));
    results_.FreeTensor(result);
  }

  GatherArguments args_;
  GlobalTensor<int8_t> pages_;
  GlobalTensor<float> floats_, channels_;
  GlobalTensor<uint8_t> bytes_;
  GlobalTensor<int32_t> table_;
  GlobalTensor<T> out_[2];
  TQue<TPosition::VECIN, 2> codes_, scales_, units_;
  TQue<TPosition::VECOUT, 2> results_;
  TBuf<TPosition::VECCALC> halves_, row_, scratch_, spread_, patch_, tables_, fifteens_;
  LocalTensor<uint8_t> unit_;
  PoolGeometry pool_;
  Tile shape_;
  GatherTile before_;
  uint32_t tileTokens_ = 0, tagsAt_ = 0, codesAt_ = 0, codePitch_ = 0, parity_ = 0;
  bool waiting_ = false;
};

}  // namespace kv_cache

#define KV_CACHE_GATHER(name, T, kind)                                                      \
  extern "C" __global__ __aicore__ void kv_cache_gather_##name(                             \
      GM_ADDR pages, GM_ADDR extras, GM_ADDR channel_scales, GM_ADDR block_table,           \
      GM_ADDR seq_lens, GM_ADDR starts, GM_ADDR key, GM_ADDR value, uint32_t sequences,     \
      uint32_t kv_heads, uint32_t head_dim, uint32_t block_size, uint32_t num_blocks,       \
      uint32_t table_stride, uint32_t patch_code) {                                         \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                         \
    kv_cache::Gatherer<T, kv_cache::Kind::kind> gatherer;                                   \
    gatherer.Run({pages, extras, channel_scales, block_table, seq_lens, starts, key, value, \
                  sequences, kv_heads, head_dim, block_size, num_blocks, table_stride,      \
                  patch_code});                                                             \
  }

KV_CACHE_GATHER(c8d_bf16, bfloat16_t, kDynamic)
KV_CACHE_GATHER(c8d_fp16, half, kDynamic)
KV_CACHE_GATHER(c8s_bf16, bfloat16_t, kStatic)
KV_CACHE_GATHER(c8s_fp16, half, kStatic)
KV_CACHE_GATHER(c8p_bf16, bfloat16_t, kPatched)
KV_CACHE_GATHER(c8p_fp16, half, kPatched)
