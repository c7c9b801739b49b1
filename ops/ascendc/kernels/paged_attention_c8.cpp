// paged_attention_c8: attention of 1 to 16 query tokens per sequence over int8 pages in NZ order.
//
//   query          T [tokens][heads][headDim], rows of tokens queryStride elements apart; T is
//                  bfloat16 or float16
//   pages          int8 [2 * numBlocks][kvHeads][headDim / 32][blockSize][32]: K of block 0, V of
//                  block 0, K of block 1, and so on
//   extras         c8d: float32 [2 * numBlocks][kvHeads][blockSize], scales of rows
//                  c8p: [2 * numBlocks][kvHeads] pools of slots = blockSize / 8 patches: tags int16
//                  [slots], scales float32 [slots], codes uint8 [slots][headDim / 2], padding of
//                  blockSize / 4 bytes
//                  c8s: not read
//   channelScales  c8s, c8p: float32 [2][kvHeads][headDim], K first; c8d: not read
//   blockTable     int32, row i of sequence i, tableStride apart
//   queryStartLoc  int32 [sequences + 1]; sequence i owns query rows from [i] to [i + 1]
//   seqLens        int32 [sequences], tokens of context with the new ones
//   out            T, as query, rows outStride apart; rows that see nothing become 0
//   workspace      attention_tiling::WorkspaceBytes, need not be initialised
//
// What codes mean is ops/quantise.py; what is computed is ops/paged_attention. Row j of n query
// tokens stands at p = length - n + j and sees tokens t < length with t <= p if causal and
// t > p - window if window > 0 (and t < p + window if not causal). A visible row with the scale NaN
// makes the result NaN; what no row sees has no influence, NaN included.
//
// Limits: headDim a multiple of 32 up to 256; blockSize a multiple of 16 up to 256; 1 to 16 query
// tokens; heads / kvHeads * maxQueryLen up to 256.
//
// How. The cube multiplies codes as they lie in the page. The query (c8d: rotated, c8s and c8p:
// times K's channel scales) has 16 bits per element and row, as two int8 halves that are two rows
// of the same multiplication; so have the weights after the softmax, which carry V's row scales.
// Sums of products are exact in int32, so beside float32 sums and exponentials the roundings are
// those of 16 bits: half a unit of (largest element of the row) / 32512, plus 1/32 of that.
//
// Patches (c8p) are further columns: int8 rows behind the tokens of a tile. K's give a score per
// slot, which is added to the score of the token that the tag names, times the patch's scale; V's
// get the weight of that token, times the scale. So both go through the same two multiplications.
//
// Division of work, steps and workspace: attention_tiling.h. Flags between cores:
// paged_attention_c8_common.h. Memory and flags inside the cores: paged_attention_c8_cube.h and
// paged_attention_c8_vector.h.
#include "paged_attention_c8_cube.h"
#include "paged_attention_c8_vector.h"

namespace paged_attention_c8 {

template <typename T, uint32_t kVariant>
__aicore__ inline void Run(const Arguments& a) {
  const attention_tiling::Geometry geometry = attention_tiling::MakeGeometry(
      a.heads, a.kvHeads, a.headDim, a.blockSize, a.maxQueryLen, a.window, kVariant);
  if ASCEND_IS_AIC {
    Cube<kVariant> cube;
    cube.Init(a, geometry);
    cube.Process();
  }
  if ASCEND_IS_AIV {
    Vector<T, kVariant> vector;
    vector.Init(a, geometry);
    vector.Process();
  }
}

}  // namespace paged_attention_c8

#define PAGED_ATTENTION_C8(NAME, TYPE, VARIANT)                                                   \
  extern "C" __global__ __aicore__ void NAME(                                                     \
      GM_ADDR query, GM_ADDR pages, GM_ADDR extras, GM_ADDR channelScales, GM_ADDR blockTable,    \
      GM_ADDR queryStartLoc, GM_ADDR seqLens, GM_ADDR out, GM_ADDR workspace, uint32_t sequences, \
      uint32_t heads, uint32_t kvHeads, uint32_t headDim, uint32_t blockSize, uint32_t numBlocks, \
      uint32_t tableStride, uint32_t queryStride, uint32_t outStride, uint32_t maxQueryLen,       \
      float scale, uint32_t window, uint32_t causal, uint32_t patchCode) {                        \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);                                            \
    paged_attention_c8::Run<TYPE, VARIANT>(                                                       \
        {query,       pages,     extras,    channelScales, blockTable,  queryStartLoc,            \
         seqLens,     out,       workspace, sequences,     heads,       kvHeads,                  \
         headDim,     blockSize, numBlocks, tableStride,   queryStride, outStride,                \
         maxQueryLen, scale,     window,    causal,        patchCode});                           \
  }

PAGED_ATTENTION_C8(paged_attention_c8d_bf16, bfloat16_t, paged_attention_c8::kC8d)
PAGED_ATTENTION_C8(paged_attention_c8d_fp16, half, paged_attention_c8::kC8d)
PAGED_ATTENTION_C8(paged_attention_c8s_bf16, bfloat16_t, paged_attention_c8::kC8s)
PAGED_ATTENTION_C8(paged_attention_c8s_fp16, half, paged_attention_c8::kC8s)
PAGED_ATTENTION_C8(paged_attention_c8p_bf16, bfloat16_t, paged_attention_c8::kC8p)
PAGED_ATTENTION_C8(paged_attention_c8p_fp16, half, paged_attention_c8::kC8p)
