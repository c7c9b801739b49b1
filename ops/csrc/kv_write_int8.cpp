// New keys and values into int8 pages, quantised on the way: one pass over K and V.
#include "kv_write_int8.h"

#include <algorithm>
#include <vector>

#include "block_groups.h"
#include "quantise.h"

namespace ascend {
namespace {

struct Counts {
  int64_t values[ASCEND_COUNTERS] = {};
};

// The static scales of K or V of a kv head.
struct Channels {
  const float *scales;
  alignas(64) float inverses[kMaxHeadDim];
  float error_bound;

  Channels(const float *scales, int dim)
      : scales(scales), error_bound(error_bound_of(scales, dim)) {
    for (int d = 0; d < dim; ++d) inverses[d] = 1.0f / scales[d];
  }
};

// A token of the call on its way into a run.
struct Place {
  int64_t token;
  int head;
  int offset;  // in the block
  char *run;
  Place after(int n) const { return {token + n, head, offset + n, run}; }
};

// Where K or V comes from, and where it goes to inside a run.
struct Stream {
  const char *data;
  int64_t token_bytes, head_bytes;
  int64_t offset, scales_offset, patches_offset;
  const Channels *channels;  // [num_kv_heads] or null
  float square_threshold;
  const char *row(const Place &place) const {
    return data + place.token * token_bytes + place.head * head_bytes;
  }
};

// What a call needs besides its arguments. Buffers only grow, so a steady state allocates nothing.
struct Scratch {
  std::vector<Channels> channels;
  BlockGroups groups;
};

// How many tokens ahead the source is fetched: a row takes too many instructions for the processor
// to reach the next ones by itself, and rows of a head lie too far apart for its prefetchers.
constexpr int kTokensAhead = 8;

class Writer {
 public:
  // `channels`: [K, V][num_kv_heads], null for C8D.
  Writer(const ascend_write_args &args, const Channels *channels)
      : args_(args), plane_bytes_((int64_t)args.pages.block_size * kRowBytes) {
    const ascend_pages &p = args.pages;
    const int64_t itemsize = args.dtype == ASCEND_FLOAT32 ? 4 : 2;
    streams_[0] = {(const char *)args.key,
                   args.key_token_stride * itemsize,
                   args.key_head_stride * itemsize,
                   p.k_offset,
                   p.k_scales_offset,
                   p.k_patches_offset,
                   channels,
                   args.patch_thresholds[0] * args.patch_thresholds[0]};
    streams_[1] = {(const char *)args.value,
                   args.value_token_stride * itemsize,
                   args.value_head_stride * itemsize,
                   p.v_offset,
                   p.v_scales_offset,
                   p.v_patches_offset,
                   channels ? channels + p.num_kv_heads : nullptr,
                   args.patch_thresholds[1] * args.patch_thresholds[1]};
  }

  // Tokens of a head.
  template <class From, int kDim, int kQuantisation>
  void write(Tokens tokens, int head, Counts &counts) const {
    Place places[kPlaces];
    for (int64_t t = tokens.begin; t < tokens.end;) {
      int count = 0;
      for (; t < tokens.end && count < kPlaces; ++t) {
        if (args_.slot_mapping[t] < 0) continue;
        const bool follows = count > 0 && follows_in_block(places[count - 1], t);
        places[count] = follows ? places[count - 1].after(1) : place_of(t, head);
        ++count;
      }
      counts.values[ASCEND_ROWS_WRITTEN] += 2 * count;
      if constexpr (kQuantisation == ASCEND_C8D) {
        write_dynamic_places<From, kDim>(places, count);
      } else {
        write_static_places<From, kDim, kQuantisation>(places, count, counts);
      }
    }
  }

 private:
  // Tokens whose places are looked up together.
  static constexpr int kPlaces = 16;

  Place place_of(int64_t token, int head) const {
    const ascend_pages &p = args_.pages;
    const int64_t slot = args_.slot_mapping[token], block = slot / p.block_size;
    return {token, head, (int)(slot - block * p.block_size),
            (char *)p.data + block * p.block_stride + head * p.head_stride};
  }

  // Whether a token's slot is the next one of a block: then nothing has to be divided.
  bool follows_in_block(const Place &place, int64_t token) const {
    return token == place.token + 1 && place.offset + 1 < args_.pages.block_size &&
           args_.slot_mapping[token] == args_.slot_mapping[place.token] + 1;
  }

  // Two tokens fill the cache lines of a page, so they are written one right after the other: the
  // planes often fall into the same cache sets, and half a line would not stay.
  static bool is_pair(const Place &first, const Place &second) {
    return first.run == second.run && first.offset % 2 == 0 && second.offset == first.offset + 1 &&
           second.token == first.token + 1;
  }

  template <class From, int kDim>
  void write_dynamic_places(const Place *places, int count) const {
    for (int i = 0; i < count;) {
      const bool pair = i + 1 < count && is_pair(places[i], places[i + 1]);
      if (pair) {
        write_dynamic<From, kDim, true, 2>(streams_[0], places[i]);
        write_dynamic<From, kDim, false, 2>(streams_[1], places[i]);
      } else {
        write_dynamic<From, kDim, true, 1>(streams_[0], places[i]);
        write_dynamic<From, kDim, false, 1>(streams_[1], places[i]);
      }
      i += pair ? 2 : 1;
    }
  }

  // Rows first, then tags: those are in memory, and a row that waited for its tag would keep the
  // next ones from being written meanwhile.
  template <class From, int kDim, int kQuantisation>
  void write_static_places(const Place *places, int count, Counts &counts) const {
    uint32_t suspects[2] = {};  // bit i: place i may be an outlier
    if constexpr (kQuantisation == ASCEND_C8P) {
      for (int i = 0; i < count; ++i) {
        for (const Stream &s : streams_) __builtin_prefetch(places[i].run + s.patches_offset, 1);
      }
    }
    for (int i = 0; i < count;) {
      const int together = i + 1 < count && is_pair(places[i], places[i + 1]) ? 2 : 1;
      // Two loops: one over both streams is slower (8 %).
      for (int s = 0; s < 2; ++s) {
        for (int n = i; n < i + together; ++n) {
          const bool suspect =
              write_static<From, kDim, kQuantisation>(streams_[s], places[n], counts);
          suspects[s] |= (uint32_t)suspect << n;
        }
      }
      i += together;
    }
    if constexpr (kQuantisation != ASCEND_C8P) return;
    for (int s = 0; s < 2; ++s) {
      for (int i = 0; i < count; ++i) {
        if (suspects[s] >> i & 1) {
          examine<From>(streams_[s], places[i], counts);
        } else {
          claim_slot(streams_[s], places[i], false, counts);
        }
      }
    }
  }

  // Where its scale is taken from a row lies a chain of dependent instructions: two rows are taken
  // step by step.
  template <class From, int kDim, bool kRotated, int kCount>
  ASCEND_INLINE void write_dynamic(const Stream &stream, const Place &place) const {
    const int dim = kDim ? kDim : args_.pages.head_dim, vectors = dim / kLanes;
    Vf rows[kCount][kMaxVectors<kDim>];
    Vi bits[kCount];
    float scales[kCount];
    ASCEND_UNROLL
    for (int n = 0; n < kCount; ++n) {
      read<From>(stream.row(place.after(n)), stream.token_bytes, vectors, rows[n]);
      if constexpr (kRotated && kDim != 0) rotate_row(rows[n]);
      if constexpr (kRotated && kDim == 0) rotate_row(dim, (float *)rows[n]);
      bits[n] = magnitudes(rows[n], vectors);
    }
    ASCEND_UNROLL
    for (int n = 0; n < kCount; ++n) scales[n] = dynamic_scale(greatest_lane(bits[n]));
    ASCEND_UNROLL
    for (int n = 0; n < kCount; ++n) {
      quantise_dynamic(rows[n], vectors, scales[n], codes(stream, place.after(n)));
    }
    memcpy(place.run + stream.scales_offset + place.offset * sizeof(float), scales, sizeof scales);
  }

  // C8P: returns whether the row may be an outlier. Most cannot, and only of the others is the
  // error computed.
  template <class From, int kDim, int kQuantisation>
  ASCEND_INLINE bool write_static(const Stream &stream, const Place &place, Counts &counts) const {
    const int vectors = (kDim ? kDim : args_.pages.head_dim) / kLanes;
    const Channels &channels = stream.channels[place.head];
    Vf row[kMaxVectors<kDim>];
    read<From>(stream.row(place), stream.token_bytes, vectors, row);
    float norm = 0.0f;
    if constexpr (kQuantisation == ASCEND_C8P) norm = square_sum(row, vectors);
    const bool left =
        left_range(quantise_static(row, vectors, channels.inverses, codes(stream, place)));
    counts.values[ASCEND_ROWS_SATURATED] += left;
    return kQuantisation == ASCEND_C8P &&
           (left || !(stream.square_threshold * norm >= channels.error_bound));
  }

  // And fetches the row that many tokens ahead.
  template <class From>
  static ASCEND_INLINE void read(const char *source, int64_t token_bytes, int vectors, Vf *row) {
    const char *ahead = source + kTokensAhead * token_bytes;
    const int row_bytes = vectors * kLanes * (int)sizeof(typename From::Storage);
    ASCEND_UNROLL
    for (int b = 0; b < row_bytes; b += 64) __builtin_prefetch(ahead + b);
    widen_vectors<From>(source, vectors, row);
  }

  Codes codes(const Stream &stream, const Place &place) const {
    return {place.run + stream.offset + place.offset * kRowBytes, plane_bytes_};
  }

  // Whether a row gets a patch; the tag of its slot then says so. Tokens of a block are written in
  // order: a tag of a later token than this one is left over from a rejected draft or from another
  // use of the block, an earlier one is in force.
  ASCEND_INLINE bool claim_slot(const Stream &stream, const Place &place, bool outlier,
                                Counts &counts) const {
    const ascend_pages &p = args_.pages;
    const int slots = p.patch_slots, slot = place.offset % slots;
    char *tag_at = place.run + stream.patches_offset + slot * sizeof(int16_t);
    const int tag = load<int16_t>(tag_at);
    if (tag <= place.offset && tag_fits(tag, slot, slots, p.block_size)) {
      counts.values[ASCEND_PATCHES_DROPPED] += outlier;
      return false;
    }
    const int16_t mine = outlier ? (int16_t)(place.offset + 1) : 0;
    memcpy(tag_at, &mine, sizeof mine);
    counts.values[ASCEND_ROWS_PATCHED] += outlier;
    return outlier;
  }

  // Gives a row its patch if it needs one. Reads it once more, so that others need not keep it.
  template <class From>
  __attribute__((noinline)) void examine(const Stream &stream, const Place &place,
                                         Counts &counts) const {
    const ascend_pages &p = args_.pages;
    const int vectors = p.head_dim / kLanes;
    const Channels &channels = stream.channels[place.head];
    Vf row[kMaxVectors<0>];
    widen_vectors<From>(stream.row(place), vectors, row);
    const Residual residual(row, vectors, channels.scales, channels.inverses);
    // A row that is not finite is no outlier: no patch can mend it.
    const bool outlier = residual.square_error > stream.square_threshold * residual.square_norm;
    if (!claim_slot(stream, place, outlier, counts)) return;
    const int slots = p.patch_slots, slot = place.offset % slots;
    const int code_bytes = (p.head_dim + 31) / 32 * 16;
    uint8_t nibbles[kMaxHeadDim / 2] = {};
    const float scale = encode_patch(p.head_dim, p.patch_code, residual, nibbles);
    char *scales = place.run + stream.patches_offset + slots * sizeof(int16_t);
    memcpy(scales + slot * sizeof(float), &scale, sizeof scale);
    memcpy(scales + slots * sizeof(float) + slot * code_bytes, nibbles, code_bytes);
  }

  const ascend_write_args &args_;
  int64_t plane_bytes_;
  Stream streams_[2];
};

using WriteFunction = void (Writer::*)(Tokens, int, Counts &) const;

template <class From, int kDim>
WriteFunction choose_quantisation(int quantisation) {
  if (quantisation == ASCEND_C8D) return &Writer::write<From, kDim, ASCEND_C8D>;
  if (quantisation == ASCEND_C8S) return &Writer::write<From, kDim, ASCEND_C8S>;
  return &Writer::write<From, kDim, ASCEND_C8P>;
}

template <class From>
WriteFunction choose_dim(const ascend_pages &p) {
  if constexpr (kRowsInRegisters) {
    if (p.head_dim == 128) return choose_quantisation<From, 128>(p.quantisation);
    if (p.head_dim == 64) return choose_quantisation<From, 64>(p.quantisation);
  }
  return choose_quantisation<From, 0>(p.quantisation);
}

WriteFunction choose(int dtype, const ascend_pages &p) {
  if (dtype == ASCEND_FLOAT32) return choose_dim<Float32>(p);
  if (dtype == ASCEND_FLOAT16) return choose_dim<Float16>(p);
  if (dtype == ASCEND_BFLOAT16) return choose_dim<Bfloat16>(p);
  return nullptr;
}

bool supported(const ascend_pages &p, const float *channel_scales) {
  if (p.quantisation == ASCEND_C8D) return !channel_scales;
  if (p.quantisation == ASCEND_C8S) return channel_scales;
  return p.quantisation == ASCEND_C8P && channel_scales && p.patch_slots > 0 &&
         p.patch_slots <= kMaxPatchSlots && p.patch_code >= 0 && p.patch_code <= ASCEND_E3M0;
}

// [K, V][num_kv_heads]; none where the scales are not static.
void fill_channels(const ascend_write_args &args, std::vector<Channels> &channels) {
  const ascend_pages &p = args.pages;
  channels.clear();
  if (!args.channel_scales) return;
  for (int i = 0; i < 2 * p.num_kv_heads; ++i) {
    channels.emplace_back(args.channel_scales + (int64_t)i * p.head_dim, p.head_dim);
  }
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
  const WriteFunction write = choose(args.dtype, p);
  if (!write || !supported(p, args.channel_scales)) return ASCEND_UNSUPPORTED;
  static thread_local Scratch scratch_of_thread;
  Scratch &scratch = scratch_of_thread;  // of this thread, for all
  fill_channels(args, scratch.channels);
  const Writer writer(args, scratch.channels.data());
  // Tokens of a block share its pool of patches and their order matters: threads divide blocks.
  const bool by_block = p.quantisation == ASCEND_C8P && !serial;
  const BlockGroups &groups = scratch.groups;
  const int64_t tokens = args.num_tokens;
  if (by_block) scratch.groups.build(args.slot_mapping, tokens, p.block_size, chunk_tokens);
  const int64_t parts = by_block ? groups.parts() : (tokens + chunk_tokens - 1) / chunk_tokens;
  // Part after part, all heads of one: they lie side by side in the source.
  const auto item = [&](int64_t i) {
    const int64_t part = i / p.num_kv_heads;
    const int head = (int)(i % p.num_kv_heads);
    Counts counts;
    if (by_block) {
      groups.visit(part, [&](Tokens run) { (writer.*write)(run, head, counts); });
    } else {
      const int64_t from = part * chunk_tokens;
      (writer.*write)({from, std::min(tokens, from + chunk_tokens)}, head, counts);
    }
    add_counts(counts, args.counters);
  };
  const int64_t items = parts * p.num_kv_heads;
  if (serial) {
    for (int64_t i = 0; i < items; ++i) item(i);
    return ASCEND_OK;
  }
#pragma omp parallel for num_threads(args.num_threads) schedule(static)
  for (int64_t i = 0; i < items; ++i) item(i);
  return ASCEND_OK;
}

}  // namespace ascend
