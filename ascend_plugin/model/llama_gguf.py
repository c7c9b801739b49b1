"""Llama weights and configuration: from GGUF names and layout to Hugging Face's.

GGUF follows llama.cpp, whose rotary embedding rotates neighbouring pairs where Hugging Face
rotates the two halves of a head. The rows of the query and key projections are therefore
stored permuted, and are put back here (llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_plugin.model.errors import ModelSourceError
from ascend_plugin.model.gguf_source import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from gguf import GGUFReader, ReaderTensor

    Weights = npt.NDArray[np.float32]

_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An open GGUF of one supported architecture."""

    path: Path
    reader: GGUFReader

    def value(self, key: str) -> Any:
        """Returns the metadata at `key`, e.g. ``llama.block_count``.

        Raises:
            ModelSourceError: If the file has no such key.
        """
        field = self.reader.get_field(key)
        if field is None:
            raise ModelSourceError(
                f"{self.path} has no metadata {key!r}: "
                "give a GGUF written by llama.cpp's converter."
            )
        return field.contents()


def open_gguf(path: Path, architecture: str = "llama") -> GgufFile:
    """Opens a GGUF and checks that it is whole and of the architecture.

    Raises:
        ModelSourceError: If it is not.
    """
    try:
        import gguf
    except ImportError as err:
        raise ModelSourceError(
            "reading a GGUF needs the package gguf, which is not installed: run `pip install gguf`."
        ) from err
    try:
        reader = gguf.GGUFReader(path)
    except Exception as err:
        # The reader has no errors of its own: a cut or damaged file surfaces as IndexError,
        # ValueError, KeyError, UnicodeDecodeError or OverflowError, depending on where.
        raise ModelSourceError(
            f"{path} is not an intact GGUF ({type(err).__name__}: {err}): get the file again."
        ) from err
    opened = GgufFile(path, reader)
    found = opened.value("general.architecture")
    if found != architecture:
        raise ModelSourceError(
            f"{path} has the architecture {found!r}, supported is {architecture!r}: "
            "give another GGUF."
        )
    return opened


def llama_config(gguf: GgufFile) -> dict[str, Any]:
    """Returns the contents of ``config.json``."""

    def llama(key: str) -> Any:
        return gguf.value(f"llama.{key}")

    hidden, heads = llama("embedding_length"), llama("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": llama("context_length"),
        "rms_norm_eps": _as_written(llama("attention.layer_norm_rms_epsilon")),
        "rope_theta": _as_written(llama("rope.freq_base")),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": all(t.name != "output.weight" for t in gguf.reader.tensors),
        "torch_dtype": "bfloat16",
        **special_token_ids(gguf),
    }


def special_token_ids(gguf: GgufFile) -> dict[str, int]:
    """Returns the begin, end and padding token ids under Hugging Face's names."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {hf: gguf.value(f"tokenizer.ggml.{name}_token_id") for hf, name in names.items()}


def llama_tensors(
    gguf: GgufFile, config: dict[str, Any], progress: Progress
) -> dict[str, torch.Tensor]:
    """Returns the dequantised weights in bfloat16 under Hugging Face's names.

    Args:
        gguf: The open file.
        config: What `llama_config` returned for it.
        progress: Told of each tensor.

    Returns:
        One contiguous tensor for each weight; matrices are [out_features, in_features].

    Raises:
        ModelSourceError: If a tensor is unknown, missing, or of another shape than the
            configuration asks for.
    """
    import torch

    expected = _expected_shapes(config)
    tensors: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(gguf.reader.tensors):
        progress("converting the weights", done, len(gguf.reader.tensors))
        name = _hf_name(tensor.name)
        weights = _dequantized(gguf, tensor)
        if expected.get(name) != weights.shape:
            raise ModelSourceError(
                f"{gguf.path} has a tensor {tensor.name!r} of shape {weights.shape}, "
                f"expected {expected.get(name, 'no such tensor')}: "
                "only plain Llama models can be converted, give another GGUF."
            )
        if name.endswith("q_proj.weight"):
            weights = _unpermute(weights, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            weights = _unpermute(weights, config["num_key_value_heads"])
        tensors[name] = torch.from_numpy(weights).to(torch.bfloat16)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ModelSourceError(
            f"{gguf.path} lacks {len(missing)} tensors, the first is {missing[0]!r}: "
            "give a complete GGUF."
        )
    return tensors


def _hf_name(name: str) -> str:
    """Translates a tensor name; an unknown one stays as it is."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part = _IN_LAYER.get(rest.removesuffix(".weight"))
    return f"model.layers.{block}.{part}.weight" if part else name


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight of the model."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = (config["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _dequantized(gguf: GgufFile, tensor: ReaderTensor) -> Weights:
    """Returns a tensor in float32, in the order of dimensions that PyTorch uses."""
    import numpy as np
    from gguf.quants import dequantize

    try:
        flat = dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        # A copy: tensors stored as float32 are views of the read-only, mapped file.
        return np.array(flat.reshape(shape), dtype=np.float32, order="C")
    except Exception as err:  # As in `open_gguf`; also types that the library cannot decode.
        raise ModelSourceError(
            f"{gguf.path} has a tensor {tensor.name!r} that cannot be decoded "
            f"({type(err).__name__}: {err}): get the file again."
        ) from err


def _unpermute(weights: Weights, heads: int) -> Weights:
    """Puts the rows of a query or key projection into Hugging Face's order.

    Args:
        weights: [heads * head_dim, in_features]; in each head, rows 2i and 2i+1 are the two
            numbers rotated together.
        heads: Number of heads.

    Returns:
        The same shape; in each head, rows i and i + head_dim / 2 are rotated together.
    """
    import numpy as np

    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _as_written(number: float) -> float:
    """Returns the shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(number)))
