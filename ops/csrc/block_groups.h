// Which tokens of a write lie in the same block: they may have to be written in order, by one
// thread.
#pragma once

#include <stdint.h>

#include <vector>

namespace ascend {

// Consecutive tokens of a call.
struct Tokens {
  int64_t begin, end;
};

// The tokens of a call, block by block, each block's in order; blocks in the order in which they
// first appear. Buffers only grow, so a steady state allocates nothing.
class BlockGroups {
 public:
  // Parts get whole blocks, and at least `part_tokens` tokens where the next block begins.
  void build(const int64_t *slots, int64_t count, int64_t block_size, int64_t part_tokens) {
    runs_.clear();
    firsts_.clear();
    find_runs(slots, count, block_size);
    link_runs();
    parts_.assign(1, 0);
    int64_t tokens = 0;
    for (size_t g = 0; g < firsts_.size(); ++g) {
      for (int32_t r = firsts_[g]; r >= 0; r = runs_[r].next) {
        tokens += runs_[r].tokens.end - runs_[r].tokens.begin;
      }
      if (tokens < part_tokens && g + 1 < firsts_.size()) continue;
      parts_.push_back((int32_t)g + 1);
      tokens = 0;
    }
  }

  int64_t parts() const { return (int64_t)parts_.size() - 1; }

  // Calls `use` with the tokens of a part, in order within each block.
  template <class Use>
  void visit(int64_t part, const Use &use) const {
    for (int32_t g = parts_[part]; g < parts_[part + 1]; ++g) {
      for (int32_t r = firsts_[g]; r >= 0; r = runs_[r].next) use(runs_[r].tokens);
    }
  }

 private:
  // Consecutive tokens in one block, and the next such run of the block or -1.
  struct Run {
    int64_t block;
    Tokens tokens;
    int32_t next;
  };

  void find_runs(const int64_t *slots, int64_t count, int64_t block_size) {
    int64_t first_slot = 0;  // of the last run's block
    for (int64_t t = 0; t < count; ++t) {
      if (slots[t] < 0) continue;
      const bool same = !runs_.empty() && (uint64_t)(slots[t] - first_slot) < (uint64_t)block_size;
      if (same) {
        runs_.back().tokens.end = t + 1;  // what was skipped between is skipped again
      } else {
        const int64_t block = slots[t] / block_size;
        first_slot = block * block_size;
        runs_.push_back({block, {t, t + 1}, -1});
      }
    }
  }

  // By a hash table of the last run of each block.
  void link_runs() {
    size_t size = 16;
    int shift = 60;
    for (; size < 2 * runs_.size(); size *= 2) --shift;
    table_.assign(size, -1);
    for (int32_t r = 0; r < (int32_t)runs_.size(); ++r) {
      size_t at = (uint64_t)runs_[r].block * 0x9e3779b97f4a7c15u >> shift;
      while (table_[at] >= 0 && runs_[table_[at]].block != runs_[r].block) at = (at + 1) % size;
      if (table_[at] < 0) {
        firsts_.push_back(r);
      } else {
        runs_[table_[at]].next = r;
      }
      table_[at] = r;
    }
  }

  std::vector<Run> runs_;
  std::vector<int32_t> firsts_;  // the first run of each block
  std::vector<int32_t> parts_;   // part p has the blocks from parts_[p] up to parts_[p + 1]
  std::vector<int32_t> table_;
};

}  // namespace ascend
