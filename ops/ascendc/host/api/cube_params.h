// Parameters of the cube core's instructions.
#pragma once

#include <cstdint>

namespace AscendC {

/// Matrices of `nValue` rows and `dValue` columns (elements) out of rows `srcDValue` elements
/// apart, into NZ: columns of 32 bytes, `dstNzC0Stride` x 32 bytes apart, rows `dstNzNStride` x 32
/// bytes.
struct Nd2NzParams {
  Nd2NzParams() = default;
  Nd2NzParams(uint16_t number, uint16_t rows, uint16_t columns, uint16_t matrix_stride,
              uint16_t row_stride, uint16_t column_step, uint16_t row_step, uint16_t matrix_step)
      : ndNum(number),
        nValue(rows),
        dValue(columns),
        srcNdMatrixStride(matrix_stride),
        srcDValue(row_stride),
        dstNzC0Stride(column_step),
        dstNzNStride(row_step),
        dstNzMatrixStride(matrix_step) {}

  uint16_t ndNum = 0;
  uint16_t nValue = 0;
  uint16_t dValue = 0;
  uint16_t srcNdMatrixStride = 0;  // elements
  uint16_t srcDValue = 0;
  uint16_t dstNzC0Stride = 0;
  uint16_t dstNzNStride = 0;
  uint16_t dstNzMatrixStride = 0;  // elements
};

/// `repeatTimes` fractals from `startIndex` on, `srcStride` fractals apart, stored with gaps of
/// `dstGap` fractals.
struct LoadData2DParams {
  LoadData2DParams() = default;
  LoadData2DParams(uint16_t start, uint8_t repeats, uint16_t source, uint8_t side, uint16_t gap,
                   bool transpose, uint8_t mode)
      : startIndex(start),
        dstGap(gap),
        srcStride(source),
        ifTranspose(transpose),
        repeatTimes(repeats),
        sid(side),
        addrMode(mode) {}

  uint16_t startIndex = 0;
  uint16_t dstGap = 0;
  uint16_t srcStride = 0;
  bool ifTranspose = false;
  uint8_t repeatTimes = 0;
  uint8_t sid = 0;
  uint8_t addrMode = 0;
};

/// Squares (8 bits: two fractals, 32x32; 16 bits: one, 16x16) to transpose; `srcStride` in squares,
/// `dstGap` and `dstFracGap` in fractals.
struct LoadData2dTransposeParams {
  LoadData2dTransposeParams() = default;
  LoadData2dTransposeParams(uint16_t start, uint8_t repeats, uint16_t source, uint16_t gap,
                            uint16_t fractal_gap, uint8_t mode = 0)
      : startIndex(start),
        repeatTimes(repeats),
        srcStride(source),
        dstGap(gap),
        dstFracGap(fractal_gap),
        addrMode(mode) {}

  uint16_t startIndex = 0;
  uint8_t repeatTimes = 0;
  uint16_t srcStride = 0;
  uint16_t dstGap = 0;
  uint16_t dstFracGap = 0;
  uint8_t addrMode = 0;
};

/// C (m x n) = A (m x k) * B (k x n), added to what C holds unless `cmatrixInitVal`.
struct MmadParams {
  MmadParams() = default;
  MmadParams(uint16_t rows, uint16_t columns, uint16_t depth, uint8_t unit_flag, bool source,
             bool initial)
      : m(rows),
        n(columns),
        k(depth),
        unitFlag(unit_flag),
        cmatrixSource(source),
        cmatrixInitVal(initial) {}

  uint16_t m = 0;
  uint16_t n = 0;
  uint16_t k = 0;
  bool isBias = false;
  uint8_t unitFlag = 0;
  bool kDirectionAlign = false;
  bool cmatrixSource = false;
  bool cmatrixInitVal = true;
};

}  // namespace AscendC

/// Conversions on the way out of L0C.
enum QuantMode_t { NoQuant = 0, F322F16 = 1, F322BF16 = 16, DEQF16 = 5 };

namespace AscendC {

enum class CO2Layout : uint8_t { NZ = 0, ROW_MAJOR, COLUMN_MAJOR };
struct FixpipeConfig {
  CO2Layout format;
};
constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

/// `mSize` x `nSize` elements; columns of fractals in L0C `srcStride` x 16 elements apart, rows in
/// GM `dstStride` elements apart.
struct FixpipeParamsV220 {
  FixpipeParamsV220() = default;
  FixpipeParamsV220(uint16_t columns, uint16_t rows, uint16_t source, uint32_t target, bool relu)
      : nSize(columns), mSize(rows), srcStride(source), dstStride(target), reluEn(relu) {}
  FixpipeParamsV220(uint16_t columns, uint16_t rows, uint16_t source, uint32_t target, bool relu,
                    QuantMode_t quant, int64_t scale, uint16_t number, uint16_t source_matrix,
                    uint16_t target_matrix, uint8_t unit_flag)
      : nSize(columns),
        mSize(rows),
        srcStride(source),
        dstStride(target),
        reluEn(relu),
        quantPre(quant),
        deqScalar(static_cast<uint64_t>(scale)),
        ndNum(number),
        srcNdStride(source_matrix),
        dstNdStride(target_matrix),
        unitFlag(unit_flag) {}

  uint16_t nSize = 0;
  uint16_t mSize = 0;
  uint16_t srcStride = 0;
  uint32_t dstStride = 0;
  bool reluEn = false;
  QuantMode_t quantPre = NoQuant;
  uint64_t deqScalar = 0;
  uint16_t ndNum = 1;
  uint16_t srcNdStride = 0;
  uint16_t dstNdStride = 0;
  uint8_t unitFlag = 0;
  bool isChannelSplit = false;
};

}  // namespace AscendC
