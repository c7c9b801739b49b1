"""Static KV scales inside a checkpoint's safetensors files.

Two tools write them:

- ModelSlim: ``…layers.{i}.self_attn.{k,v}_proj.kv_cache_scale`` and ``kv_cache_offset``,
  ``[kv_heads * head_dim]``, per channel.
- ModelSlim, latent attention (FAQuant): ``…layers.{i}.self_attn.fa_{q,k,v}.scale`` and ``offset``,
  of which ``fa_k`` is the latents', ``[1]`` or ``[kv_lora_rank]``.
- llm-compressor (compressed-tensors, ``kv_cache_scheme`` of 8-bit integers):
  ``…layers.{i}.self_attn.{k,v}_scale`` and ``{k,v}_zero_point``, ``[1]`` per tensor or
  ``[kv_heads, 1, 1]`` per head. Tensors of the same names in other checkpoints belong to fp8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .scales import KVScalesError, LayerScales, check_scale

_MODELSLIM = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?([kv])_proj\.kv_cache_(scale|offset)")
_COMPRESSED = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.([qkv])_(scale|zero_point)")
_LATENT = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.fa_([qkv])\.(scale|offset)")

_INDEX_FILE = "model.safetensors.index.json"


def checkpoint_folder(model: Any) -> Path | None:
    """Return the local folder of a model's weights (vLLM's configuration); None: none yet."""
    if Path(model.model).is_dir():
        return Path(model.model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        return None


def is_int8_scheme(quantization_config: Any) -> bool:
    """Say whether a checkpoint's ``quantization_config`` has a KV cache of 8-bit integers."""
    if not isinstance(quantization_config, Mapping):
        return False
    scheme = quantization_config.get("kv_cache_scheme")
    return (
        quantization_config.get("quant_method") == "compressed-tensors"
        and isinstance(scheme, Mapping)
        and (scheme.get("type"), scheme.get("num_bits")) == ("int", 8)
    )


def is_kv_scale(name: str, int8_scheme: bool) -> bool:
    """Say whether a tensor of a checkpoint is one that the plugin reads itself.

    Args:
        name: of the tensor.
        int8_scheme: whether :func:`is_int8_scheme` holds for the checkpoint.
    """
    return _match(name, int8_scheme) is not None or _LATENT.fullmatch(name) is not None


def _match(name: str, int8_scheme: bool) -> tuple[int, str, str] | None:
    """Return layer, ``q``, ``k`` or ``v``, and ``scale`` or ``offset``."""
    if match := _MODELSLIM.fullmatch(name):
        return int(match[1]), match[2], match[3]
    if int8_scheme and (match := _COMPRESSED.fullmatch(name)):
        return int(match[1]), match[2], "scale" if match[3] == "scale" else "offset"
    return None


def find_kv_scales(folder: Path, int8_scheme: bool) -> dict[str, Path]:
    """Return the KV scales in a checkpoint: file by name of the tensor.

    Args:
        folder: of the checkpoint.
        int8_scheme: whether :func:`is_int8_scheme` holds for it.

    Raises:
        KVScalesError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / _INDEX_FILE
    names: dict[str, Path] = {}
    try:
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            names = {name: folder / str(file) for name, file in weight_map.items()}
        else:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    names |= dict.fromkeys(file.keys(), path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise KVScalesError(
            f"{folder}: the checkpoint cannot be searched for KV scales ({error!r}). Download it "
            "again, or name a file of scales with kv_cache.scales."
        ) from error
    return {name: path for name, path in names.items() if is_kv_scale(name, int8_scheme)}


def read_checkpoint_scales(
    folder: Path, int8_scheme: bool, kv_heads: int, head_dim: int
) -> dict[int, LayerScales]:
    """Return the static KV scales of a checkpoint; empty: it has none.

    Args:
        folder: of the checkpoint.
        int8_scheme: whether :func:`is_int8_scheme` holds for it.
        kv_heads: of the model, before tensor parallel sharding.
        head_dim: of the model.

    Raises:
        KVScalesError: a tensor has another shape, an unusable value or an offset that is not zero.
    """
    from safetensors import safe_open

    found: dict[int, dict[str, torch.Tensor]] = {}
    by_file: dict[Path, list[str]] = {}
    for name, path in find_kv_scales(folder, int8_scheme).items():
        by_file.setdefault(path, []).append(name)
    for path, names in sorted(by_file.items()):
        with safe_open(path, framework="pt") as file:
            for name in names:
                matched = _match(name, int8_scheme)
                if matched is None or matched[1] == "q":  # queries are not quantised here
                    continue
                index, side, part = matched
                tensor = file.get_tensor(name)
                if part == "offset":
                    _refuse_offset(name, tensor)
                else:
                    scale = _per_channel(name, tensor, kv_heads, head_dim)
                    found.setdefault(index, {})[side] = scale
    return {index: _layer(folder, index, found[index]) for index in sorted(found)}


def read_latent_scales(folder: Path, latent_dim: int) -> dict[int, torch.Tensor]:
    """Return the static scales of latents in a ModelSlim checkpoint; empty: it has none.

    Args:
        folder: of the checkpoint.
        latent_dim: ``kv_lora_rank`` of the model.

    Returns:
        float32 ``[latent_dim]`` by index of the layer.

    Raises:
        KVScalesError: a tensor has another shape, an unusable value or an offset that is not zero.
    """
    from safetensors import safe_open

    found: dict[int, torch.Tensor] = {}
    for name, path in sorted(find_kv_scales(folder, False).items()):
        match = _LATENT.fullmatch(name)
        if match is None or match[2] != "k":  # queries are not quantised here, V is K
            continue
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        if match[3] == "offset":
            _refuse_offset(name, tensor)
        else:
            found[int(match[1])] = _per_channel(name, tensor, 1, latent_dim)[0].contiguous()
    return found


def _refuse_offset(name: str, offset: torch.Tensor) -> None:
    if bool((offset.to(torch.float32) != 0).any()):
        raise KVScalesError(
            f"{name} is not zero: the checkpoint's KV cache is asymmetric, int8 pages are "
            "symmetric. Quantise the checkpoint with a symmetric KV cache, or use "
            "kv_cache.variant 'c8d', which needs no scales."
        )


def _per_channel(name: str, tensor: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Return a scale per tensor, per head or per channel as float32 ``[kv_heads, head_dim]``."""
    flat = tensor.to(torch.float32).flatten()
    if flat.numel() == kv_heads * head_dim:
        scale = flat.view(kv_heads, head_dim)
    elif flat.numel() in (1, kv_heads):
        scale = flat.view(-1, 1).expand(kv_heads, head_dim).contiguous()
    else:
        raise KVScalesError(
            f"{name} has shape {list(tensor.shape)}; the model has {kv_heads} kv heads of "
            f"{head_dim} (before tensor parallel sharding), so allowed are 1 scale, {kv_heads} or "
            f"{kv_heads * head_dim}. The scales belong to another model: use kv_cache.variant "
            "'c8d', or a file of scales (kv_cache.scales)."
        )
    check_scale(name, scale)
    return scale


def _layer(folder: Path, index: int, scales: Mapping[str, torch.Tensor]) -> LayerScales:
    missing = [side for side in "kv" if side not in scales]
    if missing:
        raise KVScalesError(
            f"{folder} has KV scales for layer {index}, but none for {missing[0].upper()}. "
            "Quantise the checkpoint again, or name a file of scales with kv_cache.scales."
        )
    return LayerScales(scales["k"], scales["v"])
