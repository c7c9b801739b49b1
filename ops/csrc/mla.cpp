// ascend_cpu_mla_attention: the plan and the softmax of paged attention with one kv head, and
// kernels whose keys and values are the same array.
#include <atomic>
#include <memory>

#include "item.h"
#include "latent.h"
#include "latent_int8.h"

namespace ascend {
namespace {

// What the plan and the rows need to know of a call, as attention over one kv head. V's columns
// decide: they are what splits of a context exchange.
ascend_attention_args as_attention(const ascend_mla_args &a) {
  ascend_attention_args args{};
  args.pages.data = a.pages.data;
  args.pages.num_blocks = a.pages.num_blocks;
  args.pages.block_stride = a.pages.block_stride;
  args.pages.dtype = a.pages.dtype;
  args.pages.block_size = a.pages.block_size;
  args.pages.num_kv_heads = 1;
  args.pages.head_dim = a.pages.latent_dim;
  args.pages.quantisation = a.pages.quantisation;
  args.query = a.query;
  args.out = a.out;
  args.query_token_stride = a.query_token_stride;
  args.query_head_stride = a.query_head_stride;
  args.out_token_stride = a.out_token_stride;
  args.out_head_stride = a.out_head_stride;
  args.query_start_loc = a.query_start_loc;
  args.seq_lens = a.seq_lens;
  args.block_table = a.block_table;
  args.block_table_stride = a.block_table_stride;
  args.channel_scales = a.channel_scales;
  args.scale = a.scale;
  args.causal = a.causal;
  args.query_dtype = a.query_dtype;
  args.num_heads = a.num_heads;
  args.num_seqs = a.num_seqs;
  args.num_threads = a.num_threads;
  args.fast = a.fast;
  return args;
}

struct LatentCall {
  const ascend_mla_args &args;
  LatentShape shape;
};

template <class Kernel>
void pack_rows(const LatentCall &call, const Work &work, State &state) {
  const ascend_mla_args &a = call.args;
  const LatentShape &shape = call.shape;
  const int latent = shape.latent.head_dim, rotary = shape.rotary.head_dim;
  alignas(64) float values[kMaxKeyDim];
  for (int row = 0; row < state.rows; ++row) {
    const int64_t token = work.query_token(row), head = work.head(row);
    widen_row(a.query_dtype, a.query, token * a.query_token_stride + head * a.query_head_stride,
              latent, values);
    widen_row(a.query_dtype, a.query_rotary,
              token * a.rotary_token_stride + head * a.rotary_head_stride, rotary, values + latent);
    if (a.channel_scales) {
      for (int d = 0; d < latent; ++d) values[d] *= a.channel_scales[d];
    }
    Kernel::pack_query(shape, state, row, values);
  }
}

template <class Kernel>
void walk(const LatentCall &call, const Work &work, const NextRun &next, State &state) {
  const ascend_latent_pages &pages = call.args.pages;
  const int lo = state.lo[0], hi = state.hi[state.groups * kLanes - 1];
  for (int page = work.job.first_page; page < work.job.last_page; ++page) {
    const char *run = page_run(work.call.args.pages, work.blocks[page], 0);
    LatentTile tile{};
    tile.k = tile.v = run;
    tile.rotary = run + pages.rotary_offset;
    tile.next_k = next.of(work, page);
    if (pages.quantisation == ASCEND_C8D) {
      tile.k_scales = (const float *)(run + pages.scales_offset);
    }
    tile.position = page * pages.block_size;
    visit_tiles(pages.block_size, lo, hi, tile,
                [&](const LatentTile &t) { Kernel::run_tile(call.shape, t, state); });
  }
}

using ItemFunction = void (*)(const LatentCall &, const Work &, const char *, Plan &, State &);

template <class Kernel>
void run_item(const LatentCall &call, const Work &work, const char *next, Plan &plan,
              State &state) {
  state.rows = work.job.rows;
  state.groups = (state.rows + kLanes - 1) / kLanes;
  prepare_rows<kLanes>(work, state);
  if (state.rows % kLanes) memset(state.query, 0, sizeof state.query);  // rows that nobody packs
  memset(state.query_unit, 0, sizeof state.query_unit);
  memset(state.out, 0, (size_t)state.groups * kLanes * call.shape.latent.head_dim * sizeof(float));
  pack_rows<Kernel>(call, work, state);
  walk<Kernel>(call, work, NextRun{next}, state);
  finish<Kernel>(work, plan, state);
}

template <class E>
using FloatKernel = LatentWide<Wide<E, LatentSource<E>>>;

ItemFunction find_kernel(const ascend_mla_args &a) {
  const int dtype = a.pages.dtype;
  if (dtype == ASCEND_FLOAT32) return run_item<FloatKernel<Float32>>;
  if (dtype == ASCEND_FLOAT16) return run_item<FloatKernel<Float16>>;
#if defined(__AVX512BF16__)
  if (dtype == ASCEND_BFLOAT16) return run_item<LatentWide<Wide<Bfloat16, Bf16Source>>>;
#else
  if (dtype == ASCEND_BFLOAT16) return run_item<FloatKernel<Bfloat16>>;
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)
  if (a.fast) return run_item<LatentInt8<false>>;
  // bfloat16 rotary parts of the query would lose what others have.
  if (a.query_dtype == ASCEND_BFLOAT16) return run_item<LatentInt8<true>>;
#endif
  return run_item<LatentStagedInt8>;
}

bool quantisation_supported(const ascend_mla_args &a) {
  const ascend_latent_pages &p = a.pages;
  if (p.dtype != ASCEND_INT8) return p.quantisation == ASCEND_UNQUANTISED && !a.channel_scales;
  if (p.quantisation == ASCEND_C8D) return !a.channel_scales;
  return p.quantisation == ASCEND_C8S && a.channel_scales;
}

bool supported(const ascend_mla_args &a) {
  const ascend_latent_pages &p = a.pages;
  const auto takes = [](int n, int limit) { return n > 0 && n % 16 == 0 && n <= limit; };
  return takes(p.latent_dim, kMaxLatentDim) && takes(p.rotary_dim, kMaxRotaryDim) &&
         takes(p.block_size, 256) && p.dtype >= 0 && p.dtype <= ASCEND_INT8 && a.num_heads > 0 &&
         a.query_dtype >= 0 && a.query_dtype <= ASCEND_BFLOAT16 && quantisation_supported(a);
}

State &thread_state() {
  static thread_local std::unique_ptr<State> state;
  if (!state) state.reset(new State);
  return *state;
}

class Runner {
 public:
  Runner(const ascend_mla_args &args, const ascend_attention_args &attention, Plan &plan,
         ItemFunction run)
      : latent_{args,
                {shape_of(args, args.pages.latent_dim), shape_of(args, args.pages.rotary_dim)}},
        call_{attention, latent_.shape.latent, args.num_heads, true},
        plan_(plan),
        run_(run) {}

  void work() {
    State &state = thread_state();
    const int64_t count = (int64_t)plan_.items().size();
    for (int64_t i = next_++; i < count; i = next_++) {
      const Work work = make_work(call_, plan_.jobs()[plan_.items()[i].job], 0);
      run_(latent_, work, upcoming(), plan_, state);
    }
  }

 private:
  static Shape shape_of(const ascend_mla_args &a, int columns) {
    return {columns, (int64_t)a.pages.block_size * kRowBytes, a.scale, 0.0f, 0, 0};
  }

  // First page of the item that will probably come next, for prefetching.
  const char *upcoming() const {
    const int64_t i = next_.load(std::memory_order_relaxed);
    if (i >= (int64_t)plan_.items().size()) return nullptr;
    const Job &job = plan_.jobs()[plan_.items()[i].job];
    if (job.first_page >= job.last_page) return nullptr;
    const ascend_attention_args &a = call_.args;
    return page_run(a.pages, a.block_table[job.sequence * a.block_table_stride + job.first_page],
                    0);
  }

  const LatentCall latent_;
  const Call call_;
  Plan &plan_;
  const ItemFunction run_;
  std::atomic<int64_t> next_{0};
};

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_mla_attention(const ascend_mla_args *args) {
  using namespace ascend;
  if (!supported(*args)) return ASCEND_UNSUPPORTED;
  const ascend_attention_args attention = as_attention(*args);
  static thread_local Plan plan_of_thread;
  Plan &plan = plan_of_thread;
  const int status = plan.build(attention, 0);
  if (status != ASCEND_OK) return status;
  Runner runner(*args, attention, plan, find_kernel(*args));
  if (plan.serial()) {
    runner.work();
  } else {
#pragma omp parallel num_threads(args->num_threads)
    runner.work();
  }
  return ASCEND_OK;
}
