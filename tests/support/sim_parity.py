"""Runs a function on the CPU and on the simulated NPU and compares the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Largest error relative to the larger of 1 and the value: one rounding, and a little for float32.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def launches() -> Any:
    """Return the counter of operators that ran in this process."""
    from ascend_plugin.ops.sim.bind import TABLE

    return TABLE.launches


def to(device: str, value: Any) -> Any:
    """Move every tensor in nested lists and tuples, with its strides."""
    if isinstance(value, torch.Tensor):
        if device == "cpu":
            return value.clone() if value.is_contiguous() else value
        if value.is_contiguous() or value.numel() == 0:
            return value.to(device)
        base = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return base.copy_(value)
    if isinstance(value, (list, tuple)):
        return type(value)(to(device, each) for each in value)
    return value


def assert_close(result: torch.Tensor, expected: torch.Tensor, tolerance: float | None) -> None:
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    if tolerance is None:
        tolerance = TOLERANCES.get(expected.dtype, 0.0)
    if not tolerance:
        assert torch.equal(result, expected)
        return
    torch.testing.assert_close(
        result.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def parity(
    function: Callable[..., Any],
    *args: Any,
    operator: str | Sequence[str] = (),
    tolerance: float | None = None,
) -> None:
    """Assert that results and changed arguments agree, and that the named operators ran."""
    counted = launches().copy()
    on_cpu, on_npu = to("cpu", args), to("npu", args)
    expected, result = function(*on_cpu), function(*on_npu)
    pairs = [(result, expected), (on_npu, on_cpu)]
    while pairs:
        left, right = pairs.pop()
        if isinstance(right, torch.Tensor):
            assert left.device.type == "npu"
            assert_close(left.cpu(), right, tolerance)
        elif isinstance(right, (list, tuple)):
            pairs += zip(left, right, strict=True)
    names = [operator] if isinstance(operator, str) else operator
    ran = launches() - counted
    for name in names:
        assert ran[f"aclnn{name}"], f"aclnn{name} did not run; these did: {sorted(ran)}"
