// Page elements: how each dtype widens to float and how a float rounds to it (nearest, ties even).
#pragma once

#include "ascend_cpu.h"
#include "simd.h"

namespace ascend {

// Of floats, not of integers or indices.
inline bool is_float(int dtype) { return dtype >= ASCEND_FLOAT32 && dtype <= ASCEND_BFLOAT16; }

struct Float32 {
  using Storage = float;
  static constexpr int kDtype = ASCEND_FLOAT32;
  static constexpr int kNarrowRows = 8;  // see KernelSet
  static ASCEND_INLINE float widen(float x) { return x; }
  static ASCEND_INLINE float round(float x) { return x; }
  static ASCEND_INLINE Vf widen(Vf x) { return x; }
  static ASCEND_INLINE Vf round(Vf x) { return x; }
};

struct Bfloat16 {
  using Storage = uint16_t;
  static constexpr int kDtype = ASCEND_BFLOAT16;
  static constexpr int kNarrowRows = 12;  // see KernelSet
  static ASCEND_INLINE float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static ASCEND_INLINE Vf widen(Vh x) { return (Vf)(widen_halves(x) << 16); }
  static ASCEND_INLINE uint16_t round(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
  }
  static ASCEND_INLINE Vh round(Vf x) { return narrow_to_halves(round_in_place(x) >> 16); }
  // In the high halves; the low ones are to be cut off.
  static ASCEND_INLINE Vu round_in_place(Vf x) {
    const Vu u = (Vu)x;
    return x == x ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000;
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr int kDtype = ASCEND_FLOAT16;
  static constexpr int kNarrowRows = 24;  // see KernelSet
#if defined(__F16C__)
  static ASCEND_INLINE float widen(uint16_t x) { return _cvtsh_ss(x); }
  static ASCEND_INLINE uint16_t round(float x) { return _cvtss_sh(x, 0); }
  static ASCEND_INLINE Vf widen(Vh x) {
#if defined(__AVX512F__)
    return (Vf)_mm512_cvtph_ps((__m256i)x);
#else
    return (Vf)_mm256_cvtph_ps((__m128i)x);
#endif
  }
  static ASCEND_INLINE Vh round(Vf x) {
#if defined(__AVX512F__)
    return (Vh)_mm512_cvtps_ph((__m512)x, 0);
#else
    return (Vh)_mm256_cvtps_ph((__m256)x, 0);
#endif
  }
#else
  // The exponent is rebased by one multiplication, which also normalises subnormals.
  static ASCEND_INLINE float widen(uint16_t x) {
    const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13;
    float f;
    memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
    uint32_t u;
    memcpy(&u, &f, 4);
    u |= (magnitude >= 0x0f800000 ? 0x7f800000u : 0u) | (uint32_t)(x & 0x8000) << 16;
    memcpy(&f, &u, 4);
    return f;
  }
  static ASCEND_INLINE Vf widen(Vh x) {
    const Vu wide = widen_halves(x);
    const Vu magnitude = (wide & 0x7fff) << 13;
    const Vu rebased = (Vu)((Vf)magnitude * 0x1p112f);
    const Vu special = (Vu)(magnitude >= 0x0f800000) & 0x7f800000;
    return (Vf)(rebased | special | (wide & 0x8000) << 16);
  }
  static ASCEND_INLINE uint16_t round(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00 | ((u >> 13) & 0x3ff));
    if (u >= 0x47800000) return (uint16_t)(sign | 0x7c00);  // at or above 2^16
    if (u < 0x38800000) {  // subnormal half: let the float adder round at its last bit
      float f;
      memcpy(&f, &u, 4);
      f += 0.5f;
      memcpy(&u, &f, 4);
      return (uint16_t)(sign | (u - 0x3f000000));
    }
    u += 0xfff + ((u >> 13) & 1);
    return (uint16_t)(sign | ((u - 0x38000000) >> 13));
  }
  static ASCEND_INLINE Vh round(Vf x) {
    Vh halves;
    for (int i = 0; i < kLanes; ++i) halves[i] = round(x[i]);
    return halves;
  }
#endif
};

// Without its scale: the integer itself.
struct Int8 {
  using Storage = int8_t;
  static constexpr int kDtype = ASCEND_INT8;
  static ASCEND_INLINE Vf widen(Vb x) { return widen_bytes(x); }
};

// Elements of a column group (C0) and the bytes of one of its rows.
constexpr int kRowBytes = 32;
template <class E>
constexpr int kColumns = kRowBytes / (int)sizeof(typename E::Storage);

// kLanes consecutive columns from `column` of one token. run: NZ, [head_dim / C0][block_size][C0].
template <class E>
ASCEND_INLINE Vf load_columns(const char *run, int64_t plane_bytes, int token, int column) {
  constexpr int kC0 = kColumns<E>;
  const char *row = run + column / kC0 * plane_bytes + (int64_t)token * kRowBytes;
  if constexpr (sizeof(typename E::Storage) == 2) {
    return E::widen(load<Vh>(row + column % kC0 * 2));
  } else if constexpr (sizeof(typename E::Storage) == 1) {
    return E::widen(load<Vb>(row + column % kC0));
  } else if constexpr (kLanes <= kC0) {
    return load<Vf>(row + column % kC0 * 4);
  } else {
    struct Halves {
      char row[2][kRowBytes];
    } halves;
    memcpy(halves.row[0], row, kRowBytes);
    memcpy(halves.row[1], row + plane_bytes, kRowBytes);
    return load<Vf>(&halves);
  }
}

// The first `count` of kLanes elements of a row, and zeros: nothing behind them is read.
template <class E>
ASCEND_INLINE Vf load_lanes(const typename E::Storage *p, int64_t count = kLanes) {
  typedef typename E::Storage Lanes
      __attribute__((vector_size(sizeof(typename E::Storage) * kLanes)));
  if (count >= kLanes) return E::widen(load<Lanes>(p));
  Lanes lanes{};
  memcpy(&lanes, p, count * sizeof *p);
  return E::widen(lanes);
}
// Rounds the first `count` of kLanes values; nothing behind them is written.
template <class E>
ASCEND_INLINE void store_lanes(Vf x, typename E::Storage *p, int64_t count = kLanes) {
  const auto lanes = E::round(x);
  if (count >= kLanes) return store(p, lanes);
  memcpy(p, &lanes, count * sizeof *p);
}

// Rounds two vectors that lie side by side, in fewer instructions than each alone.
template <class E>
ASCEND_INLINE void store_two(Vf a, Vf b, typename E::Storage *p) {
  if constexpr (E::kDtype == ASCEND_BFLOAT16) {
#if defined(__AVX512BF16__)
    // The instruction takes subnormal numbers for 0.
    constexpr int kSubnormal = 0x20;
    const __mmask16 small = _mm512_fpclass_ps_mask((__m512)a, kSubnormal) |
                            _mm512_fpclass_ps_mask((__m512)b, kSubnormal);
    if (__builtin_expect(!small, 1)) {
      return store(p, (Vhh)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
#endif
    store(p, high_halves(E::round_in_place(a), E::round_in_place(b)));
  } else {
    store(p, E::round(a));
    store(p + kLanes, E::round(b));
  }
}

// Calls function(E) with the element type of a dtype that is not int8.
template <class Function>
ASCEND_INLINE void with_element(int dtype, const Function &function) {
  if (dtype == ASCEND_FLOAT32) return function(Float32{});
  if (dtype == ASCEND_FLOAT16) return function(Float16{});
  function(Bfloat16{});
}

inline void widen_row(int dtype, const void *source, int64_t offset, int count, float *out) {
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    const auto *p = (const typename E::Storage *)source + offset;
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load_lanes<E>(p + i));
    for (; i < count; ++i) out[i] = E::widen(p[i]);
  });
}

inline void round_row(int dtype, const float *source, int count, void *out, int64_t offset) {
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    auto *p = (typename E::Storage *)out + offset;
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store_lanes<E>(load<Vf>(source + i), p + i);
    for (; i < count; ++i) p[i] = E::round(source[i]);
  });
}

}  // namespace ascend
