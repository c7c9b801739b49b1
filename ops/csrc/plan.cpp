#include "plan.h"

#include <algorithm>

namespace ascend {
namespace {

// Items per thread to aim at when splitting long contexts: enough to even out a slow core.
constexpr int64_t kItemsPerThread = 4;
constexpr int kMinSplitTokens = 512;
// Below this many bytes of K and V, waking other threads costs more than it saves.
constexpr int64_t kSerialBytes = 128 << 10;

bool blocks_valid(const ascend_attention_args &a, int sequence, int first_page, int last_page) {
  const int32_t *blocks = a.block_table + sequence * a.block_table_stride;
  const uint64_t limit = (uint64_t)a.pages.num_blocks;
  bool valid = true;
  for (int p = first_page; p < last_page; ++p) valid &= (uint64_t)(int64_t)blocks[p] < limit;
  return valid;
}

void set_pages(const ascend_attention_args &a, int length, Job &job) {
  const int group = a.num_heads / a.pages.num_kv_heads, block = a.pages.block_size;
  const int n = a.query_start_loc[job.sequence + 1] - a.query_start_loc[job.sequence];
  const Range first = visible(a, length, length - n + job.first_row / group);
  const Range last = visible(a, length, length - n + (job.first_row + job.rows - 1) / group);
  job.first_page = first.lo / block;
  job.last_page = last.hi > first.lo ? (last.hi + block - 1) / block : job.first_page;
}

}  // namespace

// Relative time of one page. Narrow items wait for memory, wide ones for arithmetic.
int64_t Plan::page_cost(const Job &job) const {
  return job.rows <= narrow_rows_ ? 1 + (job.rows + 7) / 8 : 3 * ((job.rows + 15) / 16);
}

void Plan::add_sequence(const ascend_attention_args &a, int sequence) {
  const int n = a.query_start_loc[sequence + 1] - a.query_start_loc[sequence];
  if (n <= 0) return;
  const int rows = n * (a.num_heads / a.pages.num_kv_heads);
  int step = rows;
  if (rows > narrow_rows_) {
    const int tiles = (rows + kMaxRows - 1) / kMaxRows;
    step = ((rows + tiles - 1) / tiles + kLanes - 1) / kLanes * kLanes;
  }
  const int length = std::max(0, a.seq_lens[sequence]);
  for (int row = 0; row < rows; row += step) {
    Job job{};
    job.sequence = sequence;
    job.first_row = row;
    job.rows = std::min(step, rows - row);
    job.splits = 1;
    set_pages(a, length, job);
    unsplit_.push_back(job);
  }
}

// Splits the pages of jobs that are long against an even share of the whole call.
void Plan::split_jobs(const ascend_attention_args &a) {
  int64_t total = 0;
  for (const Job &job : unsplit_) total += (job.last_page - job.first_page) * page_cost(job);
  const int64_t threads = std::max(1, a.num_threads);
  const int64_t share = threads * kItemsPerThread;
  total *= a.pages.num_kv_heads;
  const int min_pages = std::max(1, kMinSplitTokens / a.pages.block_size);
  int64_t floats = 0;
  int32_t counters = 0;
  for (const Job &job : unsplit_) {
    const int64_t pages = job.last_page - job.first_page;
    int64_t splits = 1;
    if (threads > 1 && total > 0) {
      splits = (pages * page_cost(job) * share + total / 2) / total;
      splits = std::max<int64_t>(1, std::min(splits, pages / min_pages));
    }
    for (int64_t s = 0; s < splits; ++s) {
      Job part = job;
      part.split = (int)s;
      part.splits = (int)splits;
      part.first_page = job.first_page + (int)(pages * s / splits);
      part.last_page = job.first_page + (int)(pages * (s + 1) / splits);
      part.partial = floats;
      part.counter = counters;
      jobs_.push_back(part);
    }
    if (splits > 1) {
      floats += splits * a.pages.num_kv_heads * partial_floats(job);
      counters += a.pages.num_kv_heads;
    }
  }
  if ((int64_t)partials_.size() < floats) partials_.resize(floats);
  counters_.assign(counters, 0);
}

// Jobs of one sequence that share a kv head run one after another where they share pages in cache
// (prefill); single jobs go head by head, as the heads of a block lie side by side.
void Plan::add_items(int kv_heads) {
  for (size_t from = 0; from < jobs_.size();) {
    size_t to = from + 1;
    if (jobs_[from].rows > narrow_rows_) {
      while (to < jobs_.size() && jobs_[to].sequence == jobs_[from].sequence) ++to;
    }
    for (int head = 0; head < kv_heads; ++head) {
      for (size_t j = from; j < to; ++j) items_.push_back({(int32_t)j, head});
    }
    from = to;
  }
}

int Plan::build(const ascend_attention_args &a, int narrow_rows) {
  jobs_.clear();
  unsplit_.clear();
  items_.clear();
  head_dim_ = a.pages.head_dim;
  narrow_rows_ = narrow_rows;
  int64_t work = 0;
  for (int s = 0; s < a.num_seqs; ++s) {
    const size_t before = unsplit_.size();
    add_sequence(a, s);
    if (unsplit_.size() == before) continue;
    int first = unsplit_[before].first_page, last = unsplit_.back().last_page;
    if (!blocks_valid(a, s, first, last)) return ASCEND_BAD_BLOCK_ID;
    for (size_t j = before; j < unsplit_.size(); ++j) {
      const int64_t pages = unsplit_[j].last_page - unsplit_[j].first_page;
      work += pages * std::max(1, unsplit_[j].rows / 4);
    }
  }
  split_jobs(a);
  add_items(a.pages.num_kv_heads);
  const int element_bytes = a.pages.dtype == ASCEND_INT8      ? 1
                            : a.pages.dtype == ASCEND_FLOAT32 ? 4
                                                              : 2;
  const int64_t run_bytes = (int64_t)a.pages.block_size * a.pages.head_dim * 2 * element_bytes;
  serial_ = a.num_threads <= 1 || work * a.pages.num_kv_heads * run_bytes <= kSerialBytes;
  return ASCEND_OK;
}

float *Plan::partial(const Job &job, int kv_head, int split) {
  return partials_.data() + job.partial +
         ((int64_t)kv_head * job.splits + split) * partial_floats(job);
}

bool Plan::finish_split(const Job &job, int kv_head) {
  int32_t *counter = counters_.data() + job.counter + kv_head;
  return __atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) == job.splits;
}

}  // namespace ascend
