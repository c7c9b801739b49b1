// ascend_cpu_int8_linear: int8 rows times packed int8 weights.
#include "linear_int8.h"

#include "linear_threads.h"

namespace ascend {
namespace {

using BlockFunction = void (*)(const char *, const void *, int64_t, bool, int32_t *);

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
constexpr int64_t kSliceWords = 384;  // of k, that all panels are multiplied over before the next
constexpr int64_t kMaxChunk = 8;
// Of a thread: the last one that works leaves others without work for one part's time.
constexpr int64_t kParts = 96;
constexpr int64_t kPanelsOfBand = 6;     // or more
constexpr int64_t kBandBytes = 1 << 20;  // of panels, so that they stay in a thread's cache

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
        panels_(make_panels(rows, kSizes, kSizeCount, words_ * Int8Products::kPerWord)),
        bands_(bands_for(args.num_threads)) {}

  void run() {
    static thread_local Scratch panel_scratch;
    padded_rows_ = panels_.back().first + panels_.back().rows;
    data_ = panel_scratch.get<Element>(padded_rows_ * words_ * Int8Products::kPerWord);
    share(
        panels_, (blocks_ * bands_ + chunk_ - 1) / chunk_, a_.num_threads,
        (int64_t)rows_ * a_.n * a_.k,
        [this](const Panel &panel) {
          Int8Panel::fill(panel, a_.x + first_row_ * a_.x_stride, a_.x_stride, rows_, a_.k,
                          data_ + panel.offset);
        },
        [this](int64_t chunk) { work(chunk); });
  }

 private:
  // Bands of panels: as many for each thread, where there are enough.
  int64_t bands_for(int64_t threads) const {
    const int64_t parts = threads * kParts, bytes = panels_.back().offset * sizeof(Element);
    const int64_t wanted = std::max({threads, parts / blocks_, bytes / kBandBytes});
    const int64_t bands = std::min<int64_t>(wanted, panels_.size() / kPanelsOfBand);
    return bands > threads ? bands / threads * threads : std::max<int64_t>(1, bands);
  }

  static constexpr int kVectors = kBlockColumns / kLanes;

  // What turns the sums of a block's columns into results.
  struct Columns {
    int64_t first;
    int count;
    const int32_t *sums;  // of the weights
    Vi shift[kVectors] = {};
    Vf scale[kVectors] = {}, bias[kVectors] = {};
  };

  // A chunk of parts; a part is a block of columns and a band of panels, whose parts follow each
  // other. Each band begins with other columns: threads that fetch the same weights at once wait
  // for each other.
  void work(int64_t chunk) const {
    const int64_t last = std::min(blocks_ * bands_, (chunk + 1) * chunk_);
    for (int64_t part = chunk * chunk_; part < last; ++part) {
      const int64_t band = part / blocks_, block = (part + band * blocks_ / bands_) % blocks_;
      with_element(a_.dtype, [&](auto element) {
        multiply<decltype(element)>(block, band_of(panels_, band, bands_));
      });
    }
  }

  template <class E>
  void multiply(int64_t block, const Band &band) const {
    static thread_local Scratch scratch;
    int32_t *totals = scratch.get<int32_t>(padded_rows_ * kBlockColumns);
    const char *weights = (const char *)a_.weights + block * words_ * 4 * kBlockColumns;
    const Columns columns = columns_of(block);
    const int64_t depth = panels_.size() > 1 ? kSliceWords : words_;
    for (int64_t w = 0; w < words_; w += depth) {
      const int64_t count = std::min(depth, words_ - w);
      for (const Panel *p = band.begin; p != band.end; ++p) {
        const Panel &panel = *p;
        const BlockFunction run =
            kBlocks[std::find(kSizes, kSizes + kSizeCount, panel.rows) - kSizes];
        int32_t *sums = totals + panel.first * kBlockColumns;
        run(weights + w * 4 * kBlockColumns,
            data_ + panel.offset + w * panel.rows * Int8Products::kPerWord, count, w == 0, sums);
        // At once, while the sums are in the nearest cache.
        if (w + count == words_) finish<E>(panel, columns, sums);
      }
    }
  }

  Columns columns_of(int64_t block) const {
    Columns columns;
    columns.first = block * kBlockColumns;
    columns.count = (int)std::min<int64_t>(kBlockColumns, a_.n - columns.first);
    columns.sums = a_.column_sums + columns.first;
    memcpy(columns.scale, a_.weight_scale + columns.first, sizeof(float) * columns.count);
    if (a_.bias) {
      widen_row(a_.bias_dtype, a_.bias, columns.first, columns.count, (float *)columns.bias);
    }
    if (a_.quant_bias) {
      memcpy(columns.shift, a_.quant_bias + columns.first, sizeof(int32_t) * columns.count);
    }
    for (int v = 0; v < kVectors; ++v) {
      columns.shift[v] -= load<Vi>(columns.sums + v * kLanes) * splat(Int8Products::kShift);
    }
    return columns;
  }

  template <class E>
  void finish(const Panel &panel, const Columns &columns, const int32_t *totals) const {
    if (a_.x_zero) return finish_rows<E, true>(panel, columns, totals);
    finish_rows<E, false>(panel, columns, totals);
  }

  template <class E, bool kZeros>
  void finish_rows(const Panel &panel, const Columns &columns, const int32_t *totals) const {
    const Columns own = columns;  // stays in registers from row to row
    const int64_t first = first_row_ + panel.first;
    const int64_t scale_step = a_.scale_per_row != 0, zero_step = a_.zero_per_row != 0;
    auto *out = (typename E::Storage *)a_.out + first * a_.out_stride + columns.first;
    for (int r = 0; r < std::min(panel.rows, rows_ - panel.first); ++r) {
      const float x_scale = a_.x_scale[(first + r) * scale_step];
      const Vi zero = splat(kZeros ? a_.x_zero[(first + r) * zero_step] : 0);
      const auto value = [&](int c) {
        const int v = c / kLanes;
        Vi exact = load<Vi>(totals + c) + own.shift[v];
        if (kZeros) exact -= load<Vi>(own.sums + c) * zero;
        return __builtin_convertvector(exact, Vf) * (own.scale[v] * x_scale) + own.bias[v];
      };
      store_columns<E>(value, own.count, out);
      totals += kBlockColumns;
      out += a_.out_stride;
    }
  }

  const ascend_int8_linear_args &a_;
  const int first_row_, rows_;
  const int64_t words_, blocks_, chunk_;
  const std::vector<Panel> panels_;
  const int64_t bands_;
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
