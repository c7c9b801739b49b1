// ascend_cpu_mla_write: scatters new latents and rotary parts into pages, latents quantised on the
// way where pages are int8.
#include <algorithm>

#include "element.h"
#include "quantise.h"
#include "state.h"

namespace ascend {
namespace {

// Below this many tokens, waking other threads costs more than it saves.
constexpr int64_t kSerialTokens = 32;
constexpr int64_t kChunkTokens = 64;

// A row of floats into NZ: 32-byte pieces, a plane apart.
template <class To>
void store_row(const float *row, int columns, char *page, int64_t plane_bytes) {
  constexpr int kC0 = kColumns<To>;
  typename To::Storage piece[kC0];
  for (int d = 0; d < columns; d += kC0) {
    for (int c = 0; c < kC0; ++c) piece[c] = To::round(row[d + c]);
    memcpy(page + d / kC0 * plane_bytes, piece, kRowBytes);
  }
}

void store_values(int dtype, const float *row, int columns, char *page, int64_t plane_bytes) {
  if (dtype == ASCEND_FLOAT32) return store_row<Float32>(row, columns, page, plane_bytes);
  if (dtype == ASCEND_FLOAT16) return store_row<Float16>(row, columns, page, plane_bytes);
  store_row<Bfloat16>(row, columns, page, plane_bytes);
}

struct Inverses {
  alignas(64) float values[kMaxLatentDim];
};

class LatentWriter {
 public:
  explicit LatentWriter(const ascend_mla_write_args &args)
      : args_(args), plane_bytes_((int64_t)args.pages.block_size * kRowBytes) {
    if (!args.channel_scales) return;
    for (int d = 0; d < args.pages.latent_dim; ++d) {
      inverses_.values[d] = 1.0f / args.channel_scales[d];
    }
  }

  // Adds to rows written and rows saturated.
  void write(int64_t from, int64_t to, int64_t counts[2]) const {
    for (int64_t t = from; t < to; ++t) {
      if (args_.slot_mapping[t] < 0) continue;
      ++counts[0];
      counts[1] += write_token(t);
    }
  }

 private:
  // Whether the row left the range of static scales.
  bool write_token(int64_t token) const {
    const ascend_latent_pages &p = args_.pages;
    const int64_t slot = args_.slot_mapping[token], offset = slot % p.block_size;
    char *page = (char *)p.data + slot / p.block_size * p.block_stride;
    Vf vectors[kMaxLatentDim / kLanes];
    float *row = (float *)vectors;
    widen_row(args_.dtype, args_.rotary, token * args_.rotary_token_stride, p.rotary_dim, row);
    const int rotary_dtype = p.dtype == ASCEND_INT8 ? (int)ASCEND_BFLOAT16 : p.dtype;
    store_values(rotary_dtype, row, p.rotary_dim, page + p.rotary_offset + offset * kRowBytes,
                 plane_bytes_);
    widen_row(args_.dtype, args_.latents, token * args_.latent_token_stride, p.latent_dim, row);
    char *at = page + offset * kRowBytes;
    if (p.dtype != ASCEND_INT8) {
      store_values(p.dtype, row, p.latent_dim, at, plane_bytes_);
      return false;
    }
    return quantise(vectors, page, (int)offset, {at, plane_bytes_});
  }

  bool quantise(Vf *row, char *page, int offset, const Codes &codes) const {
    const ascend_latent_pages &p = args_.pages;
    const int vectors = p.latent_dim / kLanes;
    if (p.quantisation == ASCEND_C8S) {
      return left_range(
          greatest_lane(quantise_static<true>(row, vectors, inverses_.values, codes)))[0];
    }
    const float scale = dynamic_scale(greatest_lane(magnitudes(row, vectors)))[0];
    quantise_dynamic(row, vectors, inverse_of(scale), codes);
    memcpy(page + p.scales_offset + offset * sizeof(float), &scale, sizeof scale);
    return false;
  }

  const ascend_mla_write_args &args_;
  const int64_t plane_bytes_;
  Inverses inverses_;
};

bool slots_valid(const ascend_mla_write_args &a) {
  const int64_t limit = a.pages.num_blocks * a.pages.block_size;
  bool valid = true;
  for (int64_t t = 0; t < a.num_tokens; ++t) valid &= a.slot_mapping[t] < limit;
  return valid;
}

bool supported(const ascend_mla_write_args &a) {
  const ascend_latent_pages &p = a.pages;
  const auto takes = [](int n, int limit) { return n > 0 && n % 16 == 0 && n <= limit; };
  if (!takes(p.latent_dim, kMaxLatentDim) || !takes(p.rotary_dim, kMaxRotaryDim) ||
      !takes(p.block_size, 256) || a.dtype < 0 || a.dtype > ASCEND_BFLOAT16 || p.dtype < 0) {
    return false;
  }
  if (p.dtype != ASCEND_INT8) {
    return p.dtype < ASCEND_INT8 && p.quantisation == ASCEND_UNQUANTISED && !a.channel_scales;
  }
  return p.quantisation == (a.channel_scales ? ASCEND_C8S : ASCEND_C8D);
}

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_mla_write(const ascend_mla_write_args *args) {
  using namespace ascend;
  const ascend_mla_write_args &a = *args;
  if (!supported(a)) return ASCEND_UNSUPPORTED;
  if (!slots_valid(a)) return ASCEND_BAD_SLOT;
  const LatentWriter writer(a);
  const int64_t chunks = (a.num_tokens + kChunkTokens - 1) / kChunkTokens;
  int64_t written = 0, saturated = 0;
  const bool serial = a.num_threads <= 1 || a.num_tokens <= kSerialTokens;
#pragma omp parallel for num_threads(a.num_threads) if (!serial) reduction(+ : written, saturated)
  for (int64_t i = 0; i < chunks; ++i) {
    int64_t counts[2] = {};
    writer.write(i * kChunkTokens, std::min(a.num_tokens, (i + 1) * kChunkTokens), counts);
    written += counts[0];
    saturated += counts[1];
  }
  if (a.counters && a.pages.dtype == ASCEND_INT8) {
    __atomic_fetch_add(a.counters + ASCEND_ROWS_WRITTEN, written, __ATOMIC_RELAXED);
    __atomic_fetch_add(a.counters + ASCEND_ROWS_SATURATED, saturated, __ATOMIC_RELAXED);
  }
  return ASCEND_OK;
}
