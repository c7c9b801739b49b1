// Splits one attention call into work items and checks every block id that they will read.
#pragma once

#include <stdint.h>

#include <vector>

#include "ascend_cpu.h"
#include "state.h"

namespace ascend {

// A run of query rows of one sequence and the pages they attend to. Rows are (token, head in the
// GQA group), token major: row = token * group + head.
struct Job {
  int sequence;
  int first_row, rows;
  int first_page, last_page;
  int split, splits;  // part of the pages this job covers
  int64_t partial;    // floats: split results of kv head 0, when splits > 1
  int32_t counter;    // finished splits of kv head 0, when splits > 1
};

struct Item {
  int32_t job;
  int32_t kv_head;
};

// Positions [lo, hi) that a query at `position` of a sequence of `length` tokens sees.
struct Range {
  int lo, hi;
};
inline Range visible(const ascend_attention_args &a, int length, int position) {
  Range range{0, length};
  if (a.window > 0) {
    range.lo = position - a.window + 1 > 0 ? position - a.window + 1 : 0;
    const int64_t right = (int64_t)position + a.window;
    if (right < range.hi) range.hi = (int)right;
  }
  if (a.causal && position + 1 < range.hi) range.hi = position + 1;
  if (range.hi < range.lo) range.hi = range.lo;
  return range;
}

class Plan {
 public:
  // Returns an ascend_status. Jobs of up to `narrow_rows` rows go to the narrow kernels. Buffers
  // only grow, so a steady state allocates nothing.
  int build(const ascend_attention_args &args, int narrow_rows);

  const std::vector<Job> &jobs() const { return jobs_; }
  const std::vector<Item> &items() const { return items_; }
  bool serial() const { return serial_; }
  float *partial(const Job &job, int kv_head, int split);
  int64_t partial_floats(const Job &job) const { return (int64_t)job.rows * (head_dim_ + 2); }
  // True for the last of the splits to finish.
  bool finish_split(const Job &job, int kv_head);

 private:
  void add_sequence(const ascend_attention_args &args, int sequence);
  void split_jobs(const ascend_attention_args &args);
  void add_items(int kv_heads);
  int64_t page_cost(const Job &job) const;

  std::vector<Job> jobs_, unsplit_;
  std::vector<Item> items_;
  std::vector<float> partials_;
  std::vector<int32_t> counters_;
  int head_dim_ = 0, narrow_rows_ = 0;
  bool serial_ = true;
};

}  // namespace ascend
