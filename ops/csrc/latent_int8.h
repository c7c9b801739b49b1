// The kernel for int8 latents with AVX512-VNNI: lanes along query rows, four codes of a token (a
// quad) broadcast to all of them. Queries and weights become unsigned integers: 16 bits in two
// 8-bit halves (exact: the error is invisible beside that of the page), or 8 bits.
//
// vpdpbusd multiplies unsigned by signed bytes, and codes are the signed operand, straight from the
// page. An offset makes the query unsigned; its product with the sum of a token's codes is
// subtracted again. Rotary parts are bfloat16 and go through the wide kernel.
//
// query: rotary part as in the wide kernel, then [column / 4][group][part][row][4];
// weights: [group][token / 4][part][row][4]; values: [column / 16][token / 4][column % 16][4].
#pragma once

#include "latent.h"
#include "narrow_int8.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)

namespace ascend {

ASCEND_INLINE __m512i broadcast_quad(const char *p) { return broadcast_pair(p); }

template <bool kExact>
struct LatentInt8 : Wide<Bfloat16, Bf16Source> {
  using Base = Wide<Bfloat16, Bf16Source>;
  static constexpr int kParts = kExact ? 2 : 1;
  static constexpr int kBits = 8 * kParts;
  static constexpr int kPartBytes = kLanes * 4;
  static constexpr int64_t kValuePlane = kTileTokens * 16;  // bytes
  static constexpr int kQuery = kMaxRows * kMaxRotaryDim;   // where the integers begin, floats

  static uint8_t *integers(State &state) { return (uint8_t *)(state.query + kQuery); }

  static void pack_query(const LatentShape &shape, State &state, int row, const float *query) {
    Base::pack_query(shape.rotary, state, row, query + shape.latent.head_dim);
    const int dim = shape.latent.head_dim, offset = 1 << (kBits - 1);
    float top = 0, poison = 0;
    for (int d = 0; d < dim; ++d) {
      top = std::max(top, fabsf(query[d]));
      poison += query[d] * 0.0f;  // NaN if anything is not finite
    }
    const float limit = (float)(offset - 1);
    const float inverse = top >= 0x1p-100f && top < 0x1p120f ? limit / top : 0.0f;
    alignas(64) int32_t values[kMaxLatentDim];
    for (int d = 0; d < dim; ++d) values[d] = (int32_t)lrintf(query[d] * inverse) + offset;
    uint8_t *out = integers(state) + row / kLanes * kParts * kPartBytes + row % kLanes * 4;
    const int64_t stride = (int64_t)state.groups * kParts * kPartBytes;
    for (int d = 0; d < dim; d += 4, out += stride) {
      const __m128i four = _mm_load_si128((const __m128i *)(values + d));
      const __m128i high = _mm_srli_epi32(four, kBits - 8);
      const int32_t bytes = _mm_cvtsi128_si32(_mm_cvtepi32_epi8(high));
      memcpy(out, &bytes, 4);
      if constexpr (kExact) {
        const int32_t low = _mm_cvtsi128_si32(_mm_cvtepi32_epi8(four));
        memcpy(out + kPartBytes, &low, 4);
      }
    }
    state.query_unit[row] = top / limit * shape.latent.scale + poison;
  }

  // Quads of tokens per column, for the values, and the sums of the tokens' codes.
  static void stage_values(const Shape &shape, const LatentTile &tile, State &state) {
    const __m512i left = _mm512_load_si512(kQuadTables.columns[0]);
    const __m512i right = _mm512_load_si512(kQuadTables.columns[1]);
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i half = _mm512_broadcast_i64x4(_mm256_set_epi64x(0, 0, -1, -1));
    const int planes = shape.planes32();
    char *out = (char *)state.k_stage;
    for (int t = tile.first; t < tile.last; t += 4) {
      __m512i low = _mm512_setzero_si512(), high = low;
      const char *row = tile.k + t * kRowBytes, *next = tile.next_k + t * kRowBytes;
      char *to = out + (t - tile.first) * 16;
      for (int p = 0; p < planes; ++p, row += shape.plane_bytes, next += shape.plane_bytes) {
        const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + 64);
        if (tile.next_k) prefetch_l2(next), prefetch_l2(next + 64);
        // What padding columns hold is undefined.
        const bool padded = p * 32 + 32 > shape.head_dim;
        const __m512i counted = padded ? _mm512_and_si512(ones, half) : ones;
        low = _mm512_dpbusd_epi32(low, counted, a);
        high = _mm512_dpbusd_epi32(high, counted, b);
        _mm512_store_si512(to + 2 * p * kValuePlane, _mm512_permutex2var_epi8(a, left, b));
        _mm512_store_si512(to + (2 * p + 1) * kValuePlane, _mm512_permutex2var_epi8(a, right, b));
      }
      int32_t *sums = state.token_sum + t - tile.first;
      for (const __m512i both : {low, high}) {
        *sums++ = sum_of_eight(_mm512_castsi512_si256(both));
        *sums++ = sum_of_eight(_mm512_extracti64x4_epi64(both, 1));
      }
    }
  }

  static ASCEND_INLINE int32_t sum_of_eight(__m256i x) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }

  // Adds the products with the latents to the scores of kTokens tokens and N groups.
  template <int N, int kTokens>
  static ASCEND_INLINE void score_latents(const Shape &shape, const LatentTile &tile, State &state,
                                          int group, int token) {
    __m512i acc[kParts][N][kTokens];
    ASCEND_UNROLL
    for (int part = 0; part < kParts; ++part) {
      ASCEND_UNROLL
      for (int g = 0; g < N; ++g) {
        ASCEND_UNROLL
        for (int t = 0; t < kTokens; ++t) acc[part][g][t] = _mm512_setzero_si512();
      }
    }
    const uint8_t *query = integers(state) + group * kParts * kPartBytes;
    const int64_t stride = (int64_t)state.groups * kParts * kPartBytes;
    const char *row = tile.k + (tile.first + token) * kRowBytes;
    for (int d = 0; d < shape.head_dim; d += 16) {
      const char *columns = row + d / 32 * shape.plane_bytes + d % 32;
      ASCEND_UNROLL
      for (int u = 0; u < 4; ++u, query += stride) {
        __m512i q[kParts][N];
        ASCEND_UNROLL
        for (int g = 0; g < N; ++g) {
          ASCEND_UNROLL
          for (int part = 0; part < kParts; ++part) {
            q[part][g] = _mm512_load_si512(query + (g * kParts + part) * kPartBytes);
          }
        }
        ASCEND_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const __m512i k = broadcast_quad(columns + t * kRowBytes + u * 4);
          ASCEND_UNROLL
          for (int g = 0; g < N; ++g) {
            ASCEND_UNROLL
            for (int part = 0; part < kParts; ++part) {
              acc[part][g][t] = _mm512_dpbusd_epi32(acc[part][g][t], q[part][g], k);
            }
          }
        }
      }
    }
    const int tokens = tile.last - tile.first;
    ASCEND_UNROLL
    for (int g = 0; g < N; ++g) {
      float *scores = state.scores + ((group + g) * tokens + token) * kLanes;
      const Vf unit = load<Vf>(state.query_unit + (group + g) * kLanes);
      ASCEND_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Vi biased = (Vi)acc[0][g][t] - 128 * state.token_sum[token + t];
        Vf product = __builtin_convertvector(biased, Vf);
        if constexpr (kExact) {
          product = product * 256.0f + __builtin_convertvector((Vi)acc[1][g][t], Vf);
        }
        const float scale = tile.k_scales ? tile.k_scales[tile.first + token + t] : 1.0f;
        store(scores + t * kLanes, load<Vf>(scores + t * kLanes) + product * (unit * scale));
      }
    }
  }

  static void score(const LatentShape &shape, const LatentTile &tile, State &state) {
    LatentTile rotary = tile;
    rotary.k = tile.rotary;
    rotary.next_k = tile.next_k ? tile.next_k + (tile.rotary - tile.k) : nullptr;
    Base::score(shape.rotary, rotary, state);
    const int tokens = tile.last - tile.first;
    constexpr int kLone = kExact ? 8 : 16, kFew = kExact ? 4 : 8;
    for (int t = 0; t < tokens; t += kLone) {
      if (state.groups == 1) score_latents<1, kLone>(shape.latent, tile, state, 0, t);
    }
    for (int t = 0; t < tokens && state.groups > 1; t += kFew) {
      score_latents<2, kFew>(shape.latent, tile, state, 0, t);
      if (state.groups == 3) score_latents<1, kFew>(shape.latent, tile, state, 2, t);
    }
  }

  // Float weights times their tokens' scales, as integers relative to the greatest of the tile.
  static void quantise_weights(const LatentTile &tile, State &state, int group) {
    constexpr float kLimit = kExact ? 65535.0f : 255.0f;
    const int tokens = tile.last - tile.first;
    float *weights = state.scores + group * tokens * kLanes;
    Vf top = splat(1e-30f), poison{};
    for (int t = 0; t < tokens; ++t) {
      Vf w = load<Vf>(weights + t * kLanes);
      if (tile.k_scales) {
        // A token that a row does not see has weight 0; its scale may be anything.
        w = w == 0.0f ? Vf{} : w * tile.k_scales[tile.first + t];
        store(weights + t * kLanes, w);
      }
      top = vmax(w, top);
      poison += w * 0.0f;  // NaN if a weight is
    }
    store(state.weight_unit + group * kLanes, top * (1.0f / kLimit) + poison);
    const Vf inverse = kLimit / top;
    uint8_t *out = (uint8_t *)state.weights + group * tokens * kParts * kLanes;
    for (int t = 0; t < tokens; t += 4, out += kParts * kPartBytes) {
      Vi parts[2] = {};
      ASCEND_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Vf w = load<Vf>(weights + (t + i) * kLanes) * inverse;
        const __m512i v =
            _mm512_min_epi32(_mm512_cvtps_epi32((__m512)w), _mm512_set1_epi32((int)kLimit));
        parts[0] |= (((Vi)v >> (kBits - 8)) & 255) << (8 * i);
        parts[1] |= ((Vi)v & 255) << (8 * i);
      }
      store(out, parts[0]);
      if constexpr (kExact) store(out + kPartBytes, parts[1]);
    }
  }

  // kCount columns of the output of N groups. Weights of tokens out of sight are 0.
  template <int N, int kCount>
  static ASCEND_INLINE void accumulate_columns(const LatentTile &tile, State &state, int group,
                                               int column) {
    __m512i acc[kParts][N][kCount];
    ASCEND_UNROLL
    for (int part = 0; part < kParts; ++part) {
      ASCEND_UNROLL
      for (int g = 0; g < N; ++g) {
        ASCEND_UNROLL
        for (int c = 0; c < kCount; ++c) acc[part][g][c] = _mm512_setzero_si512();
      }
    }
    const int tokens = tile.last - tile.first;
    const uint8_t *weights = (const uint8_t *)state.weights + group * tokens * kParts * kLanes;
    const char *row = (const char *)state.k_stage + column / 16 * kValuePlane + column % 16 * 4;
    for (int t = 0; t < tokens; t += 4, row += 64, weights += kParts * kPartBytes) {
      __m512i w[kParts][N];
      ASCEND_UNROLL
      for (int g = 0; g < N; ++g) {
        ASCEND_UNROLL
        for (int part = 0; part < kParts; ++part) {
          w[part][g] =
              _mm512_loadu_si512(weights + g * tokens * kParts * kLanes + part * kPartBytes);
        }
      }
      ASCEND_UNROLL
      for (int c = 0; c < kCount; ++c) {
        const __m512i v = broadcast_quad(row + c * 4);
        ASCEND_UNROLL
        for (int g = 0; g < N; ++g) {
          ASCEND_UNROLL
          for (int part = 0; part < kParts; ++part) {
            acc[part][g][c] = _mm512_dpbusd_epi32(acc[part][g][c], w[part][g], v);
          }
        }
      }
    }
    const int stride = state.groups * kLanes;
    ASCEND_UNROLL
    for (int g = 0; g < N; ++g) {
      const Vf decay = load<Vf>(state.decay + (group + g) * kLanes);
      const Vf unit = load<Vf>(state.weight_unit + (group + g) * kLanes);
      float *out = state.out + column * stride + (group + g) * kLanes;
      ASCEND_UNROLL
      for (int c = 0; c < kCount; ++c, out += stride) {
        Vi sum = (Vi)acc[0][g][c];
        if constexpr (kExact) sum = (sum << 8) + (Vi)acc[1][g][c];
        store(out, load<Vf>(out) * decay + __builtin_convertvector(sum, Vf) * unit);
      }
    }
  }

  static void accumulate(const Shape &shape, const LatentTile &tile, State &state) {
    constexpr int kLone = kExact ? 8 : 16, kFew = kExact ? 4 : 8;
    if (state.groups == 1) {
      for (int d = 0; d < shape.head_dim; d += kLone) {
        accumulate_columns<1, kLone>(tile, state, 0, d);
      }
      return;
    }
    for (int d = 0; d < shape.head_dim; d += kFew) {
      accumulate_columns<2, kFew>(tile, state, 0, d);
      if (state.groups == 3) accumulate_columns<1, kFew>(tile, state, 2, d);
    }
  }

  static void run_tile(const LatentShape &shape, const LatentTile &tile, State &state) {
    stage_values(shape.latent, tile, state);
    score(shape, tile, state);
    weigh<kLanes>(shape.latent, tile, state, false);
    for (int g = 0; g < state.groups; ++g) quantise_weights(tile, state, g);
    accumulate(shape.latent, tile, state);
  }
};

}  // namespace ascend

#endif  // AVX512-VNNI, VBMI and BF16
