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
  alignas(64) float inverses[kMaxHeadDim];  // in the order in which rows are taken apart
  float error_bound;
};

// A token of the call on its way into a run.
struct Place {
  int64_t token;
  int head;
  int offset;  // in the block
  char *run;
  Place following() const { return {token + 1, head, offset + 1, run}; }
  Place of_later_head(int n, int64_t head_stride) const {
    return {token, head + n, offset, run + n * head_stride};
  }
};

struct Heads {
  int begin, end;
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

class Writer {
 public:
  // `channels`: [K, V][num_kv_heads], null for C8D.
  Writer(const ascend_write_args &args, const Channels *channels)
      : args_(args),
        plane_bytes_((int64_t)args.pages.block_size * kRowBytes),
        slots_(args.pages.patch_slots) {
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

  // Tokens of some heads.
  template <class From, int kDim, int kQuantisation>
  void write(Tokens tokens, Heads heads, Counts &counts) const {
    const int64_t head_stride = args_.pages.head_stride;
    Batch batch;
    Place *places = batch.places;
    while (const int found = find_places(tokens, heads.begin, places)) {
      // Few tokens are written for several heads at once.
      const int together = std::min(kPlaces / found, heads.end - heads.begin);
      for (int n = found; n < together * found; ++n) {
        places[n] = places[n - found].of_later_head(1, head_stride);
      }
      for (int head = heads.begin; head < heads.end; head += together) {
        batch.count = std::min(together, heads.end - head) * found;
        write_batch<From, kDim, kQuantisation>(batch, counts);
        for (int n = 0; n < batch.count; ++n) {
          places[n] = places[n].of_later_head(together, head_stride);
        }
      }
    }
  }

 private:
  static constexpr int kPlaces = 16, kTokensAhead = kPlaces;
  static_assert(kPlaces % kLanes == 0);

  // Rows of K, and of V, that are written together, in passes: none need wait for its scale, which
  // is at the end of a chain of instructions, and what is one number per row is computed for kLanes
  // of them.
  struct Batch {
    Place places[kPlaces];
    int count;
  };

  // Where the next tokens go. Returns how many there are; `tokens` are those after them.
  int find_places(Tokens &tokens, int head, Place *places) const {
    const ascend_pages &p = args_.pages;
    int count = 0;
    for (; tokens.begin < tokens.end && count < kPlaces; ++tokens.begin) {
      const int64_t t = tokens.begin, slot = args_.slot_mapping[t];
      if (slot < 0) continue;
      if (count > 0 && follows_in_block(places[count - 1], t)) {  // nothing to divide
        places[count] = places[count - 1].following();
      } else {
        const int64_t block = slot / p.block_size;
        places[count] = {t, head, (int)(slot - block * p.block_size),
                         (char *)p.data + block * p.block_stride + head * p.head_stride};
      }
      ++count;
    }
    return count;
  }

  bool follows_in_block(const Place &place, int64_t token) const {
    return token == place.token + 1 && place.offset + 1 < args_.pages.block_size &&
           args_.slot_mapping[token] == args_.slot_mapping[place.token] + 1;
  }

  template <class From, int kDim, int kQuantisation>
  void write_batch(const Batch &batch, Counts &counts) const {
    counts.values[ASCEND_ROWS_WRITTEN] += 2 * batch.count;
    if constexpr (kQuantisation == ASCEND_C8D) {
      write_dynamic<From, kDim>(batch);
    } else {
      write_static_batch<From, kDim, kQuantisation>(batch, counts);
    }
  }

  // Rows of a batch until their scales are known. Reading them again would cost more: rows of a
  // head often fall into the same cache sets.
  template <class To, int kDim>
  struct Kept {
    alignas(64) typename To::Storage rows[kPlaces][kMaxVectors<kDim> * kLanes];
    alignas(64) float scales[kPlaces], inverses[kPlaces];
  };

  // While the scales of the keys are computed values are read, and so on.
  template <class From, int kDim>
  void write_dynamic(const Batch &batch) const {
    Kept<Float32, kDim> keys;
    Kept<From, kDim> values;
    Vi bits[kPlaces];
    const int dim = kDim ? kDim : args_.pages.head_dim, vectors = dim / kLanes;
    for (int n = 0; n < batch.count; ++n) {
      const char *source = prepare<From, ASCEND_C8D>(streams_[0], batch.places[n], vectors);
      bits[n] = rotate<From, kDim>(source, vectors, keys.rows[n]);
    }
    find_scales(batch.count, bits, keys);
    for (int n = 0; n < batch.count; ++n) {
      const char *source = prepare<From, ASCEND_C8D>(streams_[1], batch.places[n], vectors);
      bits[n] = copy_and_compare<From>(source, vectors, (char *)values.rows[n]);
    }
    find_scales(batch.count, bits, values);
    write_kept<From>(streams_[0], batch, keys);
    write_kept<From>(streams_[1], batch, values);
  }

  template <class To, int kDim>
  ASCEND_INLINE static void find_scales(int count, Vi *bits, Kept<To, kDim> &kept) {
    for (int n = count; n < kPlaces; ++n) bits[n] = Vi{};
    for (int n = 0; n < count; n += kLanes) {
      const Vf scale = dynamic_scale(greatest_lanes(bits + n));
      store(kept.scales + n, scale);
      store(kept.inverses + n, inverse_of(scale));
    }
  }

  // Rotated keys are floats, and taken apart already.
  template <class From, class To, int kDim>
  ASCEND_INLINE void write_kept(const Stream &stream, const Batch &batch,
                                const Kept<To, kDim> &kept) const {
    const int vectors = (kDim ? kDim : args_.pages.head_dim) / kLanes;
    for (int n = 0; n < batch.count; ++n) {
      const Place &place = batch.places[n];
      Vf row[kMaxVectors<kDim>];
      widen_vectors<To, kSplit<To, kDim>>((const char *)kept.rows[n], vectors, row);
      quantise_dynamic<kSplit<From, kDim>>(row, vectors, kept.inverses[n], codes(stream, place));
      memcpy(scale_at(stream, place), kept.scales + n, sizeof(float));
    }
  }

  // Returns the greatest magnitudes.
  template <class From, int kDim>
  ASCEND_INLINE static Vi rotate(const char *source, int vectors, float *rotated) {
    Vf row[kMaxVectors<kDim>];
    widen_vectors<From, kSplit<From, kDim>>(source, vectors, row);
    if constexpr (kDim == 0) {
      rotate_row(vectors * kLanes, (float *)row);
    } else {
      rotate_row<kSplit<From, kDim>>(row);
    }
    ASCEND_UNROLL_ROW
    for (int i = 0; i < vectors; ++i) store(rotated + i * kLanes, row[i]);
    return magnitudes(row, vectors);
  }

  // Rows first, then tags: those are in memory, and a row that waited for its tag would keep the
  // next ones from being written meanwhile.
  template <class From, int kDim, int kQuantisation>
  void write_static_batch(const Batch &batch, Counts &counts) const {
    uint32_t suspects[2];
    for (int s = 0; s < 2; ++s) {
      suspects[s] = write_static<From, kDim, kQuantisation>(streams_[s], batch, counts);
    }
    if constexpr (kQuantisation != ASCEND_C8P) return;
    for (int s = 0; s < 2; ++s) {
      for (int n = 0; n < batch.count; ++n) {
        if (suspects[s] >> n & 1) {
          examine<From>(streams_[s], batch.places[n], counts);
        } else {
          claim_slot(streams_[s], batch.places[n], false, counts);
        }
      }
    }
  }

  // C8P: returns which rows may be outliers, a bit for each. Most cannot, and only of the others is
  // the error computed.
  template <class From, int kDim, int kQuantisation>
  uint32_t write_static(const Stream &stream, const Batch &batch, Counts &counts) const {
    const Place *places = batch.places;
    const int count = batch.count;
    constexpr bool kPatched = kQuantisation == ASCEND_C8P, kApart = kSplit<From, kDim>;
    const int vectors = (kDim ? kDim : args_.pages.head_dim) / kLanes;
    Vi bits[kPlaces];
    Vf norms[kPlaces];
    alignas(64) float bounds[kPlaces];
    for (int n = 0; n < count; ++n) {
      const char *source = prepare<From, kQuantisation>(stream, batch.places[n], vectors);
      Vf row[kMaxVectors<kDim>];
      widen_vectors<From, kApart>(source, vectors, row);
      const Channels &channels = stream.channels[places[n].head];
      bounds[n] = channels.error_bound;
      if (kPatched) norms[n] = squares_of<From>(source, row, vectors);
      bits[n] =
          quantise_static<false, kApart>(row, vectors, channels.inverses, codes(stream, places[n]));
    }
    for (int n = count; n < kPlaces; ++n) bits[n] = Vi{}, norms[n] = Vf{}, bounds[n] = 0.0f;
    uint32_t left = 0, suspects = 0;
    for (int n = 0; n < count; n += kLanes) {
      const Vi beyond = left_range(greatest_lanes(bits + n));
      left |= lanes_where(beyond) << n;
      if (!kPatched) continue;
      const Vf norm = horizontal_sums(norms + n) * stream.square_threshold;
      suspects |= lanes_where(beyond | ~(norm >= load<Vf>(bounds + n))) << n;
    }
    for (uint32_t rest = left; rest; rest &= rest - 1) {
      saturate<From, kDim>(stream, places[__builtin_ctz(rest)]);
    }
    counts.values[ASCEND_ROWS_SATURATED] += __builtin_popcount(left);
    return suspects;
  }

  // Writes a row that left the range once more.
  template <class From, int kDim>
  __attribute__((noinline)) void saturate(const Stream &stream, const Place &place) const {
    constexpr bool kApart = kSplit<From, kDim>;
    const int vectors = (kDim ? kDim : args_.pages.head_dim) / kLanes;
    Vf row[kMaxVectors<kDim>];
    widen_vectors<From, kApart>(stream.row(place), vectors, row);
    const Channels &channels = stream.channels[place.head];
    quantise_static<true, kApart>(row, vectors, channels.inverses, codes(stream, place));
  }

  // Fetches the row some tokens ahead: a row takes too many instructions for the processor to reach
  // the next ones by itself, and rows of a head lie too far apart for its prefetchers. Also what
  // will be written later, as rows that wait for their scales are; for others that would only cost
  // (15 % where pages are in cache). Returns where the row comes from.
  template <class From, int kQuantisation>
  ASCEND_INLINE const char *prepare(const Stream &stream, const Place &place, int vectors) const {
    const char *source = stream.row(place), *ahead = source + kTokensAhead * stream.token_bytes;
    const int row_bytes = vectors * kLanes * (int)sizeof(typename From::Storage);
    ASCEND_UNROLL
    for (int b = 0; b < row_bytes; b += 64) prefetch_l2(ahead + b);
    if constexpr (kQuantisation == ASCEND_C8D) {
      const Codes out = codes(stream, place);
      ASCEND_UNROLL
      for (int d = 0; d < vectors * kLanes; d += kRowBytes) __builtin_prefetch(out.at(d), 1);
      __builtin_prefetch(scale_at(stream, place), 1);
    } else if constexpr (kQuantisation == ASCEND_C8P) {
      __builtin_prefetch(place.run + stream.patches_offset, 1);
    }
    return source;
  }

  static char *scale_at(const Stream &stream, const Place &place) {
    return place.run + stream.scales_offset + place.offset * sizeof(float);
  }

  Codes codes(const Stream &stream, const Place &place) const {
    return {place.run + stream.offset + place.offset * kRowBytes, plane_bytes_};
  }

  // Whether a row gets a patch; the tag of its slot then says so. Tokens of a block are written in
  // order: a tag of a later token than this one is left over from a rejected draft or from another
  // use of the block, an earlier one is in force.
  ASCEND_INLINE bool claim_slot(const Stream &stream, const Place &place, bool outlier,
                                Counts &counts) const {
    const int slot = slots_.of(place.offset);
    char *tag_at = place.run + stream.patches_offset + slot * sizeof(int16_t);
    const int tag = load<int16_t>(tag_at);
    if (tag == 0 && !outlier) return false;  // nearly always; the line stays as it is
    if (tag <= place.offset && slots_.fits(tag, slot, args_.pages.block_size)) {
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
    Vf row[kMaxVectors<0>];
    widen_vectors<From>(stream.row(place), vectors, row);
    const Residual residual(row, vectors, stream.channels[place.head].scales);
    // A row that is not finite is no outlier: no patch can mend it.
    const bool outlier = residual.square_error > stream.square_threshold * residual.square_norm;
    if (!claim_slot(stream, place, outlier, counts)) return;
    const int slots = slots_.count(), slot = slots_.of(place.offset);
    const int code_bytes = (p.head_dim + 31) / 32 * 16;
    uint8_t nibbles[kMaxHeadDim / 2] = {};
    const float scale = encode_patch(p.head_dim, p.patch_code, residual, nibbles);
    char *scales = place.run + stream.patches_offset + slots * sizeof(int16_t);
    memcpy(scales + slot * sizeof(float), &scale, sizeof scale);
    memcpy(scales + slots * sizeof(float) + slot * code_bytes, nibbles, code_bytes);
  }

  const ascend_write_args &args_;
  int64_t plane_bytes_;
  PatchSlots slots_;
  Stream streams_[2];
};

// Channels of `dim` scales.
template <bool kApart>
void fill(Channels &channels, const float *scales, int dim) {
  channels.scales = scales;
  channels.error_bound = error_bound_of(scales, dim);
  const auto inverse_at = [&](int d) { return 1.0f / load<Vf>(scales + d); };
  if constexpr (!kApart) {
    for (int d = 0; d < dim; d += kLanes) store(channels.inverses + d, inverse_at(d));
  } else {
    for (int d = 0; d < dim; d += 2 * kLanes) {
      const Vf a = inverse_at(d), b = inverse_at(d + kLanes);
      store(channels.inverses + d, detail::every_second<0>(a, b, LaneSequence{}));
      store(channels.inverses + d + kLanes, detail::every_second<1>(a, b, LaneSequence{}));
    }
  }
}

// What is compiled for a kind of page and source.
struct Functions {
  void (Writer::*write)(Tokens, Heads, Counts &) const = nullptr;
  void (*fill)(Channels &, const float *, int) = nullptr;
};

template <class From, int kDim>
Functions choose_quantisation(int quantisation) {
  constexpr auto fill_channels = &fill<kSplit<From, kDim>>;
  if (quantisation == ASCEND_C8D) return {&Writer::write<From, kDim, ASCEND_C8D>, nullptr};
  if (quantisation == ASCEND_C8S) return {&Writer::write<From, kDim, ASCEND_C8S>, fill_channels};
  return {&Writer::write<From, kDim, ASCEND_C8P>, fill_channels};
}

template <class From>
Functions choose_dim(const ascend_pages &p) {
  if constexpr (kRowsInRegisters) {
    if (p.head_dim == 128) return choose_quantisation<From, 128>(p.quantisation);
    if (p.head_dim == 64) return choose_quantisation<From, 64>(p.quantisation);
  }
  return choose_quantisation<From, 0>(p.quantisation);
}

Functions choose(int dtype, const ascend_pages &p) {
  if (dtype == ASCEND_FLOAT32) return choose_dim<Float32>(p);
  if (dtype == ASCEND_FLOAT16) return choose_dim<Float16>(p);
  if (dtype == ASCEND_BFLOAT16) return choose_dim<Bfloat16>(p);
  return {};
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
  const Functions functions = choose(args.dtype, p);
  if (!functions.write || !supported(p, args.channel_scales)) return ASCEND_UNSUPPORTED;
  static thread_local Scratch scratch_of_thread;
  Scratch &scratch = scratch_of_thread;  // of this thread, for all
  scratch.channels.resize(functions.fill ? 2 * p.num_kv_heads : 0);
  for (size_t i = 0; i < scratch.channels.size(); ++i) {
    functions.fill(scratch.channels[i], args.channel_scales + i * p.head_dim, p.head_dim);
  }
  const Writer writer(args, scratch.channels.data());
  const auto write = [&](Tokens tokens, Heads heads, Counts &counts) {
    (writer.*functions.write)(tokens, heads, counts);
  };
  const int64_t tokens = args.num_tokens;
  if (serial) {
    Counts counts;
    write({0, tokens}, {0, p.num_kv_heads}, counts);
    add_counts(counts, args.counters);
    return ASCEND_OK;
  }
  // Tokens of a block share its pool of patches and their order matters: threads divide blocks.
  const bool by_block = p.quantisation == ASCEND_C8P;
  const BlockGroups &groups = scratch.groups;
  if (by_block) scratch.groups.build(args.slot_mapping, tokens, p.block_size, chunk_tokens);
  const int64_t parts = by_block ? groups.parts() : (tokens + chunk_tokens - 1) / chunk_tokens;
  // Heads are divided only where threads would have nothing to do.
  const int divisions = parts < 2 * args.num_threads ? p.num_kv_heads : 1;
  const int width = p.num_kv_heads / divisions;
#pragma omp parallel for num_threads(args.num_threads) schedule(static)
  for (int64_t i = 0; i < parts * divisions; ++i) {
    const int64_t part = i / divisions, from = part * chunk_tokens;
    const int head = (int)(i % divisions) * width;
    const Heads heads{head, head + width};
    Counts counts;
    if (by_block) {
      groups.visit(part, [&](Tokens run) { write(run, heads, counts); });
    } else {
      write({from, std::min(tokens, from + chunk_tokens)}, heads, counts);
    }
    add_counts(counts, args.counters);
  }
  return ASCEND_OK;
}

}  // namespace ascend
