"""ctypes mirror of ``ops/csrc/ascend_cpu.h``.

The loader compares the version and the struct sizes with those the library reports, so a header
change that is not mirrored here is refused at load time.
"""

from __future__ import annotations

import ctypes
import struct
from enum import IntEnum

ABI_VERSION = 8


class Dtype(IntEnum):
    """Element types of pages, queries, keys and values (``ascend_dtype``)."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    INT8 = 3


class Status(IntEnum):
    """Return codes (``ascend_status``)."""

    OK = 0
    BAD_BLOCK_ID = 1
    BAD_SLOT = 2
    UNSUPPORTED = 3


class Pages(ctypes.Structure):
    """``ascend_pages``: the KV pages of one layer."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("k_offset", ctypes.c_int64),
        ("v_offset", ctypes.c_int64),
        ("k_scales_offset", ctypes.c_int64),
        ("v_scales_offset", ctypes.c_int64),
        ("k_patches_offset", ctypes.c_int64),
        ("v_patches_offset", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("quantisation", ctypes.c_int32),
        ("patch_code", ctypes.c_int32),
        ("patch_slots", ctypes.c_int32),
    ]


class AttentionArgs(ctypes.Structure):
    """``ascend_attention_args``: a ragged batch of queries over paged KV."""

    _fields_ = [
        ("pages", Pages),
        ("query", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("out_token_stride", ctypes.c_int64),
        ("out_head_stride", ctypes.c_int64),
        ("query_start_loc", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("alibi_slopes", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("channel_scales", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("window", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("query_dtype", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_seqs", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("fast", ctypes.c_int32),
    ]


class WriteArgs(ctypes.Structure):
    """``ascend_write_args``: new keys and values and the slots they go to."""

    _fields_ = [
        ("pages", Pages),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_token_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("value_token_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
        ("slot_mapping", ctypes.c_void_p),
        ("channel_scales", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("k_patch_threshold", ctypes.c_float),
        ("v_patch_threshold", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class LinearArgs(ctypes.Structure):
    """``ascend_linear_args``: rows times packed integer weights."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("m", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class Int8LinearArgs(ctypes.Structure):
    """``ascend_int8_linear_args``: int8 rows times packed int8 weights."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("column_sums", ctypes.c_void_p),
        ("weight_scale", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("x_zero", ctypes.c_void_p),
        ("quant_bias", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("m", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("scale_per_row", ctypes.c_int32),
        ("zero_per_row", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class QuantiseArgs(ctypes.Structure):
    """``ascend_quantise_args``: rows into int8."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class StaticQuantiseArgs(ctypes.Structure):
    """``ascend_static_quantise_args``: rows into int8 with given numbers."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("number_dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class HadamardArgs(ctypes.Structure):
    """``ascend_hadamard_args``: rotation of blocks of columns."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("order", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class LatentPages(ctypes.Structure):
    """``ascend_latent_pages``: the pages of latents of one layer."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("rotary_offset", ctypes.c_int64),
        ("scales_offset", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("latent_dim", ctypes.c_int32),
        ("rotary_dim", ctypes.c_int32),
        ("quantisation", ctypes.c_int32),
    ]


class MlaArgs(ctypes.Structure):
    """``ascend_mla_args``: a ragged batch of queries over paged latents."""

    _fields_ = [
        ("pages", LatentPages),
        ("query", ctypes.c_void_p),
        ("query_rotary", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("rotary_token_stride", ctypes.c_int64),
        ("rotary_head_stride", ctypes.c_int64),
        ("out_token_stride", ctypes.c_int64),
        ("out_head_stride", ctypes.c_int64),
        ("query_start_loc", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("channel_scales", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("query_dtype", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_seqs", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("fast", ctypes.c_int32),
    ]


class MlaWriteArgs(ctypes.Structure):
    """``ascend_mla_write_args``: new latents and rotary parts and the slots they go to."""

    _fields_ = [
        ("pages", LatentPages),
        ("latents", ctypes.c_void_p),
        ("rotary", ctypes.c_void_p),
        ("latent_token_stride", ctypes.c_int64),
        ("rotary_token_stride", ctypes.c_int64),
        ("slot_mapping", ctypes.c_void_p),
        ("channel_scales", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class AddRmsNormArgs(ctypes.Structure):
    """``ascend_add_rms_norm_args``: rows added to a residual, and the norm of the sum."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("residual_stride", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class DenseArgs(ctypes.Structure):
    """``ascend_dense_args``: few rows times weights."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("weight_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("m", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class RotaryArgs(ctypes.Structure):
    """``ascend_rotary_args``: rotary position embedding in place."""

    _fields_ = [
        ("positions", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("key_token_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("table_rows", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("query_heads", ctypes.c_int32),
        ("key_heads", ctypes.c_int32),
        ("rotary_dim", ctypes.c_int32),
        ("halves", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class Elementwise(IntEnum):
    """Functions of one or two arguments (``ascend_elementwise``)."""

    COPY = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    ADD = 4
    MULTIPLY = 5
    KEEP_ROWS = 6
    SCALE = 7


class ElementwiseArgs(ctypes.Structure):
    """``ascend_elementwise_args``: a function of rows."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("operation", ctypes.c_int32),
        ("factor", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class EmbeddingArgs(ctypes.Structure):
    """``ascend_embedding_args``: rows of a table."""

    _fields_ = [
        ("ids", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("table_rows", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("id_bytes", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


_FORMATS: dict[type, str] = {
    ctypes.c_void_p: "P",
    ctypes.c_int64: "q",
    ctypes.c_int32: "i",
    ctypes.c_float: "f",
}


def _format(structure: type[ctypes.Structure]) -> str:
    """Native ``struct`` format of a structure, nested ones flattened."""
    kinds: list[type] = [field[1] for field in structure._fields_]
    return "".join(
        _format(kind) if issubclass(kind, ctypes.Structure) else _FORMATS[kind] for kind in kinds
    )


#: Packs all fields of an argument struct in one call, six times faster than setting them one by
#: one. Values go in the order of the fields, those of ``pages`` first; a null pointer is 0.
#: ("0q" pads the end as C does.)
pack_attention_args = struct.Struct(_format(AttentionArgs) + "0q").pack
pack_write_args = struct.Struct(_format(WriteArgs) + "0q").pack
pack_linear_args = struct.Struct(_format(LinearArgs) + "0q").pack
pack_int8_linear_args = struct.Struct(_format(Int8LinearArgs) + "0q").pack
pack_quantise_args = struct.Struct(_format(QuantiseArgs) + "0q").pack
pack_hadamard_args = struct.Struct(_format(HadamardArgs) + "0q").pack
pack_mla_args = struct.Struct(_format(MlaArgs) + "0q").pack
pack_add_rms_norm_args = struct.Struct(_format(AddRmsNormArgs) + "0q").pack
pack_mla_write_args = struct.Struct(_format(MlaWriteArgs) + "0q").pack
pack_dense_args = struct.Struct(_format(DenseArgs) + "0q").pack
pack_rotary_args = struct.Struct(_format(RotaryArgs) + "0q").pack
pack_elementwise_args = struct.Struct(_format(ElementwiseArgs) + "0q").pack
pack_embedding_args = struct.Struct(_format(EmbeddingArgs) + "0q").pack
pack_static_quantise_args = struct.Struct(_format(StaticQuantiseArgs) + "0q").pack

#: Argument structs in the order in which ``ascend_cpu_abi`` tells their sizes.
_STRUCTS: tuple[type[ctypes.Structure], ...] = (
    AttentionArgs,
    WriteArgs,
    LinearArgs,
    Int8LinearArgs,
    QuantiseArgs,
    HadamardArgs,
    MlaArgs,
    MlaWriteArgs,
    AddRmsNormArgs,
    DenseArgs,
    RotaryArgs,
    ElementwiseArgs,
    EmbeddingArgs,
    StaticQuantiseArgs,
)


def expected_abi() -> tuple[int, ...]:
    """Version and struct sizes that a matching library reports through ``ascend_cpu_abi``."""
    return ABI_VERSION, *(ctypes.sizeof(each) for each in _STRUCTS)
