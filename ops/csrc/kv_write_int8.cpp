// New keys and values into int8 pages, quantised on the way: one pass over K and V.
#include "kv_write_int8.h"

#include <algorithm>

#include "quantise.h"
#include "rotate.h"

namespace ascend {
namespace {

struct Counts {
  int64_t values[ASCEND_COUNTERS] = {};
};

// Where K or V comes from, and where it goes to inside a run.
struct Stream {
  const char *data;
  int64_t token_bytes, head_bytes;
  int64_t offset, scales_offset, patches_offset;
  const float *channel_scales;  // [num_kv_heads][head_dim] or null
  float threshold;
};

// The static scales of a kv head and their inverses.
struct Channels {
  const float *scales;
  alignas(64) float inverses[kMaxHeadDim];
};

// How many tokens ahead the source is fetched: a row takes too many instructions for the processor
// to reach the next ones by itself, and rows of a head lie too far apart for its prefetchers.
constexpr int kTokensAhead = 8;

template <class From>
ASCEND_INLINE void widen_values(const char *source, int dim, float *out) {
  const auto *from = (const typename From::Storage *)source;
  for (int d = 0; d < dim; d += kLanes) {
    if constexpr (sizeof(*from) == 2) {
      store(out + d, From::widen(load<Vh>(from + d)));
    } else {
      store(out + d, load<Vf>(from + d));
    }
  }
}

class Writer {
 public:
  explicit Writer(const ascend_write_args &args)
      : args_(args),
        planes_((args.pages.head_dim + 31) / 32),
        plane_bytes_((int64_t)args.pages.block_size * kRowBytes) {
    const ascend_pages &p = args.pages;
    const int64_t itemsize = args.dtype == ASCEND_FLOAT32 ? 4 : 2;
    const float *scales = args.channel_scales;
    streams_[0] = {(const char *)args.key,
                   args.key_token_stride * itemsize,
                   args.key_head_stride * itemsize,
                   p.k_offset,
                   p.k_scales_offset,
                   p.k_patches_offset,
                   scales,
                   args.patch_thresholds[0]};
    streams_[1] = {(const char *)args.value,
                   args.value_token_stride * itemsize,
                   args.value_head_stride * itemsize,
                   p.v_offset,
                   p.v_scales_offset,
                   p.v_patches_offset,
                   scales ? scales + (int64_t)p.num_kv_heads * p.head_dim : nullptr,
                   args.patch_thresholds[1]};
  }

  // Tokens [from, to) of a head whose block is `part` modulo `parts`.
  template <class From>
  void write(int64_t from, int64_t to, int head, int64_t part, int64_t parts,
             Counts &counts) const {
    const ascend_pages &p = args_.pages;
    Channels channels[2];
    if (args_.channel_scales) prepare(head, channels);
    for (int64_t t = from; t < to;) {
      const int64_t slot = args_.slot_mapping[t];
      const int64_t block = slot / p.block_size;
      if (slot < 0 || (parts > 1 && block % parts != part)) {
        ++t;
        continue;
      }
      char *run = (char *)p.data + block * p.block_stride + head * p.head_stride;
      const int token = (int)(slot - block * p.block_size);
      // Two tokens fill the cache lines of a page, so they are written one right after the other:
      // the planes often fall into the same cache sets, and half a line would not stay. block_size
      // is even, so an even slot's successor is in the same block.
      const int count =
          slot % 2 == 0 && t + 1 < to && args_.slot_mapping[t + 1] == slot + 1 ? 2 : 1;
      for (int i = 0; i < 2; ++i) {
        const Stream &stream = streams_[i];
        const char *source = stream.data + t * stream.token_bytes + head * stream.head_bytes;
        for (int n = 0; n < count; ++n, source += stream.token_bytes) {
          const char *ahead = source + kTokensAhead * stream.token_bytes;
          for (int b = 0; b < p.head_dim * (int)sizeof(typename From::Storage); b += 64) {
            __builtin_prefetch(ahead + b);
          }
          write_row<From>(stream, channels[i], source, run, token + n, counts);
        }
      }
      t += count;
    }
  }

 private:
  void prepare(int head, Channels *channels) const {
    const int dim = args_.pages.head_dim;
    for (int i = 0; i < 2; ++i) {
      channels[i].scales = streams_[i].channel_scales + (int64_t)head * dim;
      for (int d = 0; d < dim; ++d) channels[i].inverses[d] = 1.0f / channels[i].scales[d];
    }
  }

  template <class From>
  ASCEND_INLINE void write_row(const Stream &stream, const Channels &channels, const char *source,
                               char *run, int token, Counts &counts) const {
    const ascend_pages &p = args_.pages;
    alignas(64) float row[kMaxHeadDim];
    widen_values<From>(source, p.head_dim, row);
    const Codes codes{run + stream.offset + token * kRowBytes, plane_bytes_};
    ++counts.values[ASCEND_ROWS_WRITTEN];
    if (p.quantisation == ASCEND_C8D) {
      if (&stream == streams_) rotate_row(p.head_dim, row);  // K alone
      const float scale = quantise_dynamic(p.head_dim, row, codes);
      memcpy(run + stream.scales_offset + token * sizeof(float), &scale, sizeof scale);
      return;
    }
    const float *scales = channels.scales, *inverses = channels.inverses;
    bool saturated;
    if (p.quantisation == ASCEND_C8S) {
      saturated = quantise_static<false>(p.head_dim, row, scales, inverses, codes, nullptr);
    } else {
      Loss loss;
      saturated = quantise_static<true>(p.head_dim, row, scales, inverses, codes, &loss);
      const bool outlier = loss.error > stream.threshold * stream.threshold * loss.norm;
      patch(stream, channels, row, codes, run + stream.patches_offset, token, outlier, counts);
    }
    counts.values[ASCEND_ROWS_SATURATED] += saturated;
  }

  // Tokens of a block are written in order: a tag of a later token than this one is left over from
  // a rejected draft or from another use of the block, an earlier one is in force.
  void patch(const Stream &stream, const Channels &channels, const float *row, const Codes &codes,
             char *pool, int token, bool outlier, Counts &counts) const {
    const ascend_pages &p = args_.pages;
    const int slots = p.patch_slots, slot = token % slots;
    char *tag_at = pool + slot * sizeof(int16_t);
    const int tag = load<int16_t>(tag_at);
    const bool taken = tag <= token && tag_fits(tag, slot, slots, p.block_size);
    if (taken) {
      counts.values[ASCEND_PATCHES_DROPPED] += outlier;
      return;
    }
    const int16_t mine = outlier ? (int16_t)(token + 1) : 0;
    memcpy(tag_at, &mine, sizeof mine);
    if (!outlier) return;
    ++counts.values[ASCEND_ROWS_PATCHED];
    char *scale_at = pool + slots * sizeof(int16_t) + slot * sizeof(float);
    uint8_t nibbles[kMaxHeadDim / 2] = {};
    const float scale =
        encode_patch(p.head_dim, p.patch_code, row, channels.inverses, codes, nibbles);
    memcpy(scale_at, &scale, sizeof scale);
    memcpy(pool + slots * (sizeof(int16_t) + sizeof(float)) + slot * planes_ * 16, nibbles,
           planes_ * 16);
  }

  const ascend_write_args &args_;
  int planes_;
  int64_t plane_bytes_;
  Stream streams_[2];
};

using WriteFunction = void (Writer::*)(int64_t, int64_t, int, int64_t, int64_t, Counts &) const;

WriteFunction choose(int dtype) {
  if (dtype == ASCEND_FLOAT32) return &Writer::write<Float32>;
  if (dtype == ASCEND_FLOAT16) return &Writer::write<Float16>;
  if (dtype == ASCEND_BFLOAT16) return &Writer::write<Bfloat16>;
  return nullptr;
}

bool supported(const ascend_pages &p, const float *channel_scales) {
  if (p.quantisation == ASCEND_C8D) return !channel_scales;
  if (p.quantisation == ASCEND_C8S) return channel_scales;
  return p.quantisation == ASCEND_C8P && channel_scales && p.patch_slots > 0 &&
         p.patch_slots <= kMaxPatchSlots && p.patch_code >= 0 && p.patch_code <= ASCEND_E3M0;
}

void add_counts(const Counts &counts, int64_t *total) {
  if (!total) return;
  for (int i = 0; i < ASCEND_COUNTERS; ++i) {
    __atomic_fetch_add(total + i, counts.values[i], __ATOMIC_RELAXED);
  }
}

}  // namespace

int write_int8(const ascend_write_args &args, int64_t chunk_tokens, bool serial) {
  const ascend_pages &p = args.pages;
  const WriteFunction write = choose(args.dtype);
  if (!write || !supported(p, args.channel_scales)) return ASCEND_UNSUPPORTED;
  const Writer writer(args);
  const int64_t tokens = args.num_tokens, chunks = (tokens + chunk_tokens - 1) / chunk_tokens;
  // Tokens of a block share its pool of patches and their order matters: threads divide blocks.
  const bool by_block = p.quantisation == ASCEND_C8P && !serial;
  // Part after part, all heads of one: they lie side by side in the source.
  const auto item = [&](int64_t i) {
    const int64_t part = i / p.num_kv_heads;
    const int64_t from = by_block ? 0 : part * chunk_tokens;
    const int64_t to = by_block ? tokens : std::min(tokens, from + chunk_tokens);
    Counts counts;
    (writer.*write)(from, to, (int)(i % p.num_kv_heads), part, by_block ? chunks : 1, counts);
    add_counts(counts, args.counters);
  };
  const int64_t items = chunks * p.num_kv_heads;
  if (serial) {
    for (int64_t i = 0; i < items; ++i) item(i);
    return ASCEND_OK;
  }
#pragma omp parallel for num_threads(args.num_threads) schedule(static)
  for (int64_t i = 0; i < items; ++i) item(i);
  return ASCEND_OK;
}

}  // namespace ascend
