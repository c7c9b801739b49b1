"""Checkpoints with drawn integers as weights: speed depends on their format, not their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GROUP = 64
_BITS = 4
#: Codes of an int32.
_PACKED = 32 // _BITS
#: Standard deviation of integers drawn evenly from -8 to 7.
_DEVIATION = 4.61

QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": _BITS,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
}


def write_w4a16(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a decoder whose linear layers are W4A16, symmetric, in groups of 64 inputs.

    The form is that of compressed-tensors, ``pack-quantized``. Scales are bfloat16 and give weights
    of variance 1 / inputs, so that activations stay finite. The same configuration gives the same
    file.

    Args:
        folder: written to; made if absent.
        config: ``config.json`` of the float model, inputs of all layers multiples of 64.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():  # tied embeddings come once
        if name in linear:
            n, k = parameter.shape
            tensors |= _packed(name.removesuffix(".weight"), n, k, generator)
        elif parameter.dim() == 1:
            tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            drawn = torch.randn(parameter.shape, generator=generator)
            tensors[name] = (drawn * 0.02).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantised = dict(config) | {"quantization_config": QUANTIZATION_CONFIG}
    (folder / "config.json").write_text(json.dumps(quantised), encoding="utf-8")


def _packed(name: str, n: int, k: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer of ``n`` columns and ``k`` inputs."""
    import torch

    bounds = torch.iinfo(torch.int32)
    shape = (n, k // _PACKED)
    codes = torch.randint(bounds.min, bounds.max, shape, generator=generator, dtype=torch.int32)
    scale = 1 / (_DEVIATION * k**0.5)
    return {
        f"{name}.weight_packed": codes,
        f"{name}.weight_scale": torch.full((n, k // GROUP), scale, dtype=torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([n, k]),
    }
