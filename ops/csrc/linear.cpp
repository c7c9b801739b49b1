// ascend_cpu_linear: rows times packed 4- or 8-bit weights. Panels of the activations are made
// once, then threads take chunks of columns for bands of panels.
#include <algorithm>

#include "linear_bf16.h"
#include "linear_float.h"
#include "linear_threads.h"

namespace ascend {
namespace {

using BlockFunction = void (*)(const BlockWork &, const void *, const float *, float *);
using TileFunction = void (*)(const char *, int64_t, void *);

constexpr int kMaxSizes = 8;
constexpr int kRowsAtOnce = 768;     // terms of rows whose panels exist at the same time
constexpr int64_t kTileDepth = 512;  // k of a tile
constexpr int64_t kSliceDepth = 512;
constexpr int64_t kTileBlocks = 4;  // blocks of columns that a panel is read once for
constexpr int64_t kMaxChunk = 8;    // blocks of columns that a thread takes at once
constexpr int64_t kBandRows = 96;   // of a thread's own, or more: all weights are read for them

// Micro-kernels of one source of weights, by the rows they take.
struct Blocks {
  BlockFunction by_rows[kMaxSizes];
};

#if defined(__AVX512BF16__)
using Activations = Bf16Panel;
constexpr int kSizes[] = {12, 8, 6, 4, 3, 2, 1};
template <class Source>
constexpr Blocks kBlocks = {{bf16_block<Source, 12>, bf16_block<Source, 8>, bf16_block<Source, 6>,
                             bf16_block<Source, 4>, bf16_block<Source, 3>, bf16_block<Source, 2>,
                             bf16_block<Source, 1>}};
using Tile = TilePairs;
// A table turns 4-bit weights into bfloat16 faster than a tile of them is read (measured).
constexpr TileFunction kTile4 = nullptr, kTile8 = bf16_tile<BytePairs>;
constexpr const Blocks &kDirect4 = kBlocks<NibblePairs>, &kDirect8 = kBlocks<BytePairs>;
int terms_of(int dtype) { return bf16_terms(dtype); }
#else
using Activations = FloatPanel;
constexpr int kSizes[] = {4, 2, 1};
template <class Source>
constexpr Blocks kBlocks = {
    {float_block<Source, 4>, float_block<Source, 2>, float_block<Source, 1>}};
using Tile = TileFloats;
constexpr TileFunction kTile4 = float_tile<NibbleFloats>, kTile8 = float_tile<ByteFloats>;
constexpr const Blocks &kDirect4 = kBlocks<NibbleFloats>, &kDirect8 = kBlocks<ByteFloats>;
int terms_of(int) { return 1; }
#endif
constexpr int kSizeCount = sizeof kSizes / sizeof *kSizes;
// From so many rows on, weights are widened into a tile once instead of by every panel (measured).
constexpr int kTileRows = 96;

BlockFunction find(const Blocks &blocks, int rows) {
  return blocks.by_rows[std::find(kSizes, kSizes + kSizeCount, rows) - kSizes];
}

struct ThreadScratch {
  Scratch tile, totals;
};

ThreadScratch &thread_scratch() {
  static thread_local ThreadScratch scratch;
  return scratch;
}

// The product for rows whose panels exist at the same time.
class Product {
 public:
  using Element = Activations::Element;

  Product(const ascend_linear_args &args, int first_row, int rows)
      : a_(args),
        first_row_(first_row),
        rows_(rows),
        terms_(terms_of(args.dtype)),
        word_(args.bits == 4 ? 8 : 4),
        padded_k_((args.k + word_ - 1) / word_ * word_),
        group_(args.group >= args.k ? padded_k_ : args.group),
        groups_((args.k + group_ - 1) / group_),
        blocks_((args.n + kBlockColumns - 1) / kBlockColumns),
        panels_(make_panels(rows * terms_, kSizes, kSizeCount, padded_k_)),
        tile_(rows * terms_ < kTileRows ? nullptr
              : args.bits == 4          ? kTile4
                                        : kTile8) {
    chunk_ = tile_ ? kTileBlocks
                   : std::max<int64_t>(
                         1, std::min<int64_t>(kMaxChunk, blocks_ / (args.num_threads * 6)));
    chunks_ = (blocks_ + chunk_ - 1) / chunk_;
    // Panels of several terms may end within a row.
    const int64_t bands = terms_ > 1 ? 1 : std::min<int64_t>(args.num_threads, rows / kBandRows);
    bands_ = std::max<int64_t>(1, bands);
  }

  void run() {
    static thread_local Scratch panel_scratch, sum_scratch;
    const Panel &last = panels_.back();
    padded_rows_ = last.first + last.rows;
    data_ = panel_scratch.get<Element>(padded_rows_ * padded_k_);
    sums_ = a_.zeros ? sum_scratch.get<float>(padded_rows_ * groups_) : nullptr;
    share(
        panels_, bands_ * chunks_, a_.num_threads, (int64_t)rows_ * a_.n * a_.k,
        [this](const Panel &panel) { fill(panel); },
        [this](int64_t part) { work(band_of(panels_, part / chunks_, bands_), part % chunks_); });
  }

 private:
  void fill(const Panel &panel) const {
    const int64_t itemsize = a_.dtype == ASCEND_FLOAT32 ? 4 : 2;
    const char *x = (const char *)a_.x + first_row_ * a_.x_stride * itemsize;
    Element *data = data_ + panel.offset;
    Activations::fill(panel, x, a_.dtype, a_.x_stride, rows_, a_.k, padded_k_, data);
    if (sums_) Activations::sum(panel, data, padded_k_, group_, sums_ + panel.first * groups_);
  }

  void work(const Band &band, int64_t chunk) const {
    ThreadScratch &scratch = thread_scratch();
    float *totals = scratch.totals.get<float>(kMaxChunk * padded_rows_ * kBlockColumns);
    const int64_t first = chunk * chunk_, last = std::min(blocks_, first + chunk_);
    for (int64_t block = first; block < last; ++block) {
      memset(of_block(totals, block - first) + band.first * kBlockColumns, 0,
             sizeof(float) * (band.last - band.first) * kBlockColumns);
    }
    if (tile_) {
      multiply_tiled(band, first, last, scratch, totals);
    } else {
      multiply(band, first, last, totals);
    }
    for (int64_t block = first; block < last; ++block) {
      finish(band, block, of_block(totals, block - first));
    }
  }

  float *of_block(float *totals, int64_t number) const {
    return totals + number * padded_rows_ * kBlockColumns;
  }

  BlockWork block_work(int64_t block, int64_t begin, int64_t end) const {
    const int64_t words = block * padded_k_ / word_ + begin / word_;
    const int64_t scale_size = a_.scale_dtype == ASCEND_FLOAT32 ? 4 : 2;
    const int64_t scale = block * groups_ * kBlockColumns;
    return {(const char *)a_.weights + words * 4 * kBlockColumns,
            (const char *)a_.scales + scale * scale_size,
            a_.zeros ? a_.zeros + scale : nullptr,
            a_.scale_dtype,
            group_,
            begin,
            end};
  }

  void multiply_panels(const Blocks &kernels, const Band &band, const BlockWork &work,
                       float *totals) const {
    for (const Panel *p = band.begin; p != band.end; ++p) {
      multiply_panel(kernels, work, *p, totals);
    }
  }

  void multiply_panel(const Blocks &kernels, const BlockWork &work, const Panel &panel,
                      float *totals) const {
    const float *sums = sums_ ? sums_ + panel.first * groups_ : nullptr;
    find(kernels, panel.rows)(work, data_ + panel.offset, sums,
                              totals + panel.first * kBlockColumns);
  }

  // Many rows: in slices of k, of which all panels stay in the second-level cache.
  void multiply(const Band &band, int64_t first, int64_t last, float *totals) const {
    const Blocks &kernels = a_.bits == 4 ? kDirect4 : kDirect8;
    const int64_t depth = panels_.size() > 1 ? kSliceDepth : padded_k_;
    for (int64_t k = 0; k < padded_k_; k += depth) {
      for (int64_t block = first; block < last; ++block) {
        multiply_panels(kernels, band, block_work(block, k, std::min(padded_k_, k + depth)),
                        of_block(totals, block - first));
      }
    }
  }

  void multiply_tiled(const Band &band, int64_t first, int64_t last, ThreadScratch &scratch,
                      float *totals) const {
    constexpr int64_t kBytes = sizeof(Element) * kBlockColumns;  // of a tile, per k
    char *tiles = scratch.tile.get<char>(kTileBlocks * kTileDepth * kBytes);
    for (int64_t k = 0; k < padded_k_; k += kTileDepth) {
      const int64_t end = std::min(padded_k_, k + kTileDepth);
      BlockWork works[kTileBlocks];
      for (int64_t i = 0; i < last - first; ++i) {
        char *tile = tiles + i * kTileDepth * kBytes;
        works[i] = block_work(first + i, k, end);
        tile_(works[i].weights, end - k, tile);
        works[i].weights = tile;
      }
      for (int64_t i = 0; i < last - first; ++i) {
        multiply_panels(kBlocks<Tile>, band, works[i], of_block(totals, i));
      }
    }
  }

  // Sums of a block's terms, with bias, in the type of the result.
  void finish(const Band &band, int64_t block, const float *totals) const {
    with_element(a_.dtype, [&](auto element) {
      using E = decltype(element);
      const int64_t column = block * kBlockColumns;
      const int64_t count = std::min<int64_t>(kBlockColumns, a_.n - column);
      alignas(64) float bias[kBlockColumns] = {};
      if (a_.bias) widen_row(a_.bias_dtype, a_.bias, column, (int)count, bias);
      const int64_t last = std::min<int64_t>(rows_, band.last / terms_);
      for (int64_t r = band.first / terms_; r < last; ++r) {
        const float *parts = totals + r * terms_ * kBlockColumns;
        const auto value = [&](int c) {
          Vf sum = load<Vf>(parts + c);
          for (int t = 1; t < terms_; ++t) sum += load<Vf>(parts + t * kBlockColumns + c);
          return sum + load<Vf>(bias + c);
        };
        auto *out = (typename E::Storage *)a_.out + (first_row_ + r) * a_.out_stride + column;
        store_columns<E>(value, count, out);
      }
    });
  }

  const ascend_linear_args &a_;
  const int64_t first_row_;
  const int rows_, terms_;
  const int64_t word_, padded_k_, group_, groups_, blocks_;
  const std::vector<Panel> panels_;
  const TileFunction tile_;  // or null
  int64_t chunk_, chunks_, bands_, padded_rows_ = 0;
  Element *data_ = nullptr;
  float *sums_ = nullptr;
};

bool supported(const ascend_linear_args &a) {
  const bool whole = a.group >= a.k || (a.group % 32 == 0 && a.group > 0 && a.k % a.group == 0);
  return (a.bits == 4 || a.bits == 8) && is_float(a.dtype) && is_float(a.scale_dtype) &&
         is_float(a.bias_dtype) && a.m >= 0 && a.n > 0 && a.k > 0 && whole;
}

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_linear(const ascend_linear_args *args) {
  using namespace ascend;
  if (!supported(*args)) return ASCEND_UNSUPPORTED;
  // Equal parts of whole panels.
  const int parts = (args->m * terms_of(args->dtype) + kRowsAtOnce - 1) / kRowsAtOnce;
  const int step = parts > 1 ? (args->m / parts + kSizes[0]) / kSizes[0] * kSizes[0] : args->m;
  for (int row = 0; row < args->m; row += step) {
    Product(*args, row, std::min(step, args->m - row)).run();
  }
  return ASCEND_OK;
}
