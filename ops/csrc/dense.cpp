// ascend_cpu_dense: rows times weights as the checkpoint holds them. Both operands are read along
// k, and a tile of their rows keeps its sums in registers until k ends.
#include <algorithm>
#include <atomic>

#include "dense_tile.h"
#include "linear_threads.h"

namespace ascend {
namespace {

constexpr int64_t kMaxChunk = 16;           // tiles that a thread takes at once
constexpr int64_t kChunksEach = 8;          // chunks of a thread, where there are enough tiles
constexpr int64_t kPanelBytes = 512 << 10;  // of x: stays in the second-level cache

// Rows of x that all weights are read once for.
template <class Lanes>
class DensePanel {
 public:
  DensePanel(const ascend_dense_args &args, int64_t first_row, int64_t rows)
      : a_(args),
        first_row_(first_row),
        rows_(rows),
        passes_((int)((rows + kTileRows - 1) / kTileRows)),
        chunk_(chunk_of(args)),
        chunks_((args.n + chunk_ - 1) / chunk_) {}

  void run() const {
    Numbers chunks(chunks_, a_.num_threads);
    const bool serial = a_.num_threads <= 1 || rows_ * a_.n * a_.k <= kSerialProducts;
#pragma omp parallel num_threads(a_.num_threads) if (!serial)
    take_chunks(Numbers::Taker(chunks, omp_get_thread_num()));
  }

 private:
  // Columns of a chunk: whole tiles.
  static int64_t chunk_of(const ascend_dense_args &a) {
    const int64_t tiles = (a.n + kTileColumns - 1) / kTileColumns;
    const int64_t wanted = tiles / (std::max(a.num_threads, 1) * kChunksEach);
    return std::max<int64_t>(1, std::min(kMaxChunk, wanted)) * kTileColumns;
  }

  // A chunk is claimed before the one in front of it is finished, so that its first weights can be
  // fetched meanwhile.
  void take_chunks(Numbers::Taker chunks) const {
    for (int64_t chunk = chunks.take(), following; chunk < chunks_; chunk = following) {
      following = chunks.take();
      const int64_t first = chunk * chunk_, last = std::min<int64_t>(a_.n, first + chunk_);
      for (int64_t column = first; column < last; column += kTileColumns) {
        const int64_t after = column + kTileColumns;
        multiply(column, after < last ? after : following * chunk_);
      }
    }
  }

  // All rows by the columns of a tile, while those from `following` on are fetched.
  void multiply(int64_t column, int64_t following) const {
    constexpr int64_t kBytes = sizeof(typename Lanes::Storage);
    const bool whole = column + kTileColumns <= a_.n;
    const bool fetch = following + kTileColumns <= a_.n;
    DenseTile tile{first_row_, column, fetch ? (following - column) * a_.weight_stride * kBytes : 0,
                   0, passes_};
    for (; tile.pass < passes_; ++tile.pass) {
      const int64_t end = first_row_ + rows_ * (tile.pass + 1) / passes_;
      if (whole) {
        kDenseTiles<Lanes, kTileColumns>.by_rows[end - tile.row - 1](a_, tile);
      } else {
        DenseTile single = tile;
        single.ahead = 0;
        for (; single.column < a_.n; ++single.column) {
          kDenseTiles<Lanes, 1>.by_rows[end - tile.row - 1](a_, single);
        }
      }
      tile.row = end;
    }
  }

  const ascend_dense_args &a_;
  const int64_t first_row_, rows_;
  const int passes_;  // over the weights of a tile
  const int64_t chunk_, chunks_;
};

template <class Lanes>
int dense(const ascend_dense_args &a) {
  const int64_t row_bytes = (int64_t)a.k * (int64_t)sizeof(typename Lanes::Storage);
  const int64_t most = std::max<int64_t>(2 * kTileRows, kPanelBytes / row_bytes);
  const int64_t panels = (a.m + most - 1) / most;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t first = a.m * i / panels, end = a.m * (i + 1) / panels;
    DensePanel<Lanes>(a, first, end - first).run();
  }
  return ASCEND_OK;
}

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_dense(const ascend_dense_args *args) {
  using namespace ascend;
  if (args->m < 0 || args->n < 0 || args->k <= 0) return ASCEND_UNSUPPORTED;
  switch (args->dtype) {
    case ASCEND_FLOAT32:
      return dense<WideLanes<Float32>>(*args);
    case ASCEND_FLOAT16:
      return dense<WideLanes<Float16>>(*args);
    case ASCEND_BFLOAT16:
      return dense<Bfloat16Lanes>(*args);
  }
  return ASCEND_UNSUPPORTED;
}
