// ascend_cpu_run_steps: a recorded sequence of calls, without the caller between them.
#include "ascend_cpu.h"

namespace {

using Function = int (*)(const void *);

template <class Args, int (*Call)(const Args *)>
int call(const void *args) {
  return Call((const Args *)args);
}

// In the order of the sizes in ascend_cpu_abi.
constexpr Function kFunctions[] = {
    call<ascend_attention_args, ascend_cpu_paged_attention>,
    call<ascend_write_args, ascend_cpu_kv_write>,
    call<ascend_linear_args, ascend_cpu_linear>,
    call<ascend_int8_linear_args, ascend_cpu_int8_linear>,
    call<ascend_quantise_args, ascend_cpu_quantise>,
    call<ascend_hadamard_args, ascend_cpu_hadamard>,
    call<ascend_mla_args, ascend_cpu_mla_attention>,
    call<ascend_mla_write_args, ascend_cpu_mla_write>,
    call<ascend_add_rms_norm_args, ascend_cpu_add_rms_norm>,
    call<ascend_dense_args, ascend_cpu_dense>,
    call<ascend_rotary_args, ascend_cpu_rotary>,
    call<ascend_elementwise_args, ascend_cpu_elementwise>,
    call<ascend_embedding_args, ascend_cpu_embedding>,
    call<ascend_static_quantise_args, ascend_cpu_static_quantise>,
};
constexpr int64_t kCount = sizeof kFunctions / sizeof kFunctions[0];

}  // namespace

extern "C" int ascend_cpu_run_steps(const ascend_step *steps, int64_t count, int64_t *stopped) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t function = (uint64_t)steps[i].function;
    const int status =
        function < (uint64_t)kCount ? kFunctions[function](steps[i].args) : ASCEND_UNSUPPORTED;
    if (status == ASCEND_OK) continue;
    *stopped = i;
    return status;
  }
  return ASCEND_OK;
}
