"""Values of scales and codes that no tool writes: found when they are loaded."""

from __future__ import annotations

import torch

from .errors import DOWNLOAD_AGAIN, CheckpointError
from .scheme import Layout, ModuleScheme
from .unpack import Codes


def check_values(module: ModuleScheme, codes: Codes) -> None:
    """Refuse scales that are no numbers, codes out of range and broken group indices.

    Raises:
        CheckpointError: with the tensor, its file, what was expected and the remedy.
    """
    scales = codes.scales.float()
    if not bool(torch.isfinite(scales).all()):  # auto-round's may be negative
        bad = scales[~torch.isfinite(scales)][0]
        raise _bad(module, _scale_role(module), f"the scale {float(bad)}", "finite scales")
    if module.bits == 4 and module.layout is Layout.INT8:
        low, high = int(codes.codes.min()), int(codes.codes.max())
        if low < -8 or high > 7:
            raise _bad(module, "weight", f"codes from {low} to {high}", "4-bit codes, -8 to 7")


def check_group_index(module: ModuleScheme, index: torch.Tensor) -> None:
    """Refuse a ``g_idx`` that does not give every group its size.

    Raises:
        CheckpointError: it does not.
    """
    counts = torch.bincount(index.long().flatten(), minlength=module.k // module.group)
    if len(counts) != module.k // module.group or not bool((counts == module.group).all()):
        role = "g_idx" if "g_idx" in module.tensors else "weight_g_idx"
        raise _bad(
            module,
            role,
            f"groups of {sorted(set(counts.tolist()))} input features",
            f"{module.k // module.group} groups of {module.group}",
        )


def _scale_role(module: ModuleScheme) -> str:
    for role in ("deq_scale", "weight_scale", "scales"):
        if role in module.tensors:
            return role
    return "weight"


def _bad(module: ModuleScheme, role: str, found: str, expected: str) -> CheckpointError:
    info = module.tensors[role]
    return CheckpointError(
        f"{info.file}: tensor {info.name} has {found}; expected {expected}. {DOWNLOAD_AGAIN}"
    )
