// Who writes what in kv_cache_write: the split of tokens and kv heads over cores, and the slots.
#pragma once

#include "kv_cache_rows.h"

namespace kv_cache {

// Arguments of an entry point; shapes are in kv_cache_write.cpp.
struct WriteArguments {
  // GM_ADDR is a macro with an asterisk: one declaration each.
  GM_ADDR key;
  GM_ADDR value;
  GM_ADDR slots;
  GM_ADDR pages;
  GM_ADDR extras;
  GM_ADDR channelScales;
  GM_ADDR counters;
  uint32_t tokens, kvHeads, headDim, blockSize, numBlocks, keyStride, valueStride;
  float keyThreshold, valueThreshold;
  uint32_t patchCode;

  __aicore__ inline uint32_t PatchSlots() const { return blockSize / 8; }
};

// Where a token goes.
struct Place {
  uint32_t block;
  uint32_t offset;  // of the token inside the block
};

// What one core does at a time: some tokens of some neighbouring heads, of K or of V.
struct Part {
  uint32_t plane;  // 0: K, 1: V
  uint32_t firstHead, heads;
  uint32_t lane;
};

// Heads are cut into groups, one tile of rows each, and tokens are dealt to lanes. There are
// 2 (K, V) * groups * lanes parts; core c does parts c, c + cores, c + 2 * cores ...
//
// A group is as many heads as a tile holds, because a token's rows travel in one copy; but with few
// tokens groups are made smaller until there is a part for every core.
struct Split {
  uint32_t kvHeads, groupHeads, groups, lanes;

  __aicore__ inline void Init(uint32_t tokens, uint32_t heads, uint32_t headDim, uint32_t cores) {
    const uint32_t fitting = Smaller(kMaxRows, kMaxElements / headDim);
    const uint32_t wanted = (cores + 2 * tokens - 1) / (2 * tokens);
    const uint32_t needed = (heads + fitting - 1) / fitting;
    groups = Smaller(heads, wanted > needed ? wanted : needed);
    groupHeads = (heads + groups - 1) / groups;
    groups = (heads + groupHeads - 1) / groupHeads;
    lanes = Smaller(tokens, cores / (2 * groups));
    lanes = lanes ? lanes : 1;
    kvHeads = heads;
  }
  __aicore__ inline uint32_t Parts() const { return 2 * groups * lanes; }
  __aicore__ inline Part At(uint32_t index) const {
    const uint32_t stripe = index % (2 * groups), first = stripe / 2 * groupHeads;
    return {stripe % 2, first, Smaller(groupHeads, kvHeads - first), index / (2 * groups)};
  }
};

// Reads slot_mapping through UB: chunks of 512 slots, 4096 bytes.
class Slots {
 public:
  __aicore__ inline void Init(TPipe& pipe, const WriteArguments& args) {
    // As pairs of 32 bits, which every copy can move.
    source_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(args.slots), 2ull * args.tokens);
    tokens_ = args.tokens;
    blockSize_ = args.blockSize;
    limit_ = static_cast<uint64_t>(args.numBlocks) * args.blockSize;
    pipe.InitBuffer(buffer_, kChunk * sizeof(int64_t));
  }

  // Returns whether the token is written, and where. Negative slots lie beyond every limit.
  __aicore__ inline bool Find(uint32_t token, Place& place) {
    if (token < first_ || token >= end_) {
      Load(token);
    }
    const uint64_t slot = buffer_.Get<int64_t>().GetValue(token - first_);
    if (slot >= limit_) {
      return false;
    }
    place.block = slot / blockSize_;
    place.offset = slot - static_cast<uint64_t>(place.block) * blockSize_;
    return true;
  }

 private:
  // The previous chunk needs no flag before it is overwritten: its last slot was compared.
  __aicore__ inline void Load(uint32_t token) {
    first_ = token;
    end_ = token + Smaller(kChunk, tokens_ - token);
    const uint32_t bytes = (end_ - first_) * sizeof(int64_t);
    DataCopyPad(buffer_.Get<int32_t>(), source_[2ull * token], DataCopyExtParams(1, bytes, 0, 0, 0),
                DataCopyPadExtParams<int32_t>());
    SetFlag<HardEvent::MTE2_S>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_S>(EVENT_ID0);
  }

  static constexpr uint32_t kChunk = 512;
  GlobalTensor<int32_t> source_;
  TBuf<TPosition::VECCALC> buffer_;
  uint32_t tokens_ = 0, blockSize_ = 1, first_ = 0, end_ = 0;
  uint64_t limit_ = 0;
};

// Runs a codec (kv_cache_write_codecs.h) over everything that this core has to write.
//
// Tokens are dealt to lanes in stretches. Codec::kSharesSlots (patches): tokens that compete for a
// patch slot must be written in order by one core, so they are dealt by slot, and every core looks
// through all of slot_mapping.
template <class Codec>
class Writer {
 public:
  __aicore__ inline void Run(const WriteArguments& args) {
    TPipe pipe;
    args_ = args;
    split_.Init(args.tokens, args.kvHeads, args.headDim, GetBlockNum());
    if (GetBlockIdx() >= split_.Parts()) {
      return;
    }
    slots_.Init(pipe, args);
    codec_.Init(pipe, args, split_.groupHeads);
    for (uint32_t i = GetBlockIdx(); i < split_.Parts(); i += GetBlockNum()) {
      RunPart(split_.At(i));
    }
    codec_.Finish();
  }

 private:
  // Each token's rows are asked for before those of the token before it are worked on.
  __aicore__ inline void RunPart(const Part& part) {
    uint32_t token = 0, end = args_.tokens;
    if (!Codec::kSharesSlots) {
      token = static_cast<uint64_t>(end) * part.lane / split_.lanes;
      end = static_cast<uint64_t>(end) * (part.lane + 1) / split_.lanes;
    }
    codec_.Open(part);
    Place place, before;
    bool waiting = false;
    for (; token < end; ++token) {
      if (!slots_.Find(token, place) || !Owns(part, place)) {
        continue;
      }
      codec_.CopyIn(token);
      if (waiting) {
        codec_.Write(before);
      }
      before = place;
      waiting = true;
    }
    if (waiting) {
      codec_.Write(before);
    }
    codec_.Close();
  }

  __aicore__ inline bool Owns(const Part& part, const Place& place) const {
    if (!Codec::kSharesSlots) {
      return true;
    }
    const uint32_t slots = args_.PatchSlots();
    return (place.block * slots + place.offset % slots) % split_.lanes == part.lane;
  }

  WriteArguments args_;
  Split split_;
  Slots slots_;
  Codec codec_;
};

}  // namespace kv_cache
