// Runs one work item with one kernel: prepare rows, walk the pages, write or merge the result.
#pragma once

#include <algorithm>

#include "element.h"
#include "patches.h"
#include "plan.h"
#include "rotate.h"
#include "state.h"

namespace ascend {

struct Call {
  const ascend_attention_args &args;
  Shape shape;
  int group;               // query heads per kv head
  bool one_array = false;  // K and V are the same elements (latents), with the same scales

  // Static scales of the channels, or null. They never meet the page: those of K are multiplied
  // into the query, those of V into the result.
  const float *key_scales(int kv_head) const {
    return args.channel_scales ? args.channel_scales + kv_head * shape.head_dim : nullptr;
  }
  const float *value_scales(int kv_head) const {
    if (!args.channel_scales || one_array) return key_scales(kv_head);
    return key_scales(args.pages.num_kv_heads + kv_head);
  }
};

// One item with everything its loops need to look up.
struct Work {
  const Call &call;
  const Job &job;
  int kv_head;
  int length;          // tokens of the sequence
  int first_position;  // of the job's sequence's first query token
  const int32_t *blocks;

  int head(int row) const { return kv_head * call.group + (job.first_row + row) % call.group; }
  int token(int row) const { return (job.first_row + row) / call.group; }
  int64_t query_token(int row) const {
    return call.args.query_start_loc[job.sequence] + token(row);
  }
};

inline Work make_work(const Call &call, const Job &job, int kv_head) {
  const ascend_attention_args &a = call.args;
  const int n = a.query_start_loc[job.sequence + 1] - a.query_start_loc[job.sequence];
  const int length = std::max(0, a.seq_lens[job.sequence]);
  return {call,   job,        kv_head,
          length, length - n, a.block_table + job.sequence * a.block_table_stride};
}

inline const char *page_run(const ascend_pages &pages, int block, int kv_head) {
  return (const char *)pages.data + block * pages.block_stride + kv_head * pages.head_stride;
}

template <int R>
void prepare_rows(const Work &work, State &state) {
  const ascend_attention_args &a = work.call.args;
  const bool sinks = a.sinks && work.job.split == 0;
  for (int i = 0; i < state.groups * kLanes; ++i) {
    const int row = std::min(i / kLanes * R + i % R, state.rows - 1);
    const int position = work.first_position + work.token(row);
    const Range range = visible(a, work.length, position);
    state.row_position[i] = position;
    state.lo[i] = range.lo;
    state.hi[i] = range.hi;
    state.slope[i] = a.alibi_slopes ? a.alibi_slopes[work.head(row)] : 0.0f;
    state.top[i] = sinks ? a.sinks[work.head(row)] : kNoScore;
    state.sum[i] = sinks && i % kLanes < R ? 1.0f : 0.0f;
  }
  // Later rows see later positions, so the bounds common to all are the last lo and the first hi.
  state.common_lo = state.lo[state.groups * kLanes - 1];
  state.common_hi = state.hi[0];
  state.biased = a.soft_cap > 0 || a.alibi_slopes;
}

template <class Kernel>
void prepare(const Work &work, State &state) {
  constexpr int R = Kernel::kGroupRows;
  const ascend_attention_args &a = work.call.args;
  state.rows = work.job.rows;
  state.groups = (state.rows + R - 1) / R;
  prepare_rows<R>(work, state);
  const Shape &shape = work.call.shape;
  const size_t rows = (size_t)state.groups * R;
  memset(state.query, 0, rows * shape.planes32() * 32 * sizeof(float));
  memset(state.out, 0, rows * shape.head_dim * sizeof(float));
  if constexpr (Kernel::kIntegers) memset(state.query_unit, 0, sizeof state.query_unit);
  state.value_patches = 0;
  alignas(64) float row_values[kMaxHeadDim];
  const float *scales = work.call.key_scales(work.kv_head);
  for (int row = 0; row < state.rows; ++row) {
    const int64_t at =
        work.query_token(row) * a.query_token_stride + work.head(row) * a.query_head_stride;
    widen_row(a.query_dtype, a.query, at, shape.head_dim, row_values);
    if (scales) {
      for (int d = 0; d < shape.head_dim; ++d) row_values[d] *= scales[d];
    }
    if (a.pages.quantisation == ASCEND_C8D) {
      rotate_row(shape.head_dim, row_values);
      const float factor = 1.0f / (float)rotated_channels(shape.head_dim);
      for (int d = 0; d < shape.head_dim; ++d) row_values[d] *= factor;
    }
    Kernel::pack_query(shape, state, row, row_values);
  }
}

// The run to prefetch while a page is worked on: the item's next page, else the next item's first.
struct NextRun {
  const char *after_last;
  const char *of(const Work &work, int page) const {
    if (page + 1 >= work.job.last_page) return after_last;
    return page_run(work.call.args.pages, work.blocks[page + 1], work.kv_head);
  }
};

// What a page of int8 holds besides K and V; the tile keeps null where there is none.
inline void set_extras(const ascend_pages &pages, const char *run, Tile &tile) {
  if (pages.quantisation == ASCEND_C8D) {
    tile.k_scales = (const float *)(run + pages.k_scales_offset);
    tile.v_scales = (const float *)(run + pages.v_scales_offset);
  } else if (pages.quantisation == ASCEND_C8P) {
    tile.k_patches = run + pages.k_patches_offset;
    tile.v_patches = run + pages.v_patches_offset;
  }
}

// `next` is the run after the one that is worked on, `after` the one after that: which patches of
// `next` are needed is known once its tags are in cache. Most slots are empty, and fetching whole
// pools would be waste. Either may be null.
inline void prefetch_extras(const ascend_pages &pages, const Shape &shape, const char *next,
                            const char *after) {
  if (pages.quantisation == ASCEND_C8D && next) {
    for (int i = 0; i < pages.block_size * 4; i += 64) {
      prefetch_l2(next + pages.k_scales_offset + i);
      prefetch_l2(next + pages.v_scales_offset + i);
    }
  } else if (pages.quantisation == ASCEND_C8P) {
    for (int64_t pool : {pages.k_patches_offset, pages.v_patches_offset}) {
      if (next) prefetch_patches(shape, next + pool);
      if (after) prefetch_l2(after + pool);
    }
  }
}

// Calls `use` with the tiles of a page that hold positions [lo, hi). tile.position is set.
template <class AnyTile, class Use>
void visit_tiles(int block_size, int lo, int hi, AnyTile &tile, const Use &use) {
  const int begin = std::max(0, lo - tile.position);
  const int end = std::min<int>(block_size, hi - tile.position);
  for (int chunk = 0; chunk < end; chunk += kTileTokens) {
    tile.begin = std::max(begin, chunk);
    tile.end = std::min(end, chunk + kTileTokens);
    if (tile.begin >= tile.end) continue;
    tile.first = tile.begin / kTokenAlign * kTokenAlign;
    tile.last = (tile.end + kTokenAlign - 1) / kTokenAlign * kTokenAlign;
    use(tile);
  }
}

template <class Kernel>
void walk_pages(const Work &work, const NextRun &next, State &state) {
  const ascend_pages &pages = work.call.args.pages;
  const int lo = state.lo[0], hi = state.hi[state.groups * kLanes - 1];
  for (int page = work.job.first_page; page < work.job.last_page; ++page) {
    const char *run = page_run(pages, work.blocks[page], work.kv_head);
    const char *upcoming = next.of(work, page);
    Tile tile{};
    tile.k = run + pages.k_offset;
    tile.v = run + pages.v_offset;
    tile.next_k = upcoming ? upcoming + pages.k_offset : nullptr;
    tile.next_v = upcoming ? upcoming + pages.v_offset : nullptr;
    set_extras(pages, run, tile);
    prefetch_extras(pages, work.call.shape, upcoming,
                    page + 1 < work.job.last_page ? next.of(work, page + 1) : nullptr);
    tile.position = page * pages.block_size;
    visit_tiles(pages.block_size, lo, hi, tile, [&](const Tile &t) {
      Kernel::run_tile(work.call.shape, t, state, work.call.args.alibi_slopes != nullptr);
    });
  }
}

// Split results of a job and kv head, [split]: rows x head_dim, then maxima, then sums.
inline void write_row(const Work &work, int row, float *values) {
  const ascend_attention_args &a = work.call.args;
  if (const float *scales = work.call.value_scales(work.kv_head)) {
    for (int d = 0; d < work.call.shape.head_dim; ++d) values[d] *= scales[d];
  }
  const int64_t at =
      work.query_token(row) * a.out_token_stride + work.head(row) * a.out_head_stride;
  round_row(a.query_dtype, values, work.call.shape.head_dim, a.out, at);
}

inline void merge_splits(const Work &work, Plan &plan) {
  const Job &job = work.job;
  const int dim = work.call.shape.head_dim;
  const float *parts = plan.partial(job, work.kv_head, 0);
  const int64_t stride = plan.partial_floats(job);
  const float *tops = parts + (int64_t)job.rows * dim, *sums = tops + job.rows;
  alignas(64) float values[kMaxLatentDim];
  for (int row = 0; row < job.rows; ++row) {
    float top = kNoScore, sum = 0;
    for (int s = 0; s < job.splits; ++s) top = std::max(top, tops[s * stride + row]);
    memset(values, 0, dim * sizeof(float));
    for (int s = 0; s < job.splits; ++s) {
      const float factor = exp_nonpositive(splat(tops[s * stride + row] - top))[0];
      sum += factor * sums[s * stride + row];
      const float *part = parts + s * stride + (int64_t)row * dim;
      for (int d = 0; d < dim; ++d) values[d] += factor * part[d];
    }
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum;  // no key in sight: zeros
    for (int d = 0; d < dim; ++d) values[d] *= inverse;
    write_row(work, row, values);
  }
}

template <class Kernel>
void finish(const Work &work, Plan &plan, const State &state) {
  const Job &job = work.job;
  const Shape &shape = work.call.shape;
  if (job.splits == 1) {
    alignas(64) float values[kMaxLatentDim];
    for (int row = 0; row < job.rows; ++row) {
      const float sum = Kernel::row_sum(state, row);
      Kernel::unpack_out(shape, state, row, sum == 0 ? 0.0f : 1.0f / sum, values);
      write_row(work, row, values);
    }
    return;
  }
  float *part = plan.partial(job, work.kv_head, job.split);
  float *tops = part + (int64_t)job.rows * shape.head_dim;
  for (int row = 0; row < job.rows; ++row) {
    Kernel::unpack_out(shape, state, row, 1.0f, part + (int64_t)row * shape.head_dim);
    tops[row] = Kernel::row_top(state, row);
    tops[job.rows + row] = Kernel::row_sum(state, row);
  }
  if (plan.finish_split(job, work.kv_head)) merge_splits(work, plan);
}

template <class Kernel>
void run_item(const Work &work, const char *next_item, Plan &plan, State &state) {
  prepare<Kernel>(work, state);
  walk_pages<Kernel>(work, NextRun{next_item}, state);
  finish<Kernel>(work, plan, state);
}

}  // namespace ascend
