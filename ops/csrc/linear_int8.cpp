// ascend_cpu_int8_linear: int8 rows times packed int8 weights.
#include "linear_int8.h"

#include "linear_threads.h"

namespace ascend {
namespace {

using BlockFunction = void (*)(const char *, const void *, int64_t, int32_t *);

#if defined(__AVX512F__)
constexpr int kSizes[] = {12, 8, 6, 4, 3, 2, 1};
constexpr BlockFunction kBlocks[] = {int8_block<12>, int8_block<8>, int8_block<6>, int8_block<4>,
                                     int8_block<3>,  int8_block<2>, int8_block<1>};
#else
constexpr int kSizes[] = {4, 2, 1};
constexpr BlockFunction kBlocks[] = {int8_block<4>, int8_block<2>, int8_block<1>};
#endif
constexpr int kSizeCount = sizeof kSizes / sizeof *kSizes;
constexpr int kRowsAtOnce = 768;
constexpr int64_t kSliceWords = 256;  // of k, that all panels are multiplied over before the next
constexpr int64_t kMaxChunk = 8;

class Int8Product {
 public:
  using Element = Int8Panel::Element;

  Int8Product(const ascend_int8_linear_args &args, int first_row, int rows)
      : a_(args),
        first_row_(first_row),
        rows_(rows),
        words_((args.k + 3) / 4),
        blocks_((args.n + kBlockColumns - 1) / kBlockColumns),
        chunk_(std::max<int64_t>(1, std::min(kMaxChunk, blocks_ / (args.num_threads * 6)))),
        panels_(make_panels(rows, kSizes, kSizeCount, words_ * Int8Products::kPerWord)) {}

  void run() {
    static thread_local Scratch panel_scratch;
    padded_rows_ = panels_.back().first + panels_.back().rows;
    data_ = panel_scratch.get<Element>(padded_rows_ * words_ * Int8Products::kPerWord);
    share(
        panels_, (blocks_ + chunk_ - 1) / chunk_, a_.num_threads, (int64_t)rows_ * a_.n * a_.k,
        [this](const Panel &panel) {
          Int8Panel::fill(panel, a_.x + first_row_ * a_.x_stride, a_.x_stride, rows_, a_.k,
                          data_ + panel.offset);
        },
        [this](int64_t chunk) { work(chunk); });
  }

 private:
  void work(int64_t chunk) const {
    static thread_local Scratch scratch;
    const int64_t count = padded_rows_ * kBlockColumns;
    int32_t *totals = scratch.get<int32_t>(count);
    const int64_t last = std::min(blocks_, (chunk + 1) * chunk_);
    for (int64_t block = chunk * chunk_; block < last; ++block) {
      memset(totals, 0, sizeof(int32_t) * count);
      multiply((const char *)a_.weights + block * words_ * 4 * kBlockColumns, totals);
      finish(block, totals);
    }
  }

  void multiply(const char *weights, int32_t *totals) const {
    const int64_t depth = panels_.size() > 1 ? kSliceWords : words_;
    for (int64_t w = 0; w < words_; w += depth) {
      const int64_t count = std::min(depth, words_ - w);
      for (const Panel &panel : panels_) {
        const BlockFunction run =
            kBlocks[std::find(kSizes, kSizes + kSizeCount, panel.rows) - kSizes];
        run(weights + w * 4 * kBlockColumns,
            data_ + panel.offset + w * panel.rows * Int8Products::kPerWord, count,
            totals + panel.first * kBlockColumns);
      }
    }
  }

  void finish(int64_t block, const int32_t *totals) const {
    const int64_t column = block * kBlockColumns;
    const int count = (int)std::min<int64_t>(kBlockColumns, a_.n - column);
    alignas(64) float scale[kBlockColumns] = {}, bias[kBlockColumns] = {}, row[kBlockColumns];
    alignas(64) int32_t quant_bias[kBlockColumns] = {};
    memcpy(scale, a_.weight_scale + column, sizeof(float) * count);
    if (a_.bias) widen_row(a_.bias_dtype, a_.bias, column, count, bias);
    if (a_.quant_bias) memcpy(quant_bias, a_.quant_bias + column, sizeof(int32_t) * count);
    for (int r = 0; r < rows_; ++r) {
      const int64_t number = first_row_ + r;
      const float x_scale = a_.x_scale[a_.scale_per_row ? number : 0];
      int32_t zero = Int8Products::kShift;
      if (a_.x_zero) zero += a_.x_zero[a_.zero_per_row ? number : 0];
      for (int c = 0; c < kBlockColumns; c += kLanes) {
        const Vi sums = load<Vi>(a_.column_sums + column + c);
        const Vi exact = load<Vi>(totals + r * kBlockColumns + c) - sums * splat(zero) +
                         load<Vi>(quant_bias + c);
        const Vf value = __builtin_convertvector(exact, Vf) * (load<Vf>(scale + c) * x_scale);
        store(row + c, value + load<Vf>(bias + c));
      }
      round_row(a_.dtype, row, count, a_.out, number * a_.out_stride + column);
    }
  }

  const ascend_int8_linear_args &a_;
  const int first_row_, rows_;
  const int64_t words_, blocks_, chunk_;
  const std::vector<Panel> panels_;
  int64_t padded_rows_ = 0;
  Element *data_ = nullptr;
};

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_int8_linear(const ascend_int8_linear_args *args) {
  using namespace ascend;
  if (args->n <= 0 || args->k <= 0 || !is_float(args->dtype) || !is_float(args->bias_dtype)) {
    return ASCEND_UNSUPPORTED;
  }
  for (int row = 0; row < args->m; row += kRowsAtOnce) {
    Int8Product(*args, row, std::min(kRowsAtOnce, args->m - row)).run();
  }
  return ASCEND_OK;
}
