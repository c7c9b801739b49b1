// Small layers of decoders: rotary embedding, functions of elements, rows of a table.
#include <algorithm>

#include "element.h"
#include "rotate.h"
#include "rows.h"

namespace ascend {
namespace {

// ---- Rotary embedding

template <size_t... I>
ASCEND_INLINE Vf twice_each(Vf x, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, (I / 2)...);
}

// What one token's heads are turned by: part of a row of the table, in vectors.
struct Turn {
  Vf cosines, sines;
  int64_t column;  // of a head, the first that is turned
  int64_t count;   // of lanes
};

// Elements lie half the rotary part apart: (x, y) -> (x cos - y sin, y cos + x sin). The products
// with the sine are the fused ones, as in vLLM's kernel.
template <class E>
void turn_halves(const Turn &turn, typename E::Storage *head, int64_t stride, int heads, int half) {
  for (int i = 0; i < heads; ++i, head += stride) {
    auto *first = head + turn.column, *second = first + half;
    const Vf x = load_lanes<E>(first, turn.count), y = load_lanes<E>(second, turn.count);
    store_lanes<E>(fused(-y, turn.sines, x * turn.cosines), first, turn.count);
    store_lanes<E>(fused(x, turn.sines, y * turn.cosines), second, turn.count);
  }
}

// Elements lie side by side. Each is added to its partner, whose sine has the sign.
template <class E>
void turn_pairs(const Turn &turn, typename E::Storage *head, int64_t stride, int heads) {
  for (int i = 0; i < heads; ++i, head += stride) {
    const Vf x = load_lanes<E>(head + turn.column, turn.count);
    const Vf partner = detail::exchange<1>(x, LaneSequence{});
    store_lanes<E>(x * turn.cosines + partner * turn.sines, head + turn.column, turn.count);
  }
}

template <class E>
void turn_token(const ascend_rotary_args &a, int64_t token) {
  using T = typename E::Storage;
  const int half = a.rotary_dim / 2;
  const T *cosines = (const T *)a.table + a.positions[token] * a.table_stride;
  const T *sines = cosines + half;
  T *query = (T *)a.query + token * a.query_token_stride;
  T *key = (T *)a.key + token * a.key_token_stride;
  const int key_heads = a.key ? a.key_heads : 0;
  if (a.halves) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, half - i);
      const Turn turn{load_lanes<E>(cosines + i, count), load_lanes<E>(sines + i, count), i, count};
      turn_halves<E>(turn, query, a.query_head_stride, a.query_heads, half);
      turn_halves<E>(turn, key, a.key_head_stride, key_heads, half);
    }
    return;
  }
  // A negative sine at even lanes: those of x, whose partner is y.
  const Vf signs = -detail::signs<1>(LaneSequence{});
  for (int64_t i = 0; i < half; i += kLanes / 2) {
    const int64_t count = std::min<int64_t>(kLanes / 2, half - i);
    const Vf cosine = twice_each(load_lanes<E>(cosines + i, count), LaneSequence{});
    const Vf sine = twice_each(load_lanes<E>(sines + i, count), LaneSequence{});
    const Turn turn{cosine, sine * signs, 2 * i, 2 * count};
    turn_pairs<E>(turn, query, a.query_head_stride, a.query_heads);
    turn_pairs<E>(turn, key, a.key_head_stride, key_heads);
  }
}

// ---- Functions of elements

// 1 / (1 + e^-x), accurate on both sides.
ASCEND_INLINE Vf sigmoid(Vf x) {
  const Vf magnitude = (Vf)((Vi)x & 0x7fffffff);
  const Vf e = precise_exp_nonpositive(-magnitude);
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// x times the normal distribution function. That of -|x| is e^(-x^2 / 2) t p(t), t = 1 / (1 + c
// |x|): c and p are a least-squares fit of erfc(z) e^(z^2) / t whose relative error stays below
// 4e-9 up to where the product vanishes. The other side follows without cancellation.
ASCEND_INLINE Vf gelu(Vf x) {
  const Vf bounded = vmin(splat(20.0f), x);  // where the product is 0, as infinity times 0 is not
  const Vf magnitude = (Vf)((Vi)bounded & 0x7fffffff);
  const Vf t = 1.0f / (1.0f + 0.282842712f * magnitude);
  Vf p = splat(-2.37380680e-2f);
  p = p * t + 1.09448256e-1f;
  p = p * t - 1.59109202e-1f;
  p = p * t + 2.98633196e-2f;
  p = p * t + 4.88422741e-2f;
  p = p * t + 2.80516375e-2f;
  p = p * t + 1.40586319e-1f;
  p = p * t + 1.66315125e-1f;
  p = p * t + 2.08459592e-1f;
  p = p * t + 2.25602190e-1f;
  p = p * t + 2.25678553e-1f;
  const Vf below = 0.5f * bounded * (t * p) * precise_exp_nonpositive(-0.5f * bounded * bounded);
  return x < 0.0f ? below : x - below;
}

// As 0.5 x (1 + tanh u), without cancellation.
ASCEND_INLINE Vf gelu_tanh(Vf x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }

// Elements that are one work item: enough of them that a row of one token is shared too.
constexpr int64_t kPart = 2 << 10;

template <class E, class Function>
void apply(const ascend_elementwise_args &a, const Function &function) {
  using T = typename E::Storage;
  const int64_t parts = (a.k + kPart - 1) / kPart;
  share_rows(a.m * parts, a.m * a.k, a.num_threads, [&](int64_t item) {
    const int64_t row = item / parts, begin = item % parts * kPart;
    const T *x = (const T *)a.x + row * a.x_stride + begin;
    const T *y = (const T *)a.y + row * a.y_stride + begin;
    T *out = (T *)a.out + row * a.out_stride + begin;
    const int64_t count = std::min(kPart, a.k - begin);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, count - i);
      store_lanes<E>(function(x + i, y + i, lanes), out + i, lanes);
    }
  });
}

template <class E, class Function>
void apply_one(const ascend_elementwise_args &a, const Function &function) {
  using T = typename E::Storage;
  apply<E>(a,
           [&](const T *x, const T *, int64_t lanes) { return function(load_lanes<E>(x, lanes)); });
}

template <class E, class Function>
void apply_two(const ascend_elementwise_args &a, const Function &function) {
  using T = typename E::Storage;
  apply<E>(a, [&](const T *x, const T *y, int64_t lanes) {
    return function(load_lanes<E>(x, lanes), load_lanes<E>(y, lanes));
  });
}

// All rows, or those that `keep` does not make zero.
void copy_rows(const ascend_elementwise_args &a, const int64_t *keep) {
  const int64_t itemsize = a.dtype == ASCEND_FLOAT32 ? 4 : 2;
  share_rows(a.m, a.m * a.k, a.num_threads, [&](int64_t row) {
    char *out = (char *)a.out + row * a.out_stride * itemsize;
    if (keep && !keep[row * a.y_stride]) {
      memset(out, 0, a.k * itemsize);
    } else {
      memmove(out, (const char *)a.x + row * a.x_stride * itemsize, a.k * itemsize);
    }
  });
}

template <class E>
void evaluate(const ascend_elementwise_args &a) {
  switch (a.operation) {
    case ASCEND_SILU:
      return apply_one<E>(a, [](Vf x) { return x * sigmoid(x); });
    case ASCEND_GELU:
      return apply_one<E>(a, [](Vf x) { return gelu(x); });
    case ASCEND_GELU_TANH:
      return apply_one<E>(a, [](Vf x) { return gelu_tanh(x); });
    case ASCEND_ADD:
      return apply_two<E>(a, [](Vf x, Vf y) { return x + y; });
    case ASCEND_SCALE: {
      const auto *y = (const typename E::Storage *)a.y;
      const Vf factor = splat(y ? load_lanes<E>(y, 1)[0] : a.factor);
      return apply_one<E>(a, [factor](Vf x) { return x * factor; });
    }
    default:
      return apply_two<E>(a, [](Vf x, Vf y) { return x * y; });
  }
}

// ---- Rows of a table

int64_t id_at(const ascend_embedding_args &a, int64_t i) {
  return a.id_bytes == 8 ? ((const int64_t *)a.ids)[i] : ((const int32_t *)a.ids)[i];
}

}  // namespace
}  // namespace ascend

extern "C" int ascend_cpu_rotary(const ascend_rotary_args *args) {
  using namespace ascend;
  const ascend_rotary_args &a = *args;
  if (!is_float(a.dtype) || a.rotary_dim <= 0 || a.rotary_dim % 2) return ASCEND_UNSUPPORTED;
  for (int64_t i = 0; i < a.m; ++i) {
    if ((uint64_t)a.positions[i] >= (uint64_t)a.table_rows) return ASCEND_BAD_SLOT;
  }
  const int64_t heads = a.query_heads + (a.key ? a.key_heads : 0);
  with_element(a.dtype, [&](auto element) {
    share_rows(a.m, a.m * heads * a.rotary_dim, a.num_threads,
               [&](int64_t token) { turn_token<decltype(element)>(a, token); });
  });
  return ASCEND_OK;
}

extern "C" int ascend_cpu_elementwise(const ascend_elementwise_args *args) {
  using namespace ascend;
  const ascend_elementwise_args &a = *args;
  const bool known = a.operation >= ASCEND_COPY && a.operation <= ASCEND_SCALE;
  const bool two = a.operation >= ASCEND_ADD && a.operation != ASCEND_SCALE;
  const bool empty = a.m <= 0 || a.k <= 0;  // then pointers may be null
  if (!is_float(a.dtype) || !known || (two && !a.y && !empty)) {
    return ASCEND_UNSUPPORTED;
  }
  if (a.operation == ASCEND_COPY) {
    copy_rows(a, nullptr);
  } else if (a.operation == ASCEND_KEEP_ROWS) {
    if (!empty) copy_rows(a, (const int64_t *)a.y);
  } else {
    with_element(a.dtype, [&](auto element) { evaluate<decltype(element)>(a); });
  }
  return ASCEND_OK;
}

extern "C" int ascend_cpu_embedding(const ascend_embedding_args *args) {
  using namespace ascend;
  const ascend_embedding_args &a = *args;
  if (a.id_bytes != 4 && a.id_bytes != 8) return ASCEND_UNSUPPORTED;
  for (int64_t i = 0; i < a.m; ++i) {
    if ((uint64_t)id_at(a, i) >= (uint64_t)a.table_rows) return ASCEND_BAD_SLOT;
  }
  share_rows(a.m, a.m * a.row_bytes / 4, a.num_threads, [&](int64_t row) {
    memcpy((char *)a.out + row * a.row_bytes,
           (const char *)a.table + id_at(a, row) * a.table_stride, a.row_bytes);
  });
  return ASCEND_OK;
}
