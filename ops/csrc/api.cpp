#include "ascend_cpu.h"

void ascend_cpu_abi(int64_t out[15]) {
  out[0] = ASCEND_CPU_ABI_VERSION;
  out[1] = sizeof(ascend_attention_args);
  out[2] = sizeof(ascend_write_args);
  out[3] = sizeof(ascend_linear_args);
  out[4] = sizeof(ascend_int8_linear_args);
  out[5] = sizeof(ascend_quantise_args);
  out[6] = sizeof(ascend_hadamard_args);
  out[7] = sizeof(ascend_mla_args);
  out[8] = sizeof(ascend_mla_write_args);
  out[9] = sizeof(ascend_add_rms_norm_args);
  out[10] = sizeof(ascend_dense_args);
  out[11] = sizeof(ascend_rotary_args);
  out[12] = sizeof(ascend_elementwise_args);
  out[13] = sizeof(ascend_embedding_args);
  out[14] = sizeof(ascend_static_quantise_args);
}

// Set by ops/native/build.py.
const char *ascend_cpu_sources(void) { return ASCEND_CPU_SOURCES; }

// Called before anything else in the library: nothing here may need the instruction set it tests.
int ascend_cpu_runnable(void) {
#if defined(__AVX512F__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
#elif defined(__AVX2__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return 1;
#endif
}
