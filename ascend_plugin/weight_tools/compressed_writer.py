"""compressed-tensors' form: tensors of a module, and its config group in ``config.json``."""

from __future__ import annotations

from typing import Any

import torch

from ascend_plugin.weight_tools.portable import PortableModule

FORM = "compressed-tensors"

#: The version whose keys are written.
_VERSION = "0.17.0"


def module_tensors(module: PortableModule) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what a config group says of a module, and its tensors by role.

    Raises:
        WeightToolError: compressed-tensors has no words for it.
    """
    packed = module.about.input is None
    if not packed and module.zeros is not None:
        raise module.refuse(FORM, "zero points of weights beside quantised inputs")
    scales = module.scales.reshape(module.about.n, -1).contiguous()
    if packed:
        tensors = _packed(module, scales)
    else:
        tensors = {"weight": module.codes, "weight_scale": scales}
    if module.static is not None:
        tensors["input_scale"] = torch.tensor([module.static.scale], dtype=torch.float32)
        if module.static.zero:
            zero = torch.tensor([module.static.zero], dtype=torch.int8)
            tensors["input_zero_point"] = zero
    if module.bias is not None:
        tensors["bias"] = module.bias
    group = {
        "weights": _weights(module),
        "input_activations": _inputs(module),
        "output_activations": None,
        "format": "pack-quantized" if packed else "int-quantized",
    }
    return group, tensors


def _packed(module: PortableModule, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, about = module.about.bits, module.about
    tensors = {
        "weight_packed": pack_to_int32(module.codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([about.n, about.k]),
    }
    if module.zeros is not None:
        zeros = module.zeros.reshape(about.n, -1)
        tensors["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
    if module.groups_of is not None:
        tensors["weight_g_idx"] = module.groups_of.to(torch.int32)
    return tensors


def _weights(module: PortableModule) -> dict[str, Any]:
    return {
        "num_bits": module.about.bits,
        "type": "int",
        "symmetric": module.zeros is None,
        "strategy": "group" if module.grouped else "channel",
        "group_size": module.about.group if module.grouped else None,
        "actorder": None if module.groups_of is None else "group",
        "dynamic": False,
    }


def _inputs(module: PortableModule) -> dict[str, Any] | None:
    inputs = module.about.input
    if inputs is None:
        return None
    symmetric = inputs.symmetric
    if module.static is not None:
        symmetric = module.static.zero == 0
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "token" if inputs.dynamic else "tensor",
        "dynamic": inputs.dynamic,
    }


def quantization_config(
    groups: dict[str, dict[str, Any]], floats: list[str], has_kv: bool
) -> dict[str, Any]:
    """Return ``quantization_config``.

    Args:
        groups: what is said of each quantised module, by its name.
        floats: linear modules that stay float.
        has_kv: whether there are scales of an int8 KV cache, per head.
    """
    alike: list[tuple[dict[str, Any], list[str]]] = []
    for name, group in groups.items():
        for said, names in alike:
            if said == group:
                names.append(name)
                break
        else:
            alike.append((group, [name]))
    several = len(alike) > 1
    formats = {group["format"] for group, _ in alike}
    scheme = {"num_bits": 8, "type": "int", "strategy": "attn_head", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": _VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {"targets": names if several else ["Linear"], **group}
            for i, (group, names) in enumerate(alike)
        },
        "ignore": floats,
        "kv_cache_scheme": scheme | {"dynamic": False} if has_kv else None,
    }
