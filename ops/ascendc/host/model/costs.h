// Constants of the cycle estimate. An estimate, not a simulation: no bank conflicts, no contention.
#pragma once

#include <cstdint>

namespace ascendc_host {

// 1.8 GHz: the vendor's performance guide (Analysing performance data) counts 11.06 TOPS of
// float32, which is 48 vector cores x 64 lanes x 2 x 1.8 GHz. 910B1: 1.85 GHz (platform
// configuration).
constexpr double CLOCK_GHZ = 1.8;
// The same guide (Splitting by L2 cache): "about 1.6 TB/s" to global memory; L2 has about 7 TB/s.
constexpr double HBM_BYTES_PER_SECOND = 1.6e12;
// For what a kernel keeps in its workspace: a few MiB, written again and again.
constexpr double L2_BYTES_PER_SECOND = 7e12;
// A vector repeat is 256 bytes (API reference, repeat). One a cycle is an upper bound: the platform
// configuration of the 910B1 says 128 bytes a cycle.
constexpr uint32_t VECTOR_BYTES_PER_CYCLE = 256;
// A cube step is 16x16x16 half or 16x32x16 int8 a cycle: 4096 and 8192 products ("Da Vinci", Hot
// Chips 31), one fractal of A by one of B.
constexpr uint32_t CUBE_STEPS_PER_CYCLE = 1;
// "NPU architecture 2201", bandwidth of the paths.
constexpr uint32_t L1_TO_L0A_BYTES_PER_CYCLE = 256;
constexpr uint32_t L1_TO_L0B_BYTES_PER_CYCLE = 128;
// Assumptions of this model, without a public source: what one core moves a cycle between GM and
// its memories when the bus is free, and what starting an instruction costs.
constexpr uint32_t GM_BYTES_PER_CYCLE = 64;
constexpr uint32_t FIX_BYTES_PER_CYCLE = 64;
constexpr uint32_t GM_LATENCY_CYCLES = 400;  // until a transfer's flag can be seen
constexpr uint32_t COPY_START_CYCLES = 32;   // until the pipe takes the next transfer
constexpr uint32_t VECTOR_START_CYCLES = 12;
constexpr uint32_t CUBE_START_CYCLES = 16;
constexpr uint32_t SLOW_VECTOR_FACTOR = 4;  // Div, Exp, Ln, Sqrt, ...

}  // namespace ascendc_host
