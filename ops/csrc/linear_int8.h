// Products of int8 rows with int8 weights, exact in 32 bits.
#pragma once

#include "linear_panel.h"
#include "linear_weights.h"

namespace ascend {

// Per instruction set: kPerWord panel elements stand for a word (4 k) of a row; `encode` makes
// them, `multiply` adds the products of a word of kLanes columns; kShift was added to x.
#if defined(__AVX512VNNI__)
struct Int8Products {
  using Element = uint32_t;
  static constexpr int kPerWord = 1, kShift = 128;
  // Added to four bytes by flipping their signs; vpdpbusd wants one operand unsigned.
  static constexpr uint32_t kShiftOfWord = 0x80808080u;
  static ASCEND_INLINE void encode(const int8_t *x, Element *out) {
    uint32_t word;
    memcpy(&word, x, 4);
    *out = word ^ kShiftOfWord;
  }
  static ASCEND_INLINE Vi multiply(Vi acc, Vi word, const Element *x) {
    return (Vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32((int)*x), (__m512i)word);
  }
};
#elif defined(__AVX2__)
struct Int8Products {
  using Element = uint32_t;
  // vpmaddubsw would saturate: even and odd k are widened to 16 bits instead.
  static constexpr int kPerWord = 2, kShift = 0;
  static ASCEND_INLINE void encode(const int8_t *x, Element *out) {
    for (int odd = 0; odd < 2; ++odd) {
      out[odd] = (uint16_t)(int16_t)x[odd] | (uint32_t)(uint16_t)(int16_t)x[2 + odd] << 16;
    }
  }
  static ASCEND_INLINE Vi multiply(Vi acc, Vi word, const Element *x) {
    const __m256i w = (__m256i)word;
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
    const __m256i odd = _mm256_srai_epi16(w, 8);
    acc += (Vi)_mm256_madd_epi16(even, _mm256_set1_epi32((int)x[0]));
    return acc + (Vi)_mm256_madd_epi16(odd, _mm256_set1_epi32((int)x[1]));
  }
};
#else
struct Int8Products {
  using Element = int32_t;
  static constexpr int kPerWord = 4, kShift = 0;
  static ASCEND_INLINE void encode(const int8_t *x, Element *out) {
    for (int i = 0; i < 4; ++i) out[i] = x[i];
  }
  static ASCEND_INLINE Vi multiply(Vi acc, Vi word, const Element *x) {
    acc += (word << 24 >> 24) * splat(x[0]);
    acc += (word << 16 >> 24) * splat(x[1]);
    acc += (word << 8 >> 24) * splat(x[2]);
    return acc + (word >> 24) * splat(x[3]);
  }
};
#endif

// Panels: [words][rows][kPerWord]; rows and k beyond the end are x = 0.
struct Int8Panel {
  using Element = Int8Products::Element;

  static void fill(const Panel &panel, const int8_t *x, int64_t stride, int m, int64_t k,
                   Element *out) {
    const int64_t words = (k + 3) / 4;
    int r = 0;
#if defined(__AVX512VNNI__)
    for (; r + 4 <= panel.rows && panel.first + r + 4 <= m; r += 4) {
      const int8_t *rows = x + (panel.first + r) * stride;
      const int64_t turned = turn_rows((const char *)rows, stride, k / 4, panel.rows, out + r,
                                       [](auto four) { return four ^ Int8Products::kShiftOfWord; });
      for (int j = 0; j < 4; ++j) {
        fill_row(panel, r + j, rows + j * stride, {turned, words, k}, out);
      }
    }
#endif
    for (; r < panel.rows; ++r) {
      const int row = panel.first + r;
      fill_row(panel, r, x + row * stride, {0, words, row < m ? k : 0}, out);
    }
  }

 private:
  // Words [begin, end) of a row with so many numbers.
  struct Words {
    int64_t begin, end, numbers;
  };
  static void fill_row(const Panel &panel, int r, const int8_t *row, const Words &words,
                       Element *out) {
    Element *to = out + (words.begin * panel.rows + r) * Int8Products::kPerWord;
    for (int64_t w = words.begin; w < words.end; ++w, to += panel.rows * Int8Products::kPerWord) {
      int8_t four[4] = {};
      const int64_t count = std::min<int64_t>(4, words.numbers - 4 * w);
      if (count == 4) {
        Int8Products::encode(row + 4 * w, to);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) four[i] = row[4 * w + i];
      Int8Products::encode(four, to);
    }
  }
};

// totals [R][32]: rows of a panel times a block of columns, `words` words of k. Added to what is
// there, or, if these are the first words, instead of it.
template <int R>
void int8_block(const char *weights, const void *panel, int64_t words, bool begins,
                int32_t *totals) {
  constexpr int kPerWord = Int8Products::kPerWord, kVectors = 2;
  for (int first = 0; first < kBlockColumns / kLanes; first += kVectors) {
    const auto *x = (const Int8Panel::Element *)panel;
    const char *from = weights + first * (int64_t)sizeof(Vi);
    Vi acc[R][kVectors];
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      ASCEND_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Vi{};
    }
    for (int64_t w = 0; w < words; ++w) {
      __builtin_prefetch(from + kPrefetchBytes);
      if (kLanes == 16) __builtin_prefetch(from + kPrefetchBytes + 64);
      const Vi word[kVectors] = {load<Vi>(from), load<Vi>(from + sizeof(Vi))};
      ASCEND_UNROLL
      for (int r = 0; r < R; ++r) {
        ASCEND_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] = Int8Products::multiply(acc[r][v], word[v], x + r * kPerWord);
        }
      }
      from += 4 * kBlockColumns;
      x += R * kPerWord;
    }
    ASCEND_UNROLL
    for (int r = 0; r < R; ++r) {
      ASCEND_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        int32_t *total = totals + r * kBlockColumns + (first + v) * kLanes;
        store(total, begins ? acc[r][v] : load<Vi>(total) + acc[r][v]);
      }
    }
  }
}

}  // namespace ascend
