"""ModelSlim's form: tensors of a module, and their types in ``quant_model_description.json``.

Layouts and formulas are those that msmodelslim 26.1.0 writes (``ascendv1.py``, and
``complex_quantifier.py`` for W4A16).
"""

from __future__ import annotations

from typing import Any

import torch

from ascend_plugin.quantization.scheme import Scheme
from ascend_plugin.weight_tools.portable import PortableModule

FORM = "modelslim"

#: msmodelslim splits the sums of W4A8 into so many parts where rows are shared between processes.
_PARTS = 16
_SHARED_ROWS = ("o_proj", "down_proj", "w2")


def module_tensors(
    module: PortableModule, dtype: torch.dtype
) -> tuple[str, dict[str, torch.Tensor]]:
    """Return a module's type, and its tensors by role.

    Args:
        module: what to write.
        dtype: of the model; ModelSlim writes ``deq_scale`` differently for float16 and float32.

    Raises:
        WeightToolError: ModelSlim has no words for it.
    """
    if module.groups_of is not None:
        raise module.refuse(FORM, "groups out of order (desc_act)")
    scheme = module.about.scheme
    inputs = module.about.input
    if scheme is Scheme.W8A8:
        return "W8A8", _static(module, dtype)
    if inputs is not None and not inputs.symmetric:
        raise module.refuse(FORM, "inputs with zero points per token")
    if inputs is not None and module.zeros is not None:
        raise module.refuse(FORM, "zero points of weights beside quantised inputs")
    if scheme is Scheme.W4A8 and module.grouped:
        raise module.refuse(FORM, "4-bit groups beside quantised inputs with one level of scales")
    packed = _packed(module)
    tensors = {"weight": packed, **_scales(module)}
    if scheme is Scheme.W4A8:
        tensors["scale_bias"] = _scale_bias(module)
    if module.bias is not None:
        tensors["bias"] = module.bias.float()
    return scheme.value, tensors


def _static(module: PortableModule, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of W8A8: the input's offset and the bias join in ``quant_bias``."""
    assert module.static is not None
    if module.zeros is not None or module.grouped:
        raise module.refuse(FORM, "zero points or groups of weights beside static inputs")
    scale = torch.tensor([module.static.scale], dtype=torch.float32)
    deq = scale * module.scales.flatten().float()  # [n]
    correction = module.codes.sum(1, dtype=torch.int64).double() * module.static.zero
    bias = torch.zeros(len(deq)) if module.bias is None else module.bias.float()
    tensors = {
        "weight": module.codes,
        "quant_bias": torch.round(bias.double() / deq.double() - correction).to(torch.int32),
        "input_scale": scale,
        "input_offset": torch.tensor([float(module.static.zero)]),
        # As fixed-pipe hardware takes it beside float16: the bits of the float in an int64.
        "deq_scale": deq if dtype == torch.bfloat16 else deq.view(torch.int32).to(torch.int64),
    }
    return tensors if module.bias is None else tensors | {"bias": module.bias.float()}


def _scales(module: PortableModule) -> dict[str, torch.Tensor]:
    scale = module.scales.float().reshape(module.about.n, -1).contiguous()
    zeros = torch.zeros_like(scale) if module.zeros is None else module.zeros.float()
    return {"weight_scale": scale, "weight_offset": zeros.reshape(scale.shape).contiguous()}


def _packed(module: PortableModule) -> torch.Tensor:
    """Return the codes: 4-bit ones two in an int8, the low nibble first."""
    codes = module.codes
    if module.about.bits == 8:
        return codes
    if module.about.scheme is Scheme.W4A16 and not module.grouped:
        return _nibbles(codes[:, 0::2], codes[:, 1::2])  # [n, k/2]
    if module.about.n % 2:
        raise module.refuse(FORM, f"{module.about.n} output features, an odd number")
    return _nibbles(codes[0::2], codes[1::2])  # [n/2, k]


def _nibbles(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return ((high << 4) | (low & 15)).contiguous()


def _scale_bias(module: PortableModule) -> torch.Tensor:
    """Return 8 times the sums of the weight's rows, what unsigned codes add to a product."""
    weight = module.codes.float() * module.scales.float().reshape(-1, 1)
    shared = any(name in module.about.name for name in _SHARED_ROWS)
    parts = _PARTS if shared and module.about.k % _PARTS == 0 else 1
    return 8 * weight.reshape(module.about.n, parts, -1).sum(-1)


def description(types: dict[str, str], groups: set[int], has_kv: bool) -> dict[str, Any]:
    """Return ``quant_model_description.json``.

    Args:
        types: of every tensor, by name.
        groups: sizes of groups that modules have.
        has_kv: whether there are C8 scales.
    """
    kinds = [kind for kind in types.values() if kind not in ("FLOAT", "C8")]
    kv = {"kv_cache_type": "C8", "kv_quant_type": "C8"} if has_kv else {}
    return {
        **types,
        "version": "1.0.0",
        "model_quant_type": max(kinds, key=kinds.count) if kinds else "FLOAT",
        "group_size": groups.pop() if len(groups) == 1 else 0,
        **kv,
    }
