// Sizes and units of a 910B core (dav-2201), as the AscendC documentation states them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ascendc_host {

/// On-chip memories. A cube core (AIC) has L1 and L0, a vector core (AIV) the unified buffer.
enum class Memory : uint8_t { UB, L1, L0A, L0B, L0C, COUNT };

constexpr size_t MEMORY_COUNT = static_cast<size_t>(Memory::COUNT);
constexpr size_t CAPACITY[MEMORY_COUNT] = {192 * 1024, 512 * 1024, 64 * 1024, 64 * 1024,
                                           128 * 1024};
/// What InitBuffer can hand out. "NPU architecture 2201": 256 bytes of UB and L1 are reserved in
/// mixed kernels, and 8 KiB of UB for instructions such as Select unless a compiler option says
/// not.
constexpr size_t USABLE[MEMORY_COUNT] = {192 * 1024 - 256 - 8 * 1024, 512 * 1024 - 256, 64 * 1024,
                                         64 * 1024, 128 * 1024};
constexpr const char* MEMORY_NAME[MEMORY_COUNT] = {"UB", "L1", "L0A", "L0B", "L0C"};

constexpr uint32_t BLOCK_BYTES = 32;       // unit of on-chip addresses
constexpr uint32_t REPEAT_BYTES = 256;     // what a vector instruction handles in one repeat
constexpr uint32_t FRACTAL_BYTES = 512;    // unit of L0 addresses
constexpr uint32_t CACHE_LINE_BYTES = 64;  // of the scalar unit's data cache
constexpr int EVENT_IDS = 8;               // per pair of pipes
constexpr int CROSS_CORE_FLAGS = 16;       // per core
constexpr int CROSS_CORE_FLAG_LIMIT = 15;  // highest count a cross-core flag can hold

}  // namespace ascendc_host
