// ascend_cpu_paged_attention: plan, choose a kernel per item, run the items on all threads.
#include <atomic>
#include <memory>

#include "item.h"
#include "narrow.h"
#include "narrow_bf16.h"
#include "narrow_int8.h"
#include "staged_int8.h"
#include "wide.h"
#include "wide_int8.h"

namespace ascend {
namespace {

using ItemFunction = void (*)(const Work &, const char *, Plan &, State &);

// Up to narrow_rows query rows, lanes along head_dim win over lanes along rows (measured).
struct KernelSet {
  ItemFunction narrow1, narrow2, narrow4, wide;
  int narrow_rows;

  ItemFunction choose(int rows) const {
    if (rows > narrow_rows) return wide;
    return rows == 1 ? narrow1 : rows == 2 ? narrow2 : narrow4;
  }
};

template <class E>
constexpr KernelSet kFloatKernels = {run_item<Narrow<E, 1>>, run_item<Narrow<E, 2>>,
                                     run_item<Narrow<E, 4>>, run_item<Wide<E, FloatSource<E>>>,
                                     E::kNarrowRows};

using StagedWide = StagedInt8<Wide<Float32, FloatSource<Float32>>>;

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)
template <bool kExact, bool kTokenScales, class WideKernel>
constexpr KernelSet kInt8Kernels = {
    run_item<NarrowInt8<1, kExact, kTokenScales>>, run_item<NarrowInt8<2, kExact, kTokenScales>>,
    run_item<NarrowInt8<4, kExact, kTokenScales>>, run_item<WideKernel>, 32};

template <bool kTokenScales>
const KernelSet *choose_int8_kernels(const ascend_attention_args &a) {
  if (a.fast) return &kInt8Kernels<false, kTokenScales, WideInt8>;
  // bfloat16 products would lose what other queries have.
  if (a.query_dtype == ASCEND_BFLOAT16) return &kInt8Kernels<true, kTokenScales, WideInt8>;
  return &kInt8Kernels<true, kTokenScales, StagedWide>;
}

const KernelSet *find_int8_kernels(const ascend_attention_args &a) {
  const bool token_scales = a.pages.quantisation == ASCEND_C8D;
  return token_scales ? choose_int8_kernels<true>(a) : choose_int8_kernels<false>(a);
}
#else
constexpr KernelSet kInt8Kernels = {
    run_item<StagedInt8<Narrow<Float32, 1>>>, run_item<StagedInt8<Narrow<Float32, 2>>>,
    run_item<StagedInt8<Narrow<Float32, 4>>>, run_item<StagedWide>, Float32::kNarrowRows};

const KernelSet *find_int8_kernels(const ascend_attention_args &) { return &kInt8Kernels; }
#endif

const KernelSet *find_kernels(const ascend_attention_args &a) {
  const int dtype = a.pages.dtype;
  if (dtype == ASCEND_INT8) return find_int8_kernels(a);
  if (dtype == ASCEND_FLOAT32) return &kFloatKernels<Float32>;
  if (dtype == ASCEND_FLOAT16) return &kFloatKernels<Float16>;
  if (dtype != ASCEND_BFLOAT16) return nullptr;
#if defined(__AVX512BF16__)
  static constexpr KernelSet kernels = {run_item<NarrowBf16<1>>, run_item<NarrowBf16<2>>,
                                        run_item<NarrowBf16<4>>,
                                        run_item<Wide<Bfloat16, Bf16Source>>, 32};
  return &kernels;
#else
  return &kFloatKernels<Bfloat16>;
#endif
}

bool quantisation_supported(const ascend_attention_args &a) {
  const ascend_pages &p = a.pages;
  if (p.dtype != ASCEND_INT8) return p.quantisation == ASCEND_UNQUANTISED && !a.channel_scales;
  if (p.quantisation == ASCEND_C8D) return !a.channel_scales;
  if (p.quantisation == ASCEND_C8S) return a.channel_scales;
  return p.quantisation == ASCEND_C8P && a.channel_scales && p.patch_slots > 0 &&
         p.patch_slots <= kMaxPatchSlots && p.patch_code >= 0 && p.patch_code <= ASCEND_E3M0;
}

bool supported(const ascend_attention_args &a) {
  const ascend_pages &p = a.pages;
  const auto takes = [](int n, int limit) { return n > 0 && n % 16 == 0 && n <= limit; };
  return takes(p.head_dim, kMaxHeadDim) && takes(p.block_size, 256) && p.num_kv_heads > 0 &&
         a.num_heads > 0 && a.num_heads % p.num_kv_heads == 0 && a.query_dtype >= 0 &&
         a.query_dtype <= ASCEND_BFLOAT16 && a.window >= 0 && quantisation_supported(a);
}

State &thread_state() {
  static thread_local std::unique_ptr<State> state;
  if (!state) state.reset(new State);
  return *state;
}

class Runner {
 public:
  Runner(const ascend_attention_args &args, Plan &plan, const KernelSet &kernels)
      : call_{args,
              {args.pages.head_dim, (int64_t)args.pages.block_size * kRowBytes, args.scale,
               args.soft_cap, args.pages.patch_slots, args.pages.patch_code},
              args.num_heads / args.pages.num_kv_heads},
        plan_(plan),
        kernels_(kernels) {}

  void work() {
    State &state = thread_state();
    const int64_t count = (int64_t)plan_.items().size();
    for (int64_t i = next_++; i < count; i = next_++) {
      const Item item = plan_.items()[i];
      const Work work = make_work(call_, plan_.jobs()[item.job], item.kv_head);
      kernels_.choose(work.job.rows)(work, upcoming(), plan_, state);
    }
  }

 private:
  // First run of the item that will probably come next, for prefetching.
  const char *upcoming() const {
    const int64_t i = next_.load(std::memory_order_relaxed);
    if (i >= (int64_t)plan_.items().size()) return nullptr;
    const Item item = plan_.items()[i];
    const Job &job = plan_.jobs()[item.job];
    if (job.first_page >= job.last_page) return nullptr;
    const ascend_attention_args &a = call_.args;
    const int32_t *blocks = a.block_table + job.sequence * a.block_table_stride;
    return page_run(a.pages, blocks[job.first_page], item.kv_head);
  }

  const Call call_;
  Plan &plan_;
  const KernelSet &kernels_;
  std::atomic<int64_t> next_{0};
};

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_paged_attention(const ascend_attention_args *args) {
  using namespace ascend;
  const KernelSet *kernels = find_kernels(*args);
  if (!kernels || !supported(*args)) return ASCEND_UNSUPPORTED;
  static thread_local Plan plan_of_thread;
  Plan &plan = plan_of_thread;
  const int status = plan.build(*args, kernels->narrow_rows);
  if (status != ASCEND_OK) return status;
  Runner runner(*args, plan, *kernels);
  if (plan.serial()) {
    runner.work();
  } else {
#pragma omp parallel num_threads(args->num_threads)
    runner.work();
  }
  return ASCEND_OK;
}
