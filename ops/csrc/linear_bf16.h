// Products of bfloat16 rows with integer weights, on AVX512-BF16. Integers up to 256 are exact in
// bfloat16, so scales stay out of the products and meet their sums.
#pragma once

#include "linear_panel.h"
#include "linear_weights.h"

#if defined(__AVX512BF16__)

namespace ascend {

// A Vf pair per row: the 32 columns of a block.
using Bf16Pairs = __m512bh;

struct NibblePairs {
  static constexpr int kStepPairs = 4;
  const __m512i table;
  NibblePairs() : table(_mm512_loadu_si512(kTable)) {}

  // Pair `j` of a step of vector `c`. vpermw looks at 5 bits, so the table is there twice and the
  // nibble need not be cut out.
  template <int J>
  ASCEND_INLINE Bf16Pairs pair(const __m512i &step) const {
    const __m512i index = J ? _mm512_srli_epi16(step, 4 * J) : step;
    return (Bf16Pairs)_mm512_permutexvar_epi16(index, table);
  }

 private:
  // 0 to 7, then -8 to -1, as bfloat16.
  static constexpr uint16_t kTable[32] = {
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
      0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
      0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
};

struct BytePairs {
  static constexpr int kStepPairs = 2;

  // A byte b becomes the float 2^23 + (b xor 128), of which 2^23 + 128 is taken away; an integer's
  // float has nothing in its lower half, where the other one goes.
  template <int J>
  ASCEND_INLINE Bf16Pairs pair(const __m512i &step) const {
    const __m512i low = widen<2 * J>(step), high = widen<2 * J + 1>(step);
    return (Bf16Pairs)_mm512_or_si512(high, _mm512_srli_epi32(low, 16));
  }

 private:
  template <int Byte>
  static ASCEND_INLINE __m512i widen(const __m512i &step) {
    const __m512i one = _mm512_set1_epi32(Byte);
    const __m512i lanes = _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0);
    const __m512i biased = _mm512_xor_si512(step, _mm512_set1_epi8((char)0x80));
    const __m512i number = _mm512_mask_shuffle_epi8(
        _mm512_set1_epi32(0x4b000000), 0x1111111111111111ull, biased, _mm512_add_epi32(lanes, one));
    return (__m512i)_mm512_sub_ps((__m512)number, _mm512_set1_ps(8388736.0f));
  }
};

// Weights that are bfloat16 already: [k / 2][32] pairs.
struct TilePairs {
  static constexpr int kStepPairs = 1;
  template <int J>
  ASCEND_INLINE Bf16Pairs pair(const __m512i &step) const {
    return (Bf16Pairs)step;
  }
};

constexpr int64_t kStepBytes = 2 * 64;  // a step of all 32 columns

// acc[r][c] += rows r of x times 16 columns c, over `steps` steps.
template <class Source, int R, int Chains>
struct Bf16Block {
  static constexpr int kRows = R;
  __m512 acc[Chains][R][2];

  ASCEND_INLINE void clear() {
    ASCEND_UNROLL
    for (int i = 0; i < Chains; ++i) {
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) acc[i][r][0] = acc[i][r][1] = _mm512_setzero_ps();
    }
  }

  template <int J>
  ASCEND_INLINE void pairs(const Source &source, const __m512i &a, const __m512i &b,
                           const uint32_t *x) {
    if constexpr (J < Source::kStepPairs) {
      const Bf16Pairs wa = source.template pair<J>(a), wb = source.template pair<J>(b);
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) {
        const Bf16Pairs value = (Bf16Pairs)_mm512_set1_epi32((int)x[J * R + r]);
        acc[J % Chains][r][0] = _mm512_dpbf16_ps(acc[J % Chains][r][0], wa, value);
        acc[J % Chains][r][1] = _mm512_dpbf16_ps(acc[J % Chains][r][1], wb, value);
      }
      pairs<J + 1>(source, a, b, x);
    }
  }

  ASCEND_INLINE void run(const Source &source, const uint32_t *x, const char *weights,
                         int64_t steps) {
    for (int64_t i = 0; i < steps; ++i) {
      if (Source::kStepPairs > 1) {
        _mm_prefetch(weights + kPrefetchBytes, _MM_HINT_T0);
        _mm_prefetch(weights + kPrefetchBytes + 64, _MM_HINT_T0);
      }
      const __m512i a = _mm512_loadu_si512(weights), b = _mm512_loadu_si512(weights + 64);
      pairs<0>(source, a, b, x);
      weights += kStepBytes;
      x += Source::kStepPairs * R;
    }
  }

  ASCEND_INLINE __m512 sum(int r, int c) const {
    __m512 total = acc[0][r][c];
    ASCEND_UNROLL
    for (int i = 1; i < Chains; ++i) total = _mm512_add_ps(total, acc[i][r][c]);
    return total;
  }
};

// totals [R][32] += scales of a group times (the sums of products - zero points * sums of rows).
template <class Block, int R = Block::kRows>
ASCEND_INLINE void add_scaled(Block &block, const BlockWork &work, int64_t group, const float *sums,
                              float *totals) {
  const Vf scale[2] = {work.scale(group, 0), work.scale(group, 1)};
  Vf products[R][2];
  ASCEND_UNROLL
  for (int r = 0; r < R; ++r) {
    products[r][0] = (Vf)block.sum(r, 0);
    products[r][1] = (Vf)block.sum(r, 1);
  }
  if (sums) {
    const Vf zero[2] = {work.zero(group, 0), work.zero(group, 1)};
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      products[r][0] -= zero[0] * sums[group * R + r];
      products[r][1] -= zero[1] * sums[group * R + r];
    }
  }
  // Totals stay in memory: kept in registers over groups, they would be spilled around each.
  asm volatile("" ::: "memory");
  ASCEND_UNROLL
  for (int r = 0; r < R; ++r) {
    float *total = totals + r * kBlockColumns;
    store(total, load<Vf>(total) + products[r][0] * scale[0]);
    store(total + kLanes, load<Vf>(total + kLanes) + products[r][1] * scale[1]);
  }
}

// Columns of one block times one panel, from k `begin` to `end`; adds to totals [rows][32].
template <class Source, int R>
void bf16_block(const BlockWork &work, const void *panel, const float *sums, float *totals) {
  constexpr int kChains = R == 1 ? 4 : R <= 3 ? 2 : 1;
  constexpr int kUsed = kChains < Source::kStepPairs ? kChains : Source::kStepPairs;
  const Source source;
  const uint32_t *x = (const uint32_t *)panel + work.begin / 2 * R;
  const char *weights = work.weights;
  for (int64_t k = work.begin; k < work.end;) {
    const int64_t next = work.group_end(k), group = work.group_of(k);
    const int64_t steps = (next - k) / (2 * Source::kStepPairs);
    Bf16Block<Source, R, kUsed> block;
    block.clear();
    block.run(source, x, weights, steps);
    x += (next - k) / 2 * R;
    weights += steps * kStepBytes;
    add_scaled(block, work, group, work.begins_group(k) ? sums : nullptr, totals);
    k = next;
  }
}

// Nibbles or bytes of columns and k [begin, end) as bfloat16, for TilePairs.
template <class Source>
void bf16_tile(const char *weights, int64_t count, void *out) {
  const Source source;
  __m512i *to = (__m512i *)out;
  constexpr int kPairs = Source::kStepPairs;
  for (int64_t k = 0; k < count; k += 2 * kPairs, weights += kStepBytes) {
    const __m512i step[2] = {_mm512_loadu_si512(weights), _mm512_loadu_si512(weights + 64)};
    ASCEND_UNROLL
    for (int c = 0; c < 2; ++c, ++to) {
      _mm512_store_si512(to, (__m512i)source.template pair<0>(step[c]));
      _mm512_store_si512(to + 2, (__m512i)source.template pair<1>(step[c]));
      if constexpr (kPairs == 4) {
        _mm512_store_si512(to + 4, (__m512i)source.template pair<2>(step[c]));
        _mm512_store_si512(to + 6, (__m512i)source.template pair<3>(step[c]));
      }
    }
    to += 2 * (kPairs - 1);
  }
}

}  // namespace ascend

#endif
