// The cube core: ND to NZ on the way into L1, fractals into L0, Mmad, and Fixpipe to global memory.
//
// Layouts are read and written physically. A fractal is 512 bytes: 16 rows of 32 bytes (C0
// elements).
//   L0A: fractals of A row by row of blocks (Zz): block (m1, k1) at m1 * K1 + k1, rows are m.
//   L0B: fractals of B row by row of blocks (Zn): block (k1, n1) at k1 * N1 + n1, rows are n.
//   L0C: fractals of 16x16 column by column (Nz): block (m1, n1) at n1 * M1 + m1, rows are m.
#pragma once

#include <cmath>
#include <limits>

#include "../model/multiply.h"
#include "cast.h"
#include "copy.h"
#include "cube_params.h"

namespace ascendc_host {

inline void check_nd2nz(const char* api, const AscendC::Nd2NzParams& p) {
  HOST_CHECK(p.ndNum == 1, "%s: ndNum %u; the model has 1", api, p.ndNum);
  HOST_CHECK(p.nValue >= 1 && p.nValue <= 16384 && p.dValue >= 1,
             "%s: nValue %u is not in 1..16384 or dValue %u is 0", api, p.nValue, p.dValue);
  HOST_CHECK(p.srcDValue >= p.dValue || p.nValue == 1, "%s: srcDValue %u is less than dValue %u",
             api, p.srcDValue, p.dValue);
  HOST_CHECK(p.dstNzC0Stride >= 1 && p.dstNzC0Stride <= 16384 && p.dstNzNStride >= 1 &&
                 p.dstNzNStride <= 16384,
             "%s: dstNzC0Stride %u and dstNzNStride %u must be in 1..16384", api, p.dstNzC0Stride,
             p.dstNzNStride);
}

template <class T>
void nd_to_nz(T* to, const T* from, const AscendC::Nd2NzParams& p) {
  constexpr uint32_t C0 = block_elements<T>;
  T zero;
  std::memset(&zero, 0, sizeof zero);
  for (uint32_t row = 0; row < p.nValue; ++row) {
    for (uint32_t k = 0; k < (p.dValue + C0 - 1) / C0 * C0; ++k) {
      T* target = to + (uint64_t{k / C0} * p.dstNzC0Stride + uint64_t{row} * p.dstNzNStride) * C0;
      target[k % C0] = k < p.dValue ? from[uint64_t{row} * p.srcDValue + k] : zero;
    }
  }
}

}  // namespace ascendc_host

namespace AscendC {

/// GM (ND) to L1 (NZ); columns beyond `dValue` are filled with zeros up to 32 bytes.
template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& params) {
  using namespace ascendc_host;
  constexpr const char* API = "DataCopy (Nd2Nz)";
  static_assert(
      is_one_of<T, int8_t, uint8_t, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t>,
      "DataCopy (Nd2Nz): elements of 8, 16 and 32 bits only");
  constexpr uint32_t C0 = block_elements<T>;
  const Nd2NzParams p = params;
  HOST_CHECK(dst.memory() == Memory::L1, "%s: the target is L1 (A1, B1), not %s", API,
             dst.memory_name());
  check_nd2nz(API, p);
  check_gm_alignment(src, API);
  const uint32_t columns = (p.dValue + C0 - 1) / C0;
  const uint64_t rows_bytes = (uint64_t{p.nValue} - 1) * p.dstNzNStride * 32 + 32;
  const uint64_t span = (columns - 1ull) * p.dstNzC0Stride * 32 + rows_bytes;
  T* to = dst.pointer(API, span / sizeof(T));
  src.require(uint64_t{p.nValue - 1u} * p.srcDValue + p.dValue, API);
  const T* from = src.GetPhyAddr();
  Instruction instruction;
  instruction.api = API;
  instruction.accesses = {
      src.byte_access(0, p.dValue * sizeof(T), false, p.nValue, uint64_t{p.srcDValue} * sizeof(T))};
  for (uint32_t column = 0; column < columns; ++column) {
    instruction.accesses.push_back(dst.byte_access(uint64_t{column} * p.dstNzC0Stride * 32, 32,
                                                   true, p.nValue, uint64_t{p.dstNzNStride} * 32));
  }
  instruction.cycles = gm_cycles(uint64_t{p.nValue} * p.dValue * sizeof(T));
  instruction.work = [=] { nd_to_nz(to, from, p); };
  core().require_pipe(PIPE_MTE1, API);
  core().issue(PIPE_MTE2, std::move(instruction));
}

}  // namespace AscendC

namespace ascendc_host {

/// Checks of a transfer from L1 into L0A or L0B.
template <class T>
void check_load(const char* api, const AscendC::LocalTensor<T>& dst,
                const AscendC::LocalTensor<T>& src) {
  HOST_CHECK(
      src.memory() == Memory::L1 && (dst.memory() == Memory::L0A || dst.memory() == Memory::L0B),
      "%s: L1 to L0A or L0B, not %s to %s", api, src.memory_name(), dst.memory_name());
}

inline void issue_fractals(const char* api, std::function<void()> work, Accesses accesses,
                           uint64_t fractals, Memory target) {
  Instruction instruction;
  instruction.api = api;
  instruction.work = std::move(work);
  instruction.accesses = std::move(accesses);
  const uint32_t rate =
      target == Memory::L0A ? L1_TO_L0A_BYTES_PER_CYCLE : L1_TO_L0B_BYTES_PER_CYCLE;
  instruction.cycles = CUBE_START_CYCLES + fractals * FRACTAL_BYTES / rate;
  core().issue(PIPE_MTE1, std::move(instruction));
}

/// Transposes a square of `side` x `side` elements whose rows lie one behind the other.
template <class T>
void transpose_square(T* target, const T* source, uint32_t side, uint64_t second_fractal) {
  for (uint32_t row = 0; row < side; ++row) {
    T* to = target + (row / 16) * second_fractal + uint64_t{row % 16} * side;
    for (uint32_t column = 0; column < side; ++column) to[column] = source[column * side + row];
  }
}

}  // namespace ascendc_host

namespace AscendC {

/// L1 to L0A or L0B, fractal by fractal; transposed (16 bits only) if `ifTranspose`.
template <class T>
void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src,
              const LoadData2DParams& params) {
  using namespace ascendc_host;
  constexpr const char* API = "LoadData";
  constexpr uint32_t FRACTAL = FRACTAL_BYTES / sizeof(T);
  const LoadData2DParams p = params;
  check_load(API, dst, src);
  HOST_CHECK(!p.ifTranspose || sizeof(T) == 2,
             "LoadData: ifTranspose is for 16-bit elements; use LoadDataWithTranspose");
  HOST_CHECK(p.addrMode == 0, "LoadData: addrMode %u; the model has 0", p.addrMode);
  if (p.repeatTimes == 0) return;
  const uint64_t step = 1ull + p.dstGap;
  T* to = dst.pointer(API, ((p.repeatTimes - 1) * step + 1) * FRACTAL, FRACTAL_BYTES);
  const uint64_t last = p.startIndex + uint64_t{p.repeatTimes - 1u} * p.srcStride;
  const T* from = src.pointer(API, (last + 1) * FRACTAL);
  Accesses accesses{src.byte_access(uint64_t{p.startIndex} * FRACTAL_BYTES, FRACTAL_BYTES, false,
                                    p.repeatTimes, uint64_t{p.srcStride} * FRACTAL_BYTES),
                    dst.byte_access(0, FRACTAL_BYTES, true, p.repeatTimes, step * FRACTAL_BYTES)};
  issue_fractals(
      API,
      [=] {
        for (uint32_t i = 0; i < p.repeatTimes; ++i) {
          const T* source = from + (p.startIndex + uint64_t{i} * p.srcStride) * FRACTAL;
          if (p.ifTranspose) {
            transpose_square(to + i * step * FRACTAL, source, 16, 0);
          } else {
            std::memcpy(to + i * step * FRACTAL, source, FRACTAL_BYTES);
          }
        }
      },
      std::move(accesses), p.repeatTimes, dst.memory());
}

/// L1 to L0A or L0B, square by square, each transposed.
///
/// 8 bits: two consecutive fractals of 16x32 are a square of 32x32; transposed it is stored as two
/// fractals, `dstFracGap` fractals apart.
template <class T>
void LoadDataWithTranspose(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                           const LoadData2dTransposeParams& params) {
  using namespace ascendc_host;
  static_assert(sizeof(T) <= 2, "LoadDataWithTranspose: the model has 8 and 16 bits");
  constexpr const char* API = "LoadDataWithTranspose";
  constexpr uint32_t SIDE = sizeof(T) == 1 ? 32 : 16;
  constexpr uint32_t SQUARE = SIDE * SIDE;
  constexpr uint32_t PARTS = SIDE / 16;
  constexpr uint32_t FRACTAL = FRACTAL_BYTES / sizeof(T);
  const LoadData2dTransposeParams p = params;
  check_load(API, dst, src);
  HOST_CHECK(p.addrMode == 0, "%s: addrMode %u; the model has 0", API, p.addrMode);
  if (p.repeatTimes == 0) return;
  const uint64_t step = (1ull + p.dstGap) * FRACTAL;
  const uint64_t second = (1ull + p.dstFracGap) * FRACTAL;
  const uint64_t end = (p.repeatTimes - 1) * step + (PARTS - 1) * second + FRACTAL;
  T* to = dst.pointer(API, end, FRACTAL_BYTES);
  const uint64_t last = p.startIndex + uint64_t{p.repeatTimes - 1u} * p.srcStride;
  const T* from = src.pointer(API, (last + 1) * SQUARE);
  Accesses accesses{src.access(uint64_t{p.startIndex} * SQUARE, SQUARE, false)};
  accesses[0].count = p.repeatTimes;
  accesses[0].stride = uint64_t{p.srcStride} * SQUARE * sizeof(T);
  for (uint32_t i = 0; i < p.repeatTimes; ++i) {
    for (uint32_t k = 0; k < i; ++k) {
      HOST_CHECK(PARTS == 1 || (i - k) * step != second,
                 "%s: the second fractal of square %u (dstFracGap %u) lies where square %u begins "
                 "(dstGap %u)",
                 API, k, p.dstFracGap, i, p.dstGap);
    }
  }
  for (uint32_t part = 0; part < PARTS; ++part) {
    accesses.push_back(dst.byte_access(part * second * sizeof(T), FRACTAL_BYTES, true,
                                       p.repeatTimes, step * sizeof(T)));
  }
  issue_fractals(
      API,
      [=] {
        for (uint32_t i = 0; i < p.repeatTimes; ++i) {
          transpose_square(to + i * step,
                           from + (p.startIndex + uint64_t{i} * p.srcStride) * SQUARE, SIDE,
                           second);
        }
      },
      std::move(accesses), uint64_t{p.repeatTimes} * PARTS, dst.memory());
}

}  // namespace AscendC

namespace ascendc_host {

template <class C, class A, class B>
constexpr bool mmad_types =
    (is_one_of<A, int8_t> && is_one_of<B, int8_t> && is_one_of<C, int32_t>) ||
    (is_one_of<A, half, bfloat16_t, float> && std::is_same_v<A, B> && is_one_of<C, float>);

}  // namespace ascendc_host

namespace AscendC {

/// L0C = L0A * L0B, or added to L0C. Rows and columns beyond m and n are computed from what lies
/// there and must not be used.
template <class C, class A, class B>
void Mmad(const LocalTensor<C>& dst, const LocalTensor<A>& fm, const LocalTensor<B>& filter,
          const MmadParams& params) {
  using namespace ascendc_host;
  static_assert(mmad_types<C, A, B>,
                "Mmad: int8_t x int8_t to int32_t, or half, bfloat16_t or float to float");
  constexpr const char* API = "Mmad";
  constexpr uint32_t C0 = block_elements<A>;
  HOST_CHECK(
      dst.memory() == Memory::L0C && fm.memory() == Memory::L0A && filter.memory() == Memory::L0B,
      "Mmad: L0A (A2) * L0B (B2) to L0C (CO1), not %s * %s to %s", fm.memory_name(),
      filter.memory_name(), dst.memory_name());
  HOST_CHECK(params.m <= 4095 && params.n <= 4095 && params.k <= 4095,
             "Mmad: m %u, n %u, k %u; each is at most 4095", params.m, params.n, params.k);
  HOST_CHECK(params.m != 1, "Mmad: m 1 is the GEMV mode with another layout of A, not modelled");
  HOST_CHECK(!params.cmatrixSource && !params.isBias && params.unitFlag == 0,
             "Mmad: bias and unitFlag are not modelled");
  if (params.m == 0 || params.n == 0 || params.k == 0) return;
  const MmadShape shape{params.m,
                        params.n,
                        params.k,
                        (params.m + 15u) / 16,
                        (params.n + 15u) / 16,
                        (params.k + C0 - 1) / C0,
                        params.cmatrixInitVal};
  const uint64_t a_size = uint64_t{shape.m1} * shape.k1 * 16 * C0;
  const uint64_t b_size = uint64_t{shape.n1} * shape.k1 * 16 * C0;
  const uint64_t c_size = uint64_t{shape.m1} * shape.n1 * 256;
  const A* a = fm.pointer(API, a_size, FRACTAL_BYTES);
  const B* b = filter.pointer(API, b_size, FRACTAL_BYTES);
  C* c = dst.pointer(API, c_size, 2 * FRACTAL_BYTES);
  Instruction instruction;
  instruction.api = API;
  instruction.accesses = {fm.access(0, a_size, false), filter.access(0, b_size, false),
                          dst.access(0, c_size, true)};
  // Documented: below ten fractals of C the next Mmad may read them before they are written.
  instruction.accesses[2].self_ordered = (params.m / 16u) * (params.n / 16u) >= 10;
  const uint64_t steps = uint64_t{shape.m1} * shape.n1 * shape.k1 * (sizeof(A) == 4 ? 2 : 1);
  instruction.cycles = CUBE_START_CYCLES + steps / CUBE_STEPS_PER_CYCLE;
  instruction.work = [=] { multiply(c, a, b, shape); };
  core().issue(PIPE_M, std::move(instruction));
}

}  // namespace AscendC

namespace ascendc_host {

/// An element of L0C as it leaves through Fixpipe.
template <class T, class U>
T fixpipe_element(U value, bool relu, float scale) {
  if (relu && value < U{0}) value = U{0};
  if constexpr (std::is_same_v<T, U>) {
    return value;
  } else if constexpr (is_one_of<U, int32_t>) {
    return static_cast<half>(static_cast<float>(value) * scale);
  } else {
    return from_float<T>(value);
  }
}

/// The conversion that types T (in GM) and U (in L0C) ask for.
template <class T, class U>
constexpr QuantMode_t fixpipe_mode() {
  static_assert(is_one_of<U, float, int32_t>, "Fixpipe: L0C holds float or int32_t");
  static_assert(std::is_same_v<T, U> || (is_one_of<U, float> && is_one_of<T, half, bfloat16_t>) ||
                    (is_one_of<U, int32_t> && is_one_of<T, half>),
                "Fixpipe: to the same type, float to half or bfloat16_t, or int32_t to half");
  if (std::is_same_v<T, U>) return NoQuant;
  if (is_one_of<U, int32_t>) return DEQF16;
  return is_one_of<T, half> ? F322F16 : F322BF16;
}

inline void check_fixpipe(const AscendC::FixpipeParamsV220& p, QuantMode_t mode) {
  HOST_CHECK(p.quantPre == mode, "Fixpipe: quantPre %d does not fit the types; it must be %d",
             static_cast<int>(p.quantPre), static_cast<int>(mode));
  HOST_CHECK(p.ndNum == 1 && p.unitFlag == 0 && !p.isChannelSplit,
             "Fixpipe: ndNum %u, unitFlag %u, isChannelSplit; the model has 1, 0, false", p.ndNum,
             p.unitFlag);
  HOST_CHECK(p.nSize >= 1 && p.nSize <= 4095 && p.mSize >= 1 && p.mSize <= 8192,
             "Fixpipe: nSize %u is not in 1..4095 or mSize %u is not in 1..8192", p.nSize, p.mSize);
  HOST_CHECK(p.dstStride >= p.nSize || p.mSize == 1, "Fixpipe: dstStride %u is less than nSize %u",
             p.dstStride, p.nSize);
  HOST_CHECK(p.nSize <= 16 || p.srcStride >= p.mSize,
             "Fixpipe: srcStride %u is less than mSize %u: columns of fractals would overlap",
             p.srcStride, p.mSize);
}

/// Stores rows of what lies in columns of fractals, added to GM if `atomic`.
template <class T, class U>
void store_rows(T* to, const U* from, const AscendC::FixpipeParamsV220& p, bool atomic) {
  float scale;
  const auto scale_bits = static_cast<uint32_t>(p.deqScalar);
  std::memcpy(&scale, &scale_bits, sizeof scale);
  for (uint32_t row = 0; row < p.mSize; ++row) {
    for (uint32_t column = 0; column < p.nSize; ++column) {
      const U value = from[(uint64_t{column / 16} * p.srcStride + row) * 16 + column % 16];
      T& target = to[uint64_t{row} * p.dstStride + column];
      const T result = fixpipe_element<T>(value, p.reluEn, scale);
      if (!atomic) {
        target = result;
      } else if constexpr (is_one_of<T, int32_t>) {
        target = target + result;
      } else {
        target = from_float<T>(to_float(target) + to_float(result));
      }
    }
  }
}

}  // namespace ascendc_host

namespace AscendC {

/// L0C (Nz) to GM (ND), row by row.
template <class T, class U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src,
             const FixpipeParamsV220& params) {
  using namespace ascendc_host;
  static_assert(config.format == CO2Layout::ROW_MAJOR, "Fixpipe: the model writes row major (ND)");
  constexpr const char* API = "Fixpipe";
  const FixpipeParamsV220 p = params;
  HOST_CHECK(src.memory() == Memory::L0C, "Fixpipe: the source is L0C (CO1), not %s",
             src.memory_name());
  check_fixpipe(p, fixpipe_mode<T, U>());
  check_gm_alignment(dst, API);
  const int atomic = core().atomic_type;
  HOST_CHECK(atomic == 0 || atomic == atomic_code<T>,
             "Fixpipe: SetAtomicAdd was called for another data type than the tensor's");
  const uint32_t columns = (p.nSize + 15u) / 16;
  const U* from =
      src.pointer(API, (uint64_t{columns - 1} * p.srcStride + p.mSize) * 16, 2 * FRACTAL_BYTES);
  dst.require(uint64_t{p.mSize - 1u} * p.dstStride + p.nSize, API);
  T* to = dst.GetPhyAddr();
  Instruction instruction;
  instruction.api = API;
  instruction.accesses = {
      src.access(0, uint64_t{p.mSize} * 16, false),
      dst.byte_access(0, p.nSize * sizeof(T), true, p.mSize, uint64_t{p.dstStride} * sizeof(T))};
  instruction.accesses[0].count = columns;
  instruction.accesses[0].stride = uint64_t{p.srcStride} * 16 * sizeof(U);
  instruction.cycles =
      COPY_START_CYCLES + uint64_t{p.mSize} * p.nSize * sizeof(T) / FIX_BYTES_PER_CYCLE;
  instruction.work = [=] { store_rows(to, from, p, atomic != 0); };
  core().issue(PIPE_FIX, std::move(instruction));
}

}  // namespace AscendC
