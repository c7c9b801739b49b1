// kv_cache_write: K and V of new tokens into NZ pages, one launch for every kind of page.
//
// Inputs
//   key, value      bf16 or fp16; element (t, h, d) at t * stride + h * head_dim + d, so that views
//                   of a fused projection need no copy
//   slots           int64 [tokens]: block * block_size + offset; negative ones, and those beyond
//   the
//                   pages, are skipped; all others are distinct
//   channel_scales  float32 [2 (K, V), kv_heads, head_dim]; c8s and c8p
//   k_threshold, v_threshold, patch_code (0: int4, 1: e3m0)    c8p
// Outputs
//   pages           planes (K of block 0, V of block 0, K of block 1 ...), each
//                   [kv_heads, head_dim / C0, block_size, C0]; C0 = 16 in 16-bit pages (none), 32
//                   in int8 ones
//   extras          what lies behind the planes, in their order. c8d: scales, float32 [kv_heads,
//                   block_size] per plane; c8p: pools of patches [kv_heads] per plane
//                   (kv_cache_pool.h)
//   counters        int64 [cores, 4] or null: rows written, saturated, patched, overflowed are
//   added
//                   to the row of the core; pages without quantisation leave it
// Limits: head_dim a multiple of 16 (none) or 32 (int8) up to 256; block_size a multiple of 16 up
// to 256; tokens and kv_heads not 0. The arithmetic is ops/quantise.py to the bit, except the sums
// that decide who is an outlier: the squared error and what is allowed are each within 12 * 2^-24
// of their value (SumsOfRows, and three more roundings), so only rows that near to the threshold
// may be judged otherwise.
//
// Tiling: a tile is one token's rows of a group of neighbouring heads, of K or of V: contiguous in
// key or value, and one strided copy in a plane. Groups hold up to 4096 elements and 64 heads,
// fewer if there are too few tokens for all cores (Split). Cores take (K or V, group, lane of
// tokens). c8p deals tokens to lanes by patch slot: those that compete for one are written by one
// core, in order.
//
// UB budget in bytes, for a tile of 4096 elements (tiles are smaller, and UB less, where
// kv_heads * head_dim is)
//                                     none      c8d      c8s      c8p
//   slots, a chunk of 512             4096     4096     4096     4096
//   rows in, two                     16384    16384    16384    16384
//   codes out, two                       -     8192     8192     8192
//   rows, scratch (float32)              -    32768    32768    32768
//   int16 and half                       -    16384    16384    16384
//   masks, numbers, spread, counters     -     3392     3392     3392
//   scales out, two                      -     4096        -        -
//   channel scales, inverse, multiples   -        -    49152    49152
//   saturated                            -        -      256      256
//   tags, patches out, nibbles           -        -        -     5952
//   sum                              20480    85312   130624   136576    of 196608
// The last 8192 bytes of UB belong to Select.
//
// Synchronisation
//   rows in        queue MTE2 -> V -> MTE2 (none: MTE2 -> MTE3 -> MTE2): two tiles in flight
//   codes, scales, patches out    queues V -> MTE3 -> V
//   channel scales                queue MTE2 -> V, freed at the end of a part
//   MTE2_S 0       a chunk of slots, the tags or this core's counters have arrived
//   V_S 0          the mask of outliers, the sum of saturated rows may be read by the scalar unit
//   S_MTE3 0       tags, counters were written by the scalar unit
//   MTE3_MTE2 0    tags have left UB and are in GM, before the next tile's are read
//   PIPE_V         between dependent vector instructions
#include "kernel_operator.h"
#include "kv_cache_write_codecs.h"
#include "kv_cache_write_patches.h"
#include "kv_cache_write_split.h"

#define KV_CACHE_WRITE(name, Codec)                                                           \
  extern "C" __global__ __aicore__ void kv_cache_write_##name(                                \
      GM_ADDR key, GM_ADDR value, GM_ADDR slots, GM_ADDR pages, GM_ADDR extras,               \
      GM_ADDR channel_scales, GM_ADDR counters, uint32_t tokens, uint32_t kv_heads,           \
      uint32_t head_dim, uint32_t block_size, uint32_t num_blocks, uint32_t key_stride,       \
      uint32_t value_stride, float k_threshold, float v_threshold, uint32_t patch_code) {     \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                           \
    kv_cache::Writer<kv_cache::Codec> writer;                                                 \
    writer.Run({key, value, slots, pages, extras, channel_scales, counters, tokens, kv_heads, \
                head_dim, block_size, num_blocks, key_stride, value_stride, k_threshold,      \
                v_threshold, patch_code});                                                    \
  }

KV_CACHE_WRITE(none_bf16, CopyCodec<bfloat16_t>)
KV_CACHE_WRITE(none_fp16, CopyCodec<half>)
KV_CACHE_WRITE(c8d_bf16, DynamicCodec<bfloat16_t>)
KV_CACHE_WRITE(c8d_fp16, DynamicCodec<half>)
KV_CACHE_WRITE(c8s_bf16, StaticCodec<bfloat16_t>)
KV_CACHE_WRITE(c8s_fp16, StaticCodec<half>)
KV_CACHE_WRITE(c8p_bf16, PatchedCodec<bfloat16_t>)
KV_CACHE_WRITE(c8p_fp16, PatchedCodec<half>)
