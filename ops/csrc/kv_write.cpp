// ascend_cpu_kv_write: scatters new keys and values into NZ pages, in one pass over both.
#include <algorithm>

#include "element.h"
#include "kv_write_int8.h"

namespace ascend {
namespace {

// Below this many bytes written, waking other threads costs more than it saves.
constexpr int64_t kSerialBytes = 48 << 10;
constexpr int64_t kChunkTokens = 64;

struct Source {
  const char *data;
  int64_t token_bytes, head_bytes;
  const char *row(int64_t token, int head) const {
    return data + token * token_bytes + head * head_bytes;
  }
};

// One 32-byte row of a plane: the same columns of a token, rounded to the page's dtype.
template <class From, class To>
ASCEND_INLINE void copy_columns(const char *source, char *page) {
  if constexpr (From::kDtype == To::kDtype) {
    memcpy(page, source, kRowBytes);
  } else {
    const auto *from = (const typename From::Storage *)source;
    typename To::Storage to[kColumns<To>];
    for (int c = 0; c < kColumns<To>; ++c) to[c] = To::round(From::widen(from[c]));
    memcpy(page, to, kRowBytes);
  }
}

// `Count` tokens in consecutive slots. Two of them fill a cache line, which is then written once:
// the planes of a page often fall into the same cache sets, so a half line would not stay.
template <class From, class To, int Count>
ASCEND_INLINE void copy_tokens(const Source &source, int64_t token, int head, int planes,
                               int64_t plane_bytes, char *page) {
  constexpr int64_t kStep = kColumns<To> * (int64_t)sizeof(typename From::Storage);
  const char *row = source.row(token, head);
  for (int p = 0; p < planes; ++p) {
    for (int i = 0; i < Count; ++i) {
      copy_columns<From, To>(row + i * source.token_bytes + p * kStep,
                             page + p * plane_bytes + i * kRowBytes);
    }
  }
}

struct Writer {
  const ascend_write_args &args;
  Source key, value;

  char *run(int64_t slot, int head) const {
    const ascend_pages &p = args.pages;
    return (char *)p.data + slot / p.block_size * p.block_stride + head * p.head_stride +
           slot % p.block_size * kRowBytes;
  }

  template <class From, class To>
  void write(int64_t from, int64_t to, int head) const {
    const ascend_pages &p = args.pages;
    const int planes = p.head_dim / kColumns<To>;
    const int64_t plane_bytes = (int64_t)p.block_size * kRowBytes;
    for (int64_t t = from; t < to;) {
      const int64_t slot = args.slot_mapping[t];
      if (slot < 0) {
        ++t;
        continue;
      }
      char *page = run(slot, head);
      // block_size is even, so an even slot's successor is in the same block.
      if (slot % 2 == 0 && t + 1 < to && args.slot_mapping[t + 1] == slot + 1) {
        copy_tokens<From, To, 2>(key, t, head, planes, plane_bytes, page + p.k_offset);
        copy_tokens<From, To, 2>(value, t, head, planes, plane_bytes, page + p.v_offset);
        t += 2;
      } else {
        copy_tokens<From, To, 1>(key, t, head, planes, plane_bytes, page + p.k_offset);
        copy_tokens<From, To, 1>(value, t, head, planes, plane_bytes, page + p.v_offset);
        ++t;
      }
    }
  }
};

using WriteFunction = void (Writer::*)(int64_t, int64_t, int) const;

template <class From>
WriteFunction choose_target(int dtype) {
  if (dtype == ASCEND_FLOAT32) return &Writer::write<From, Float32>;
  if (dtype == ASCEND_FLOAT16) return &Writer::write<From, Float16>;
  if (dtype == ASCEND_BFLOAT16) return &Writer::write<From, Bfloat16>;
  return nullptr;
}

WriteFunction choose(int from, int to) {
  if (from == ASCEND_FLOAT32) return choose_target<Float32>(to);
  if (from == ASCEND_FLOAT16) return choose_target<Float16>(to);
  if (from == ASCEND_BFLOAT16) return choose_target<Bfloat16>(to);
  return nullptr;
}

bool slots_valid(const ascend_write_args &a) {
  const int64_t limit = a.pages.num_blocks * a.pages.block_size;
  bool valid = true;
  for (int64_t t = 0; t < a.num_tokens; ++t) valid &= a.slot_mapping[t] < limit;
  return valid;
}

Source source_of(const void *data, int64_t token_stride, int64_t head_stride, int dtype) {
  const int64_t itemsize = dtype == ASCEND_FLOAT32 ? 4 : 2;
  return {(const char *)data, token_stride * itemsize, head_stride * itemsize};
}

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_kv_write(const ascend_write_args *args) {
  using namespace ascend;
  const ascend_write_args &a = *args;
  const ascend_pages &p = a.pages;
  if (p.head_dim <= 0 || p.head_dim % 16 || p.head_dim > 256 || p.block_size <= 0 ||
      p.block_size % 16 || p.block_size > 256) {
    return ASCEND_UNSUPPORTED;
  }
  if (!slots_valid(a)) return ASCEND_BAD_SLOT;
  const int64_t bytes = a.num_tokens * p.num_kv_heads * p.head_dim * (p.dtype ? 4 : 8);
  const bool serial = a.num_threads <= 1 || bytes <= kSerialBytes;
  if (p.dtype == ASCEND_INT8) return write_int8(a, kChunkTokens, serial);
  const WriteFunction write = choose(a.dtype, p.dtype);
  if (!write || p.quantisation != ASCEND_UNQUANTISED) return ASCEND_UNSUPPORTED;
  const Writer writer{a, source_of(a.key, a.key_token_stride, a.key_head_stride, a.dtype),
                      source_of(a.value, a.value_token_stride, a.value_head_stride, a.dtype)};
  if (serial) {
    for (int64_t from = 0; from < a.num_tokens; from += kChunkTokens) {
      const int64_t to = std::min(a.num_tokens, from + kChunkTokens);
      for (int head = 0; head < p.num_kv_heads; ++head) (writer.*write)(from, to, head);
    }
    return ASCEND_OK;
  }
  const int64_t chunks = (a.num_tokens + kChunkTokens - 1) / kChunkTokens;
#pragma omp parallel for num_threads(a.num_threads) schedule(static)
  for (int64_t i = 0; i < chunks * p.num_kv_heads; ++i) {
    const int64_t from = i / p.num_kv_heads * kChunkTokens;
    const int64_t to = std::min(a.num_tokens, from + kChunkTokens);
    (writer.*write)(from, to, (int)(i % p.num_kv_heads));
  }
  return ASCEND_OK;
}
