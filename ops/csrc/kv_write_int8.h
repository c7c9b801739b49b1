#pragma once

#include <stdint.h>

#include "ascend_cpu.h"

namespace ascend {

// Writes tokens into int8 pages; dimensions and slots have been checked. chunk_tokens: how many
// tokens a thread takes at a time; serial: on this thread alone. Returns an ascend_status.
int write_int8(const ascend_write_args &args, int64_t chunk_tokens, bool serial);

}  // namespace ascend
