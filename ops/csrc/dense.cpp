// ascend_cpu_dense: few rows times a matrix of weights as the checkpoint holds it.
#include "ascend_cpu.h"

extern "C" int ascend_cpu_dense(const ascend_dense_args *) { return ASCEND_UNSUPPORTED; }
