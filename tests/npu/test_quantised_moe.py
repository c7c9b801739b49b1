"""Quantised experts on the NPU: the CPU platform's tokens, and what the operators take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import EngineProcess
from npu_engines import assert_identical, assert_near, on_the_cpu, settings
from prompts import tokens
from quant_checkpoints import QuantisedModels

from ascend_plugin.ops.dispatch import UnsupportedRequestError

RUN: dict[str, Any] = {
    "prompts": [tokens(length, seed=i) for i, length in enumerate((5, 129))],
    "max_tokens": 6,
}

#: As in test_quantised_engine.py; a token's experts may differ too.
WIDE_TIE = 0.15

NAMES = [
    "modelslim-w8a8-dynamic",
    "compressed-w8a8-dynamic",
    "compressed-w4a16-group",
    "gptq",
    "awq",
]


@pytest.fixture(scope="module")
def moe(quantised: QuantisedModels) -> Any:
    """Settings of an engine on a mixture of experts by checkpoint."""
    return lambda name, graphs="eager": settings(quantised(name, "qwen3_moe").path, graphs)


@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_cpu(
    npu: EngineProcess, cpu: EngineProcess, moe: Any, name: str
) -> None:
    answer = npu.run(moe(name), RUN)
    assert answer.made_of["platform"] == "AscendNPUPlatform"
    assert "model.layers.*.mlp.experts.*.up_proj ×16: W" in answer.log
    assert "npu_grouped_matmul" in answer.log
    wanted = cpu.run(on_the_cpu(moe(name)), RUN)
    assert_near(wanted.outputs(), answer.outputs(), WIDE_TIE)


@pytest.mark.engine
def test_graphs_give_the_tokens_of_the_eager_engine(npu: EngineProcess, moe: Any) -> None:
    eager = npu.run(moe("modelslim-w8a8-dynamic"), RUN)
    answer = npu.run(moe("modelslim-w8a8-dynamic", "full and piecewise"), RUN)
    assert_identical(eager.outputs(), answer.outputs())
    assert answer.made_of["graphs"]["replays"] > 0


@pytest.mark.engine
def test_what_experts_are_refused_is_said(npu: EngineProcess, moe: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        npu.run(moe("gptq-desc-act"), RUN)
    assert "groups in the order of activations (desc_act) of experts" in str(caught.value)
    assert "set ASCEND_PLUGIN_DEVICE=cpu to serve on the CPU" in str(caught.value)


TOKENS, HIDDEN, INNER, EXPERTS = 9, 64, 32, 6


def _drawn(n: int, k: int, bits: int, group: int, zeros: bool) -> tuple[list[Any], torch.Tensor]:
    """Return unpacked experts, and the weights that they mean, ``[experts, n, k]``."""
    from ascend_plugin.ops.npu.quantised_experts import ExpertCodes

    generator = torch.Generator().manual_seed(n + k)
    experts, weights = [], []
    low = -(1 << (bits - 1))
    for _ in range(EXPERTS):
        codes = torch.randint(low, -low, (n, k), generator=generator, dtype=torch.int8)
        scales = (torch.rand(n, k // group, generator=generator) + 0.5) * (k**-0.5 / -low)
        points = torch.randint(-4, 4, scales.shape, generator=generator, dtype=torch.int8)
        wide = codes.float()
        if zeros:
            wide = wide - points.float().repeat_interleave(group, 1)
        weights.append(wide * scales.repeat_interleave(group, 1))
        experts.append(ExpertCodes(codes, scales, points if zeros else None))
    return experts, torch.stack(weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("bits", "group", "zeros", "int8"),
    [
        (8, 0, False, True),
        (8, 0, True, False),
        (4, 0, False, False),
        (4, 0, True, False),
        (4, 32, False, False),
        (4, 32, True, False),
    ],
)
@pytest.mark.parametrize("count", [1, TOKENS])
def test_products_of_experts(
    count: int,
    bits: int,
    group: int,
    zeros: bool,
    int8: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Some experts get no row; a token's experts are in no order."""
    from ascend_plugin.ops.npu import quantised_experts

    torch.manual_seed(1)
    weights = []
    packed = []
    for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        size = min(group, k) or k
        experts, meant = _drawn(n, k, bits, size, zeros)
        weights.append(meant)
        packed.append(
            quantised_experts.pack(
                experts, bits=bits, group=size, int8_input=int8, dtype=dtype, device=device
            )
        )
    x = torch.randn(count, HIDDEN).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(count)]).int()
    shares = torch.rand(count, 2)
    got = quantised_experts.swiglu_experts(x.to(device), *packed, shares.to(device), ids.to(device))
    want = torch.zeros(count, HIDDEN)
    for token in range(count):
        for share, expert in zip(shares[token], ids[token].tolist(), strict=True):
            gate, up = (weights[0][expert] @ x[token].float()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            want[token] += share * (weights[1][expert] @ inner)
    torch.testing.assert_close(got.cpu().float(), want, atol=6e-2, rtol=5e-2)


def test_experts_that_operators_refuse(device: torch.device) -> None:
    from ascend_plugin.ops.npu import quantised_experts

    def pack(n: int, bits: int, group: int, experts: int = EXPERTS) -> None:
        drawn, _ = _drawn(n, HIDDEN, bits, group, False)
        quantised_experts.pack(
            drawn[:experts],
            bits=bits,
            group=group,
            int8_input=False,
            dtype=torch.bfloat16,
            device=device,
        )

    with pytest.raises(UnsupportedRequestError, match="with a scale per column only"):
        pack(32, 8, 32)
    with pytest.raises(UnsupportedRequestError, match="12 output features of 4-bit codes"):
        pack(12, 4, 32)
    with pytest.raises(UnsupportedRequestError, match="1 experts: allowed are 2 to 1024"):
        pack(32, 4, 32, 1)


def test_float_experts_beside_quantised_ones(device: torch.device) -> None:
    """The weights of one product may be float, those of the other integers."""
    from ascend_plugin.ops.npu import quantised_experts

    torch.manual_seed(2)
    dtype = torch.bfloat16
    floats = (torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5).to(dtype)
    experts, meant = _drawn(HIDDEN, INNER, 8, INNER, False)
    down = quantised_experts.pack(
        experts, bits=8, group=INNER, int8_input=True, dtype=dtype, device=device
    )
    gate_up = quantised_experts.pack_floats(list(floats), device)
    x = torch.randn(3, HIDDEN).to(dtype)
    ids = torch.tensor([[0], [5], [2]], dtype=torch.int32)
    got = quantised_experts.swiglu_experts(
        x.to(device), gate_up, down, torch.ones(3, 1, device=device), ids.to(device)
    )
    gate, up = torch.einsum("tnk,tk->tn", floats[ids[:, 0]].float(), x.float()).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    want = torch.einsum("tnk,tk->tn", meant[ids[:, 0]], inner)
    torch.testing.assert_close(got.cpu().float(), want, atol=6e-2, rtol=5e-2)
