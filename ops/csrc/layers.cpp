// Small layers of decoders: rotary embedding, functions of elements, rows of a table.
#include "ascend_cpu.h"

extern "C" int ascend_cpu_rotary(const ascend_rotary_args *) { return ASCEND_UNSUPPORTED; }
extern "C" int ascend_cpu_elementwise(const ascend_elementwise_args *) {
  return ASCEND_UNSUPPORTED;
}
extern "C" int ascend_cpu_embedding(const ascend_embedding_args *) { return ASCEND_UNSUPPORTED; }
