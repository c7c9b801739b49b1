// Activations of a quantised linear layer, re-ordered once per call: panels of `rows` rows that a
// micro-kernel reads from front to back. Everything beyond the last row or column is zero, so that
// kernels need no edges.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "element.h"
#include "scratch.h"

namespace ascend {

// Rows [first, first + rows) of the activations, counted in terms.
struct Panel {
  int first, rows;
  int64_t offset;  // of its first element
};

// A row of float16 or float32 is the exact sum of 2 or 3 rows of bfloat16 (8 bits of the
// significand each): its terms. Kernels multiply each term as a row of its own; the results are
// added at the end.
inline int bf16_terms(int dtype) {
  return dtype == ASCEND_BFLOAT16 ? 1 : dtype == ASCEND_FLOAT16 ? 2 : 3;
}

inline uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

inline float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// The leading 8 bits of x, which leave x; cut off, not rounded, so that nothing overflows. An
// infinity or NaN is wholly in the first term.
inline uint16_t take_term(float &x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7f800000) == 0x7f800000) {
    x = 0.0f;
    return (uint16_t)((u >> 16) | (u & 0x007fffff ? 0x40 : 0));
  }
  x -= bits_float(u & 0xffff0000);
  return (uint16_t)(u >> 16);
}

// Rows as panels, by the sizes a kernel set offers (descending): the greatest that fits, and for
// what is left the smallest that takes it.
inline std::vector<Panel> make_panels(int rows, const int *sizes, int count, int64_t k) {
  std::vector<Panel> panels;
  int64_t offset = 0;
  for (int row = 0; row < rows;) {
    int size = sizes[0];
    for (int i = 0; i < count && size > rows - row; ++i) {
      if (sizes[i] >= rows - row) size = sizes[i];
    }
    panels.push_back({row, size, offset});
    offset += size * k;
    row += size;
  }
  return panels;
}

// Panels that are multiplied together, and where their rows begin and end.
struct Band {
  const Panel *begin, *end;
  int64_t first, last;
};

// One of `count` bands of about as many panels each.
inline Band band_of(const std::vector<Panel> &panels, int64_t number, int64_t count) {
  const int64_t total = panels.size();
  const Panel *begin = panels.data() + number * total / count;
  const Panel *end = panels.data() + (number + 1) * total / count;
  return {begin, end, begin->first, end[-1].first + end[-1].rows};
}

// `words` words of four rows, turned in registers: word w of row j goes to out[w * panel_rows + j].
// Returns how many of the words were; whole fours are. stride: bytes.
template <class Change>
int64_t turn_rows(const char *rows, int64_t stride, int64_t words, int panel_rows, uint32_t *out,
                  const Change &change) {
  typedef uint32_t Words __attribute__((vector_size(16)));
  int64_t w = 0;
  for (; w + 4 <= words; w += 4) {
    Words v[4];
    for (int j = 0; j < 4; ++j) v[j] = change(load<Words>(rows + j * stride + 4 * w));
    const Words low01 = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5);
    const Words high01 = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
    const Words low23 = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
    const Words high23 = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
    const Words turned[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                             __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                             __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                             __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
    for (int j = 0; j < 4; ++j) store(out + (w + j) * panel_rows, turned[j]);
  }
  return w;
}

// A range of k, and where the numbers in it end: what follows is padding.
constexpr int64_t kPartDepth = 256;
struct Part {
  int64_t begin, end, numbers;
};

// [k / 2][rows] pairs of bfloat16.
struct Bf16Panel {
  using Element = uint16_t;

  static void fill(const Panel &panel, const char *x, int dtype, int64_t stride, int m, int64_t k,
                   int64_t padded_k, uint16_t *out) {
    const int terms = bf16_terms(dtype);
    // A part of all rows before the next part of any: their lines are still in the nearest cache.
    for (int64_t begin = 0; begin < padded_k; begin += kPartDepth) {
      const Part part{begin, std::min(padded_k, begin + kPartDepth),
                      std::min(k, begin + kPartDepth)};
      int r = 0;
      if (dtype == ASCEND_BFLOAT16) {
        for (; r + 4 <= panel.rows && panel.first + r + 4 <= m; r += 4) {
          copy_rows(panel, r, (const uint16_t *)x + (panel.first + r) * stride, stride, part, out);
        }
      }
      for (; r < panel.rows; ++r) {
        const int row = (panel.first + r) / terms, term = (panel.first + r) % terms;
        if (row >= m) {
          for (int64_t i = part.begin; i < part.end; i += 2) memset(at(out, panel, r, i), 0, 4);
        } else if (dtype == ASCEND_BFLOAT16) {
          copy_row(panel, r, (const uint16_t *)x + row * stride, part, out);
        } else {
          split_row(panel, r, x, dtype, row * stride, term, part, out);
        }
      }
    }
  }

  // Sums of each row per group: [groups][rows].
  static void sum(const Panel &panel, const uint16_t *x, int64_t padded_k, int64_t group,
                  float *sums) {
    for (int64_t k = 0; k < padded_k; k += 2) {
      float *to = sums + k / group * panel.rows;
      for (int r = 0; r < panel.rows; ++r, x += 2) {
        if (k % group == 0) to[r] = 0.0f;
        to[r] += Bfloat16::widen(x[0]) + Bfloat16::widen(x[1]);
      }
    }
  }

 private:
  static uint16_t *at(uint16_t *out, const Panel &panel, int r, int64_t k) {
    return out + (k / 2 * panel.rows + r) * 2 + k % 2;
  }
  // Four rows at once.
  static void copy_rows(const Panel &panel, int r, const uint16_t *rows, int64_t stride,
                        const Part &part, uint16_t *out) {
    const int64_t pairs = std::max<int64_t>(0, part.numbers - part.begin) / 2;
    const int64_t turned =
        turn_rows((const char *)(rows + part.begin), 2 * stride, pairs, panel.rows,
                  (uint32_t *)at(out, panel, r, part.begin), [](auto words) { return words; });
    const Part rest{part.begin + 2 * turned, part.end, part.numbers};
    for (int j = 0; j < 4; ++j) copy_row(panel, r + j, rows + j * stride, rest, out);
  }
  static void copy_row(const Panel &panel, int r, const uint16_t *row, const Part &part,
                       uint16_t *out) {
    const int64_t whole = part.numbers / 2 * 2;
    uint16_t *to = at(out, panel, r, part.begin);
    for (int64_t i = part.begin; i < whole; i += 2, to += 2 * panel.rows) memcpy(to, row + i, 4);
    for (int64_t i = std::max(part.begin, whole); i < part.end; ++i) {
      *at(out, panel, r, i) = i < part.numbers ? row[i] : 0;
    }
  }
  static void split_row(const Panel &panel, int r, const char *x, int dtype, int64_t offset,
                        int term, const Part &part, uint16_t *out) {
    float values[kPartDepth] = {};
    if (part.numbers > part.begin) {
      widen_row(dtype, x, offset + part.begin, (int)(part.numbers - part.begin), values);
    }
    for (int64_t i = part.begin; i < part.end; ++i) {
      uint16_t leading = 0;
      for (int t = 0; t <= term; ++t) leading = take_term(values[i - part.begin]);
      *at(out, panel, r, i) = leading;
    }
  }
};

// [k][rows] floats.
struct FloatPanel {
  using Element = float;

  static void fill(const Panel &panel, const char *x, int dtype, int64_t stride, int m, int64_t k,
                   int64_t padded_k, float *out) {
    float values[kPartDepth];
    for (int64_t begin = 0; begin < padded_k; begin += kPartDepth) {
      const int64_t end = std::min(padded_k, begin + kPartDepth);
      for (int r = 0; r < panel.rows; ++r) {
        const int row = panel.first + r;
        const int64_t numbers = row < m ? std::max<int64_t>(0, std::min(k, end) - begin) : 0;
        widen_row(dtype, x, row * stride + begin, (int)numbers, values);
        for (int64_t i = begin; i < end; ++i) {
          out[i * panel.rows + r] = i - begin < numbers ? values[i - begin] : 0.0f;
        }
      }
    }
  }

  static void sum(const Panel &panel, const float *x, int64_t padded_k, int64_t group,
                  float *sums) {
    for (int64_t k = 0; k < padded_k; ++k) {
      float *to = sums + k / group * panel.rows;
      for (int r = 0; r < panel.rows; ++r, ++x) to[r] = *x + (k % group ? to[r] : 0.0f);
    }
  }
};

}  // namespace ascend
