// 4-bit residuals of outlier tokens (C8P). A patch is one more row of K or V, of small integers
// with a scale of its own, at the position of a token that has an int8 row already.
#pragma once

#include <algorithm>

#include "element.h"
#include "state.h"

namespace ascend {

struct Patch {
  int token;  // in the page
  float scale;
  const uint8_t *codes;
};

// Values of the 16 codes.
alignas(16) constexpr int8_t kPatchValues[2][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1},
    {0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64},
};

// Token n of a block has slot n % slots of a pool.
class PatchSlots {
 public:
  explicit PatchSlots(int slots) : slots_(slots), inverse_(slots ? (1u << 20) / slots + 1 : 0) {}
  int count() const { return slots_; }
  // Tokens are below 256 and slots at most 32, for which this product is the quotient.
  int of(int token) const { return token - (int)(token * inverse_ >> 20) * slots_; }
  // Tags are tokens plus one; 0: empty. Anything else is left over from another use of the memory.
  bool fits(int tag, int slot, int block_size) const {
    return tag >= 1 && tag <= block_size && of(tag - 1) == slot;
  }

 private:
  int slots_;
  uint32_t inverse_;
};

// Bit s: slot s of a pool is not empty.
ASCEND_INLINE uint32_t used_slots(const char *pool, int slots) {
#if defined(__AVX512BW__)
  const __m512i tags = _mm512_maskz_loadu_epi16(~0u >> (kMaxPatchSlots - slots), pool);
  return _mm512_test_epi16_mask(tags, tags);
#else
  uint32_t used = 0;
  for (int s = 0; s < slots; ++s) used |= (uint32_t)(load<int16_t>(pool + 2 * s) != 0) << s;
  return used;
#endif
}

// Patches of tokens [begin, end) of a page. Tags of tokens that are not visible yet may be stale.
inline int find_patches(const Shape &shape, const char *pool, int begin, int end, Patch *out) {
  const int slots = shape.patch_slots, code_bytes = shape.planes32() * 16;
  const PatchSlots place(slots);
  const char *scales = pool + slots * sizeof(int16_t);
  const char *codes = scales + slots * sizeof(float);
  int count = 0;
  for (uint32_t used = used_slots(pool, slots); used; used &= used - 1) {
    const int s = __builtin_ctz(used), tag = load<int16_t>(pool + s * sizeof(int16_t));
    if (tag <= begin || tag > end || place.of(tag - 1) != s) continue;
    out[count++] = {tag - 1, load<float>(scales + s * sizeof(float)),
                    (const uint8_t *)codes + s * code_bytes};
  }
  return count;
}

// Fetches what the tags of a run to come point to. The tags themselves should be in cache by now.
inline void prefetch_patches(const Shape &shape, const char *pool) {
  const int slots = shape.patch_slots, code_bytes = shape.planes32() * 16;
  const char *scales = pool + slots * sizeof(int16_t);
  const char *codes = scales + slots * sizeof(float);
  for (uint32_t used = used_slots(pool, slots); used; used &= used - 1) {
    const int s = __builtin_ctz(used);
    prefetch_l2(scales + s * sizeof(float));
    prefetch_l2(codes + s * code_bytes);
    prefetch_l2(codes + s * code_bytes + code_bytes - 1);
  }
}

// Integers of a patch, 32 columns of each of `planes` column groups.
inline void decode_patch(const Shape &shape, const uint8_t *codes, int8_t *out) {
  const int8_t *values = kPatchValues[shape.patch_code];
  const int planes = shape.planes32();
#if defined(__AVX2__)
  const __m128i table = _mm_load_si128((const __m128i *)values), low = _mm_set1_epi8(15);
  for (int p = 0; p < planes; ++p) {
    const __m128i both = _mm_loadu_si128((const __m128i *)(codes + p * 16));
    const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(both, low));
    const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), low));
    _mm_storeu_si128((__m128i *)(out + p * 32), _mm_unpacklo_epi8(even, odd));
    _mm_storeu_si128((__m128i *)(out + p * 32 + 16), _mm_unpackhi_epi8(even, odd));
  }
#else
  for (int i = 0; i < planes * 16; ++i) {
    out[2 * i] = values[codes[i] & 15];
    out[2 * i + 1] = values[codes[i] >> 4];
  }
#endif
}

}  // namespace ascend
