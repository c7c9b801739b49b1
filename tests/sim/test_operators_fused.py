"""Norms, gated activations, rotary embedding, matrix products and sampling helpers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sim_parity import parity

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHORT = [torch.bfloat16, torch.float16]
F = torch.nn.functional


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _on_npu(x: torch.Tensor) -> bool:
    return x.device.type == "npu"


def _rms(x: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama's formula in float32, with its rounding before gamma."""
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return gamma * (wide * rstd).to(x.dtype), rstd


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 96), (2, 3, 33)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    import torch_npu

    def function(x: torch.Tensor, gamma: torch.Tensor) -> Any:
        return tuple(torch_npu.npu_rms_norm(x, gamma, 1e-6)) if _on_npu(x) else _rms(x, gamma)

    x, gamma = _normal(*shape, dtype=dtype), _normal(shape[-1], dtype=dtype, seed=8)
    parity(function, x, gamma, operator="RmsNorm")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    import torch_npu

    def function(x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> Any:
        if _on_npu(x):
            return tuple(torch_npu.npu_add_rms_norm(x, y, gamma, 1e-6))
        return (*_rms(x + y, gamma), x + y)

    x, y = _normal(5, 96, dtype=dtype), _normal(5, 96, dtype=dtype, seed=9)
    parity(function, x, y, _normal(96, dtype=dtype), operator="AddRmsNorm")


def test_add_rms_norm_in_place_and_with_a_float_result() -> None:
    import torch_npu

    def in_place(x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        if _on_npu(x):
            return torch_npu.npu_add_rms_norm_v2(x, y, gamma, 1e-6)
        total = x + y
        result, rstd = _rms(total, gamma)
        x.copy_(result)
        y.copy_(total)
        return rstd

    def cast(x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> Any:
        if _on_npu(x):
            return tuple(torch_npu.npu_add_rms_norm_cast(x, y, gamma, 1e-6))
        result, rstd = _rms(x + y, gamma)
        return result.float(), result, rstd, x + y

    x, y = _normal(5, 96, dtype=torch.bfloat16), _normal(5, 96, dtype=torch.bfloat16, seed=9)
    gamma = _normal(96, dtype=torch.bfloat16)
    parity(in_place, x, y, gamma, operator="InplaceAddRmsNorm")
    parity(cast, x, y, gamma, operator="AddRmsNormCast", tolerance=2**-7)


def test_gemma_and_layer_norm() -> None:
    import torch_npu

    def gemma(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return torch_npu.npu_gemma_rms_norm(x, gamma)[0] if _on_npu(x) else _rms(x, 1 + gamma)[0]

    x, gamma, bias = _normal(5, 96), _normal(96, seed=8), _normal(96, seed=9)
    parity(gemma, x, gamma, operator="GemmaRmsNorm")
    parity(lambda t, w, b: F.layer_norm(t, (96,), w, b), x, gamma, bias, operator="LayerNorm")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_swiglu(dtype: torch.dtype) -> None:
    import torch_npu

    def function(x: torch.Tensor, dim: int) -> torch.Tensor:
        if _on_npu(x):
            return torch_npu.npu_swiglu(x, dim)
        gate, up = x.float().chunk(2, dim)
        return (F.silu(gate) * up).to(x.dtype)

    parity(function, _normal(7, 66, dtype=dtype), -1, operator="SwiGlu")
    parity(function, _normal(4, 3, 5, dtype=dtype), 0)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    wide = x.float()
    if mode == "half":
        a, b = wide.chunk(2, -1)
        partner = torch.cat((-b, a), -1)
    else:
        partner = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
    return (wide * cos.float() + partner * sin.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul(dtype: torch.dtype, mode: str) -> None:
    import torch_npu

    def function(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if _on_npu(x):
            return torch_npu.npu_rotary_mul(x, cos, sin, mode)
        return _rotate(x, cos, sin, mode)

    x = _normal(2, 5, 3, 64, dtype=dtype)
    angles = _normal(1, 5, 1, 64)
    parity(function, x, angles.cos().to(dtype), angles.sin().to(dtype))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_apply_rotary_pos_emb(dtype: torch.dtype) -> None:
    import torch_npu

    def function(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        if _on_npu(q):
            return torch_npu.npu_apply_rotary_pos_emb(q, k, cos, sin, "TND", "half")
        q.copy_(_rotate(q, cos, sin, "half"))
        k.copy_(_rotate(k, cos, sin, "half"))
        return q, k

    q, k = _normal(5, 4, 64, dtype=dtype), _normal(5, 2, 64, dtype=dtype, seed=8)
    angles = _normal(5, 1, 64)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    parity(function, q, k, cos, sin, operator="ApplyRotaryPosEmbV2")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("rotary", [32, 64])
def test_rotary_from_a_cache(dtype: torch.dtype, mode: str, rotary: int) -> None:
    import torch_npu

    def function(
        positions: torch.Tensor, qkv: torch.Tensor, cache: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        query, key = qkv[:, :256], qkv[:, 256:384]  # slices of the fused projection
        if _on_npu(query):
            return tuple(
                torch_npu.npu_mrope(
                    *(positions, query, key, cache, 64),
                    mrope_section=[0, 0, 0],
                    rotary_mode=mode,
                )
            )
        cos, sin = cache[positions].chunk(2, -1)
        if mode == "half":
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        else:
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        result = []
        for x in (query, key):
            heads = x.unflatten(-1, (-1, 64))
            turned = _rotate(heads[..., :rotary], cos[:, None], sin[:, None], mode)
            result.append(torch.cat((turned, heads[..., rotary:]), -1).flatten(1))
        return tuple(result)

    angles = _normal(20, rotary // 2)
    cache = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    positions = torch.tensor([3, 19, 0])
    qkv = _normal(3, 512, dtype=dtype)
    parity(function, positions, qkv, cache, operator="RopeWithSinCosCacheV2")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 33), (7, 33, 64), (33, 128, 1)])
def test_matrix_products(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b, w = (
        _normal(m, k, dtype=dtype),
        _normal(k, n, dtype=dtype, seed=8),
        _normal(n, k, dtype=dtype, seed=9),
    )
    bias = _normal(n, dtype=dtype)
    scale = 2e-4 if dtype == torch.float32 else None
    parity(torch.matmul, a, b, tolerance=scale)
    parity(F.linear, a, w, tolerance=scale)
    parity(F.linear, a, w, bias, tolerance=2 * 2**-7 if dtype == torch.bfloat16 else scale)
    parity(torch.matmul, a.t().contiguous().t(), b, tolerance=scale)
    parity(torch.matmul, a.expand(3, m, k).contiguous(), b, tolerance=scale)
    batch = (_normal(3, m, k, dtype=dtype), _normal(3, k, n, dtype=dtype, seed=8))
    parity(torch.bmm, *batch, operator="BatchMatMul", tolerance=scale)
    parity(torch.baddbmm, _normal(3, m, n), *(each.float() for each in batch), tolerance=2e-4)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    a, b = _normal(5, 1024, dtype=dtype), _normal(1024, 17, dtype=dtype, seed=8)
    exact = a.double() @ b.double()
    error = (torch.matmul(a.npu(), b.npu()).cpu().double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4).all()


def test_addmm_with_factors() -> None:
    a, b, c = _normal(3, 5), _normal(5, 4), _normal(3, 4)
    parity(lambda t, x, y: torch.addmm(t, x, y, beta=0.5, alpha=2), c, a, b, operator="Addmm")
    parity(lambda t, x, y: t.addmm_(x, y, beta=0.5), c, a, b, operator="InplaceAddmm")
    parity(torch.dot, a[0], a[1], operator="Dot")
    parity(torch.mv, a, a[0], operator="Mv")
    parity(torch.mm, a, b, operator="Mm")


def test_top_k_top_p() -> None:
    import torch_npu

    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0, 0.0], [5.0, 1.0, 1.5, 4.9, 0.0]])
    k, p = torch.tensor([2, 5], dtype=torch.int32), torch.tensor([1.0, 0.9])
    both = torch_npu.npu_top_k_top_p(logits.npu(), p.npu(), k.npu()).cpu()
    nothing = -torch.inf
    # Row 0: two largest. Row 1: 5.0 and 4.9 hold 0.96 of the mass; 5.0 alone holds 0.50.
    expected = [
        [nothing, 4.0, nothing, 3.0, nothing],
        [5.0, nothing, nothing, 4.9, nothing],
    ]
    assert torch.equal(both, torch.tensor(expected))
    only_k = torch_npu.npu_top_k_top_p(logits.npu(), None, k.npu()).cpu()
    assert torch.equal(only_k.isfinite().sum(-1), torch.tensor([2, 5]))
    only_p = torch_npu.npu_top_k_top_p(logits.npu(), p.npu(), None).cpu()
    assert torch.equal(only_p.isfinite().sum(-1), torch.tensor([5, 2]))


def test_greedy_and_random_sampling() -> None:
    logits = _normal(64, 33).npu()
    assert torch.equal(logits.argmax(-1).cpu(), logits.cpu().argmax(-1))
    probabilities = torch.tensor([0.1, 0.2, 0.7]).repeat(6000, 1).npu()
    noise = torch.empty_like(probabilities).exponential_()
    drawn = (probabilities / noise).argmax(-1).cpu()
    frequencies = torch.bincount(drawn, minlength=3) / 6000
    torch.testing.assert_close(frequencies, torch.tensor([0.1, 0.2, 0.7]), atol=0.02, rtol=0)
