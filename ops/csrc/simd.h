// Native-width float vectors, written once with GCC vector extensions: 16 lanes on AVX-512, 8 on
// AVX2, 4 elsewhere. Only what the compiler cannot derive well is spelled in intrinsics.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ASCEND_INLINE inline __attribute__((always_inline))
// For loops over an array of vectors: only a loop unrolled early lets the array live in registers.
#define ASCEND_UNROLL _Pragma("GCC unroll 16")

namespace ascend {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t Vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Vh __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Vhh __attribute__((vector_size(4 * kLanes)));
typedef int8_t Vb __attribute__((vector_size(kLanes)));

ASCEND_INLINE void prefetch_l2(const void *p) { __builtin_prefetch(p, 0, 2); }

template <class V>
ASCEND_INLINE V load(const void *p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
ASCEND_INLINE void store(void *p, V v) {
  memcpy(p, &v, sizeof v);
}
ASCEND_INLINE Vf splat(float x) { return x - Vf{}; }
ASCEND_INLINE Vi splat(int32_t x) { return x - Vi{}; }

namespace detail {
struct LowBytes {
  uint8_t index[64] = {};
  // In turns: of the first integer of each vector, then of the second ones, and so on.
  explicit constexpr LowBytes(bool in_turns) {
    for (int i = 0; i < 64; ++i) {
      index[i] = (uint8_t)(in_turns ? i % 2 * 64 + i / 2 * 4 % 64 : 4 * i % 128);
    }
  }
};
}  // namespace detail

// Written out, as gcc 12 converts 16 of them in two parts.
ASCEND_INLINE Vu widen_halves(Vh x) {
#if defined(__AVX512F__)
  return (Vu)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, Vu);
#endif
}
namespace detail {
template <int Half, size_t... I>
ASCEND_INLINE Vh half(Vhh x, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, ((int)I + Half * kLanes)...);
}
}  // namespace detail
// The low halves; written out for the same reason.
ASCEND_INLINE Vh narrow_to_halves(Vu x) {
#if defined(__AVX512F__)
  return (Vh)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i low = (__m256i)(x & 0xffff);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return (Vh)_mm256_castsi256_si128(packed);
#else
  return __builtin_convertvector(x, Vh);
#endif
}
namespace detail {
template <size_t... I>
ASCEND_INLINE Vhh high_halves(Vhh a, Vhh b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * (int)I + 1)...);
}
}  // namespace detail
// The high halves of two vectors, side by side.
ASCEND_INLINE Vhh high_halves(Vu a, Vu b) {
  return detail::high_halves((Vhh)a, (Vhh)b, std::make_index_sequence<2 * kLanes>{});
}
// Written out, as gcc 12 converts bytes one by one.
ASCEND_INLINE Vf widen_bytes(Vb x) {
#if defined(__AVX512F__)
  return (Vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#elif defined(__AVX2__)
  return (Vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)x)));
#else
  return __builtin_convertvector(x, Vf);
#endif
}
// Nearest integers, which must lie within [-128, 127]; 0 for NaN.
ASCEND_INLINE Vb narrow_to_bytes(Vf x) {
#if defined(__AVX512F__)
  return (Vb)_mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x));  // NaN: the low byte of INT_MIN
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtps_epi32((__m256)(x == x ? x : Vf{}));
  const __m128i half =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return (Vb)_mm_cvtsi128_si64(_mm_packs_epi16(half, half));
#else
  const Vf magic = splat(12582912.0f);  // leaves the nearest integer in the low bits
  return __builtin_convertvector((Vi)((x == x ? x : Vf{}) + magic), Vb);
#endif
}

// `Count` vectors side by side; the same rules. kSplit: two vectors, of even and odd numbers.
template <int Count, bool kSplit = false>
ASCEND_INLINE void narrow(const Vf *x, char *out) {
#if defined(__AVX512VBMI__)
  if constexpr (Count == 2) {
    // The low bytes of 32 integers. Shorter than narrowing each.
    alignas(64) static constexpr detail::LowBytes kLowBytes(kSplit);
    const __m512i codes =
        _mm512_permutex2var_epi8(_mm512_cvtps_epi32((__m512)x[0]), _mm512_load_si512(&kLowBytes),
                                 _mm512_cvtps_epi32((__m512)x[1]));
    _mm256_storeu_si256((__m256i *)out, _mm512_castsi512_si256(codes));
    return;
  }
#endif
  static_assert(!kSplit || Count == 2);
  for (int i = 0; i < Count; ++i) store(out + i * kLanes, narrow_to_bytes(x[i]));
}

// Where either operand is NaN the second wins, in both and on every ISA: callers put the value
// whose NaN must survive there.
ASCEND_INLINE Vf vmax(Vf a, Vf b) {
#if defined(__AVX512F__)
  return (Vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

ASCEND_INLINE Vf vmin(Vf a, Vf b) {
#if defined(__AVX512F__)
  return (Vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// a * b + c with one rounding where the instruction set has it, and never otherwise contracted: for
// results that must not depend on which of two products the compiler fuses with their sum.
ASCEND_INLINE Vf fused(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return (Vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

namespace detail {
// Lanes whose numbers differ in one bit change places: cheaper than a rotation below 128 bits.
template <int Bit, size_t... I>
ASCEND_INLINE Vf exchange(Vf v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ Bit)...);
}
// One step of the tree that sums across lanes: adding the two halves (Odd = 0, 1) of a and b halves
// the partial sums of each. Inside 128 bits the order is that of unpacklo and unpackhi, above that
// it is by 128-bit lanes, so that every step is one cheap shuffle and the result comes out in
// order.
constexpr int half_index(int lane, int unit, int odd) {
  if (unit < 4) {
    const int in_quad = lane % 4, from_b = in_quad / unit % 2;
    const int source = in_quad % unit + in_quad / (2 * unit) * unit + odd * 2;
    return from_b * kLanes + lane / 4 * 4 + source;
  }
  const int half = kLanes / 2, from_b = lane / half, quad = lane % half / 4;
  return from_b * kLanes + (2 * quad + odd) * 4 + lane % 4;
}
template <int Unit, int Odd, size_t... I>
ASCEND_INLINE Vf half_of(Vf a, Vf b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, half_index(I, Unit, Odd)...);
}
template <int R, size_t... I>
ASCEND_INLINE Vi lane_tokens(std::index_sequence<I...>) {
  return Vi{(int32_t)(I / R)...};
}
}  // namespace detail

using LaneSequence = std::make_index_sequence<kLanes>;

// A vector holds kLanes / R tokens x R rows. These reduce over the tokens, replicated to all lanes.
template <int R, int Step = kLanes / 2>
ASCEND_INLINE Vf max_over_tokens(Vf v) {
  if constexpr (Step >= R) {
    v = vmax(v, detail::exchange<Step>(v, LaneSequence{}));
    return max_over_tokens<R, Step / 2>(v);
  }
  return v;
}
template <int R, int Step = kLanes / 2>
ASCEND_INLINE Vf sum_over_tokens(Vf v) {
  if constexpr (Step >= R) {
    v = v + detail::exchange<Step>(v, LaneSequence{});
    return sum_over_tokens<R, Step / 2>(v);
  }
  return v;
}
// The token, within its vector, that each lane belongs to.
template <int R>
ASCEND_INLINE Vi lane_tokens() {
  return detail::lane_tokens<R>(LaneSequence{});
}

// Combines the lanes of each of kLanes vectors: lane i of the result is that of v[i]. Destroys v.
template <int Unit = 1, class Combine>
ASCEND_INLINE Vf across_lanes(Vf *v, const Combine &combine) {
  if constexpr (Unit == kLanes) {
    return v[0];
  } else {
    constexpr int kCount = kLanes / Unit;
    ASCEND_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      v[i] = combine(detail::half_of<Unit, 0>(v[2 * i], v[2 * i + 1], LaneSequence{}),
                     detail::half_of<Unit, 1>(v[2 * i], v[2 * i + 1], LaneSequence{}));
    }
    return across_lanes<2 * Unit>(v, combine);
  }
}
ASCEND_INLINE Vf horizontal_sums(Vf *v) {
  return across_lanes(v, [](Vf a, Vf b) { return a + b; });
}

// Bit i: whether lane i is not zero.
ASCEND_INLINE uint32_t lanes_where(Vi condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)(condition[i] != 0) << i;
  return bits;
#endif
}

// 2^r on [-1/2, 1/2]: minimax of degree 6, relative error 2e-9 before rounding, exactly 1 at 0.
ASCEND_INLINE Vf exp2_fraction(Vf r) {
  Vf p = splat(1.534581178e-4f);
  p = p * r + 1.339993142e-3f;
  p = p * r + 9.618488960e-3f;
  p = p * r + 5.550328776e-2f;
  p = p * r + 2.402264689e-1f;
  p = p * r + 6.931472057e-1f;
  return p * r + 1.0f;
}

// e^x for x <= 0. Exactly 0 from about -87 (-104 on AVX-512) down to -inf; NaN stays NaN.
ASCEND_INLINE Vf exp_nonpositive(Vf x) {
  constexpr float kLog2e = 1.44269504f;
#if defined(__AVX512F__)
  const Vf t = vmax(splat(-110.0f), x) * kLog2e;
  const Vf n = (Vf)_mm512_roundscale_ps((__m512)t, 0);
  return (Vf)_mm512_scalef_ps((__m512)exp2_fraction(t - n), (__m512)n);
#else
  // Adding 1.5 * 2^23 leaves round(t) in the low bits of the mantissa.
  const Vf magic = splat(12582912.0f);
  const Vf t = (x < -87.0f ? splat(-87.0f) : x) * kLog2e;
  const Vf shifted = t + magic;
  const Vf p = exp2_fraction(t - (shifted - magic));
  const Vf scaled = (Vf)((Vi)p + ((Vi)shifted << 23));
  return x < -87.0f ? Vf{} : (x <= 0.0f ? scaled : x);
#endif
}

// The same with a relative error of 2e-7 however far x lies from 0, where exp_nonpositive has 6e-8
// times |x|: x is reduced by a multiple of ln 2 in two parts, the first of which has few bits.
ASCEND_INLINE Vf precise_exp_nonpositive(Vf x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
#if defined(__AVX512F__)
  const Vf bounded = vmax(splat(-110.0f), x);
  const Vf n = (Vf)_mm512_roundscale_ps((__m512)(bounded * kLog2e), 0);
  const Vf r = (bounded - n * kLn2High) - n * kLn2Low;
  return (Vf)_mm512_scalef_ps((__m512)exp2_fraction(r * kLog2e), (__m512)n);
#else
  const Vf magic = splat(12582912.0f);
  const Vf bounded = x < -87.0f ? splat(-87.0f) : x;
  const Vf shifted = bounded * kLog2e + magic;
  const Vf n = shifted - magic;
  const Vf r = (bounded - n * kLn2High) - n * kLn2Low;
  const Vf scaled = (Vf)((Vi)exp2_fraction(r * kLog2e) + ((Vi)shifted << 23));
  return x < -87.0f ? Vf{} : (x <= 0.0f ? scaled : x);
#endif
}

ASCEND_INLINE Vf tanh(Vf x) {
  const Vi sign = (Vi)x & (int32_t)0x80000000;
  const Vf magnitude = (Vf)((Vi)x & 0x7fffffff);
  const Vf e = exp_nonpositive(-2.0f * magnitude);
  return (Vf)((Vi)((1.0f - e) / (1.0f + e)) | sign);
}

}  // namespace ascend
