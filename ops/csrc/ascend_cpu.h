// C ABI of the native CPU kernels. No torch headers: the library is loaded with ctypes, and
// ops/native/abi.py mirrors these structs (the loader compares sizes through ascend_cpu_abi()).
//
// One shared library is built per instruction set (avx512, avx2, portable) from the same ABI.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ASCEND_CPU_ABI_VERSION 8
#define ASCEND_API __attribute__((visibility("default")))

enum ascend_dtype {
  ASCEND_FLOAT32 = 0,
  ASCEND_FLOAT16 = 1,
  ASCEND_BFLOAT16 = 2,
  ASCEND_INT8 = 3,  // pages only
};

// What int8 elements of a page mean (ops/page_layout.py, Quantisation).
enum ascend_quantisation {
  ASCEND_UNQUANTISED = 0,
  ASCEND_C8D = 1,  // a float32 scale per token lies in the page; K is rotated (rotate.h)
  ASCEND_C8S = 2,  // a static float32 scale per kv head and channel is an argument
  ASCEND_C8P = 3,  // as C8S, and the page holds 4-bit residuals (patches) of outlier tokens
};

// Values of the 4 bits of a patch element.
enum ascend_patch_code {
  ASCEND_INT4 = 0,  // two's complement
  ASCEND_E3M0 = 1,  // sign and exponent: 0, then 1, 2, 4 to 64
};

enum ascend_status {
  ASCEND_OK = 0,
  ASCEND_BAD_BLOCK_ID = 1,  // a block table entry in use lies outside [0, num_blocks)
  ASCEND_BAD_SLOT = 2,      // a slot lies at or beyond num_blocks * block_size (negative: skipped)
  ASCEND_UNSUPPORTED = 3,   // a dtype, head_dim or block_size the kernels do not take
};

// KV pages of one layer. A (block, kv head) run is contiguous: K in NZ at k_offset, V in NZ at
// v_offset, NZ being (head_dim / C0, block_size, C0) with C0 = 32 / itemsize elements.
// head_dim: multiple of 16, at most 256, padded to whole column groups in the page. block_size:
// multiple of 16, at most 256.
//
// A pool of patches is: tags int16 [slots] (0 empty, n + 1 token n), scales float [slots], codes
// [slots][padded head_dim / 2], the low 4 bits of a byte for the even column. Token n can only be
// in slot n % slots.
typedef struct ascend_pages {
  void *data;  // byte address of (block 0, kv head 0)
  int64_t num_blocks;
  int64_t block_stride;      // bytes
  int64_t head_stride;       // bytes
  int64_t k_offset;          // bytes inside a run
  int64_t v_offset;          // bytes inside a run
  int64_t k_scales_offset;   // bytes inside a run, C8D: float [block_size]
  int64_t v_scales_offset;   // the same of V
  int64_t k_patches_offset;  // bytes inside a run, C8P: K's pool
  int64_t v_patches_offset;  // V's pool
  int32_t dtype;             // ascend_dtype
  int32_t block_size;        // tokens
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t quantisation;  // ascend_quantisation
  int32_t patch_code;    // ascend_patch_code
  int32_t patch_slots;   // slots of each pool
} ascend_pages;

// Ragged batch of queries over paged KV. Sequence i owns query rows
// [query_start_loc[i], query_start_loc[i+1]), the last of its seq_lens[i] tokens.
typedef struct ascend_attention_args {
  ascend_pages pages;
  const void *query;               // [num_tokens, num_heads, head_dim], last dimension contiguous
  void *out;                       // same shape and dtype as query
  int64_t query_token_stride;      // elements
  int64_t query_head_stride;       // elements
  int64_t out_token_stride;        // elements
  int64_t out_head_stride;         // elements
  const int32_t *query_start_loc;  // [num_seqs + 1]
  const int32_t *seq_lens;         // [num_seqs]
  const int32_t *block_table;      // [num_seqs, >= ceil(seq_len / block_size)]
  int64_t block_table_stride;      // elements
  const float *alibi_slopes;       // [num_heads] or null
  const float *sinks;              // [num_heads] logits or null
  const float *channel_scales;     // [2][num_kv_heads][head_dim], K first: C8S and C8P, else null
  float scale;
  float soft_cap;       // 0: none; else s = soft_cap * tanh(s / soft_cap)
  int32_t window;       // tokens a query sees including itself; 0: all
  int32_t causal;       // 0 or 1
  int32_t query_dtype;  // ascend_dtype of query and out
  int32_t num_heads;
  int32_t num_seqs;
  int32_t num_threads;
  int32_t fast;  // int8: 8-bit instead of 16-bit products of query and weights
} ascend_attention_args;

// Of int8 pages; a row is a (token, kv head) of K or of V.
enum ascend_write_counter {
  ASCEND_ROWS_WRITTEN = 0,
  ASCEND_ROWS_SATURATED = 1,  // some element lay outside the range of static scales
  ASCEND_ROWS_PATCHED = 2,
  ASCEND_PATCHES_DROPPED = 3,  // the slot belonged to an earlier token of the block
  ASCEND_COUNTERS = 4,
};

typedef struct ascend_write_args {
  ascend_pages pages;
  const void *key;  // [num_tokens, num_kv_heads, head_dim], last dimension contiguous
  const void *value;
  int64_t key_token_stride;     // elements
  int64_t key_head_stride;      // elements
  int64_t value_token_stride;   // elements
  int64_t value_head_stride;    // elements
  const int64_t *slot_mapping;  // [num_tokens]; negative: padding, skipped
  const float *channel_scales;  // as in attention
  int64_t *counters;            // ascend_write_counter, added to; or null
  int64_t num_tokens;
  float patch_thresholds[2];  // C8P: relative error of K and V from which a row gets a patch
  int32_t dtype;  // ascend_dtype of key and value; converted to the page's when different
  int32_t num_threads;
} ascend_write_args;

// out = x times integer weights with scales, and bias. Weights, scales and zero points are packed
// in blocks of 32 columns (linear_weights.h).
typedef struct ascend_linear_args {
  const void *x;        // [m, k], rows contiguous
  void *out;            // [m, n], rows contiguous, type of x
  const void *weights;  // [blocks][k in words][32] words
  const void *scales;   // [blocks][groups][32]
  const int8_t *zeros;  // [blocks][groups][32] or null: all 0
  const void *bias;     // [n] or null
  int64_t x_stride;     // elements
  int64_t out_stride;   // elements
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t group;  // k per scale: divides k and is a multiple of 32, or at least k
  int32_t bits;   // 4 or 8
  int32_t dtype;  // ascend_dtype of x and out
  int32_t scale_dtype;
  int32_t bias_dtype;
  int32_t num_threads;
} ascend_linear_args;

// out = (x times int8 weights - x_zero * sums of columns + quant_bias) * x_scale * weight_scale +
// bias. The part in parentheses is exact in 32-bit integers. Weights are packed as in
// ascend_linear.
typedef struct ascend_int8_linear_args {
  const int8_t *x;             // [m, k], rows contiguous
  void *out;                   // [m, n], rows contiguous
  const void *weights;         // [blocks][k in words][32] words
  const int32_t *column_sums;  // [blocks * 32], of the weights
  const float *weight_scale;   // [n]
  const float *x_scale;        // [m], or [1]
  const int32_t *x_zero;       // as x_scale, or null
  const int32_t *quant_bias;   // [n] or null
  const void *bias;            // [n] or null
  int64_t x_stride;            // elements
  int64_t out_stride;          // elements
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t scale_per_row;  // 0: x_scale is one number
  int32_t zero_per_row;
  int32_t dtype;  // ascend_dtype of out
  int32_t bias_dtype;
  int32_t num_threads;
} ascend_int8_linear_args;

// Rows into int8 with a scale each (ops/dynamic_quant).
typedef struct ascend_quantise_args {
  const void *x;     // [m, k], rows contiguous
  int8_t *codes;     // [m, k]
  float *scales;     // [m]
  int32_t *zeros;    // [m], or null: symmetric
  int64_t x_stride;  // elements
  int64_t m;
  int64_t k;
  int32_t dtype;  // ascend_dtype of x
  int32_t num_threads;
} ascend_quantise_args;

// Rows into int8 with numbers that are known before (ops/static_quant).
typedef struct ascend_static_quantise_args {
  const void *x;       // [m, k], rows contiguous
  const void *factor;  // [1]
  const void *zero;    // [1], a whole number
  int8_t *codes;       // [m, k]
  int64_t x_stride;    // elements
  int64_t m;
  int64_t k;
  int32_t dtype;         // ascend_dtype of x
  int32_t number_dtype;  // of factor and zero
  int32_t num_threads;
} ascend_static_quantise_args;

// Blocks of columns times scale * (base (x) Sylvester's matrix).
typedef struct ascend_hadamard_args {
  const void *x;      // [m, d], rows contiguous
  void *out;          // [m, d] contiguous, type of x
  const float *base;  // [order, order], or null: order is 1
  int64_t x_stride;   // elements
  int64_t m;
  int64_t d;
  int64_t block;  // order times a power of two; divides d
  int64_t order;
  float scale;
  int32_t dtype;  // ascend_dtype of x and out
  int32_t num_threads;
} ascend_hadamard_args;

// Pages of latents (multi-head latent attention): latents in NZ at the start of a page, rotary
// parts in NZ at rotary_offset, right behind them. latent_dim: multiple of 16, at most 512;
// rotary_dim: multiple of 16, at most 128. quantisation: unquantised, C8D (latents are not rotated)
// or C8S.
typedef struct ascend_latent_pages {
  void *data;  // byte address of block 0
  int64_t num_blocks;
  int64_t block_stride;   // bytes
  int64_t rotary_offset;  // bytes inside a page
  int64_t scales_offset;  // bytes inside a page, C8D: float [block_size]
  int32_t dtype;          // ascend_dtype; rotary parts of int8 pages are bfloat16
  int32_t block_size;     // tokens
  int32_t latent_dim;
  int32_t rotary_dim;
  int32_t quantisation;  // ascend_quantisation
} ascend_latent_pages;

// As ascend_attention_args, with all query heads on one key (latent and rotary part) and one value
// (the latent).
typedef struct ascend_mla_args {
  ascend_latent_pages pages;
  const void *query;               // [num_tokens, num_heads, latent_dim], last dimension contiguous
  const void *query_rotary;        // [num_tokens, num_heads, rotary_dim], likewise
  void *out;                       // shape and dtype of query
  int64_t query_token_stride;      // elements
  int64_t query_head_stride;       // elements
  int64_t rotary_token_stride;     // elements
  int64_t rotary_head_stride;      // elements
  int64_t out_token_stride;        // elements
  int64_t out_head_stride;         // elements
  const int32_t *query_start_loc;  // [num_seqs + 1]
  const int32_t *seq_lens;         // [num_seqs]
  const int32_t *block_table;      // [num_seqs, >= ceil(seq_len / block_size)]
  int64_t block_table_stride;      // elements
  const float *channel_scales;     // [latent_dim]: C8S, else null
  float scale;
  int32_t causal;       // 0 or 1
  int32_t query_dtype;  // ascend_dtype of query, query_rotary and out
  int32_t num_heads;
  int32_t num_seqs;
  int32_t num_threads;
  int32_t fast;  // int8: 8-bit instead of 16-bit products of query and weights
} ascend_mla_args;

typedef struct ascend_mla_write_args {
  ascend_latent_pages pages;
  const void *latents;          // [num_tokens, latent_dim], last dimension contiguous
  const void *rotary;           // [num_tokens, rotary_dim], likewise
  int64_t latent_token_stride;  // elements
  int64_t rotary_token_stride;  // elements
  const int64_t *slot_mapping;  // [num_tokens]; negative: padding, skipped
  const float *channel_scales;  // as in attention
  int64_t *counters;            // ascend_write_counter, added to; or null
  int64_t num_tokens;
  int32_t dtype;  // ascend_dtype of latents and rotary; converted to the page's when different
  int32_t num_threads;
} ascend_mla_write_args;

// residual += x, out = sum / rms(sum) * weight (ops/add_rms_norm); without a residual, of x alone.
typedef struct ascend_add_rms_norm_args {
  const void *x;            // [m, k], rows contiguous
  void *residual;           // [m, k], rows contiguous; becomes the sum; or null
  const void *weight;       // [k]
  void *out;                // [m, k] contiguous
  int64_t x_stride;         // elements
  int64_t residual_stride;  // elements
  int64_t m;
  int64_t k;
  float eps;
  int32_t dtype;         // ascend_dtype of x, residual and out
  int32_t weight_dtype;  // ascend_dtype of weight
  int32_t num_threads;
} ascend_add_rms_norm_args;

// out = x times the transpose of weights, and bias: for few rows (ops/dense_matmul).
typedef struct ascend_dense_args {
  const void *x;        // [m, k], rows contiguous
  const void *weights;  // [n, k], rows contiguous
  const void *bias;     // [n] or null
  void *out;            // [m, n], rows contiguous
  int64_t x_stride;     // elements
  int64_t weight_stride;
  int64_t out_stride;
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t dtype;  // ascend_dtype of all
  int32_t num_threads;
} ascend_dense_args;

// Rotary position embedding in place. A row of the table holds rotary_dim / 2 cosines, then as many
// sines.
typedef struct ascend_rotary_args {
  const int64_t *positions;    // [m], in [0, table_rows)
  void *query;                 // [m, query_heads, >= rotary_dim], last dimension contiguous
  void *key;                   // [m, key_heads, >= rotary_dim], likewise; or null
  const void *table;           // [table_rows, rotary_dim]
  int64_t query_token_stride;  // elements
  int64_t query_head_stride;
  int64_t key_token_stride;
  int64_t key_head_stride;
  int64_t table_stride;
  int64_t table_rows;
  int64_t m;
  int32_t query_heads;
  int32_t key_heads;
  int32_t rotary_dim;  // even
  int32_t halves;      // 1: element i turns with i + rotary_dim / 2 (NeoX); 0: 2 i with 2 i + 1
  int32_t dtype;       // ascend_dtype of query, key and table
  int32_t num_threads;
} ascend_rotary_args;

enum ascend_elementwise {
  ASCEND_COPY = 0,
  ASCEND_SILU = 1,
  ASCEND_GELU = 2,       // by the error function
  ASCEND_GELU_TANH = 3,  // by the hyperbolic tangent
  ASCEND_ADD = 4,
  ASCEND_MULTIPLY = 5,
  ASCEND_KEEP_ROWS = 6,  // rows of x where y, int64 [m], is not 0; zeros elsewhere
  ASCEND_SCALE = 7,      // x times the one element y, or times factor if y is null
};

// out = f(x) or f(x, y), row by row; in float, rounded once.
typedef struct ascend_elementwise_args {
  const void *x;     // [m, k], rows contiguous
  const void *y;     // [m, k], likewise; null for functions of one argument. Two operations differ
  void *out;         // [m, k], likewise; may be x or y
  int64_t x_stride;  // elements
  int64_t y_stride;
  int64_t out_stride;
  int64_t m;
  int64_t k;
  int32_t operation;  // ascend_elementwise
  float factor;       // ASCEND_SCALE
  int32_t dtype;      // ascend_dtype of all
  int32_t num_threads;
} ascend_elementwise_args;

// out[i] = table[ids[i]].
typedef struct ascend_embedding_args {
  const void *ids;       // [m]
  const void *table;     // [table_rows, k], rows contiguous
  void *out;             // [m, k] contiguous
  int64_t table_stride;  // bytes
  int64_t table_rows;
  int64_t m;
  int64_t row_bytes;
  int32_t id_bytes;  // 4 or 8
  int32_t num_threads;
} ascend_embedding_args;

// One call of a recorded sequence: the number of its function in ascend_cpu_run_steps, and its
// arguments.
typedef struct ascend_step {
  int64_t function;
  const void *args;
} ascend_step;

// Version and struct sizes, for the loader: out[0] version, then sizeof of the argument structs of
// attention, write, linear, int8 linear, quantise, hadamard, latent attention, latent write, norm,
// dense, rotary, elementwise, embedding and static quantise: the functions that steps may name,
// from 0.
ASCEND_API void ascend_cpu_abi(int64_t out[15]);
// Hash of the sources that this library was compiled from (ops/native/build.py).
ASCEND_API const char *ascend_cpu_sources(void);
// 1 when this machine can run this library's instruction set.
ASCEND_API int ascend_cpu_runnable(void);
ASCEND_API int ascend_cpu_paged_attention(const ascend_attention_args *args);
ASCEND_API int ascend_cpu_kv_write(const ascend_write_args *args);
ASCEND_API int ascend_cpu_linear(const ascend_linear_args *args);
ASCEND_API int ascend_cpu_int8_linear(const ascend_int8_linear_args *args);
ASCEND_API int ascend_cpu_quantise(const ascend_quantise_args *args);
ASCEND_API int ascend_cpu_hadamard(const ascend_hadamard_args *args);
ASCEND_API int ascend_cpu_mla_attention(const ascend_mla_args *args);
ASCEND_API int ascend_cpu_mla_write(const ascend_mla_write_args *args);
ASCEND_API int ascend_cpu_add_rms_norm(const ascend_add_rms_norm_args *args);
ASCEND_API int ascend_cpu_dense(const ascend_dense_args *args);
ASCEND_API int ascend_cpu_rotary(const ascend_rotary_args *args);
ASCEND_API int ascend_cpu_elementwise(const ascend_elementwise_args *args);
ASCEND_API int ascend_cpu_embedding(const ascend_embedding_args *args);
ASCEND_API int ascend_cpu_static_quantise(const ascend_static_quantise_args *args);
// Calls one function after the other. Ends at the first that does not return ASCEND_OK, returns
// what that one returned, and leaves its index in *stopped.
ASCEND_API int ascend_cpu_run_steps(const ascend_step *steps, int64_t count, int64_t *stopped);

#ifdef __cplusplus
}
#endif
