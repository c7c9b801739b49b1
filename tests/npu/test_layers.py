"""Norms, activation, rotary embedding and linear layers on the NPU, against plain torch."""

from __future__ import annotations

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16)


def _near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu().float(), want.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 128), (7, 3, 128)], ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    from ascend_plugin.ops.npu import elementwise

    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    norm = torch.nn.functional.rms_norm
    on_device = (x.to(device), weight.to(device))
    _near(elementwise.rms_norm(*on_device, 1e-6), norm(x.float(), shape[-1:], weight.float(), 1e-6))
    got, total = elementwise.add_rms_norm(
        x.to(device), residual.to(device), weight.to(device), 1e-6
    )
    _near(total, x.float() + residual.float())
    _near(got, norm(x.float() + residual.float(), shape[-1:], weight.float(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_in_place(dtype: torch.dtype, device: torch.device) -> None:
    from ascend_plugin.ops.add_rms_norm import add_rms_norm

    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 128).to(dtype)
    weight, there = torch.randn(128).to(dtype), residual.to(device)
    got = add_rms_norm(x.to(device), there, weight.to(device), 1e-6)
    want = add_rms_norm(x, residual, weight, 1e-6)
    _near(there, residual)
    _near(got, want)
    with pytest.raises(ValueError, match=r"residual must have the shape of x, \[5, 128\]"):
        add_rms_norm(x.to(device), there[:3], weight.to(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype: torch.dtype, device: torch.device) -> None:
    from ascend_plugin.ops.npu import elementwise

    x = torch.randn(5, 96).to(dtype)
    gate, up = x.float().chunk(2, -1)
    _near(elementwise.swiglu(x.to(device)), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [128, 64])
def test_rotary_takes_slices_of_a_projection(
    rotary_dim: int, neox: bool, device: torch.device
) -> None:
    from ascend_plugin.ops.npu import elementwise

    torch.manual_seed(0)
    head_dim, heads, kv_heads = 128, 4, 2
    wide = torch.randn(6, (heads + 2 * kv_heads) * head_dim).to(torch.bfloat16)
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    angles = torch.randn(40, rotary_dim // 2)
    cache = torch.cat((angles.cos(), angles.sin()), -1).to(torch.bfloat16)
    positions = torch.tensor([0, 7, 39, 3, 3, 1])
    query, key, _ = wide.to(device).split(sizes, -1)
    found = elementwise.rotary(
        positions.to(device), query, key, cache.to(device), head_dim, neox=neox
    )
    cos, sin = cache[positions].float()[:, None].chunk(2, -1)
    for got, rows in zip(found, wide.split(sizes, -1)[:2], strict=True):
        assert got.is_contiguous()
        x = rows.float().unflatten(-1, (-1, head_dim))
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        if neox:
            a, b = turned.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        else:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        _near(got, torch.cat((turned, rest), -1).flatten(-2))


@pytest.mark.parametrize("bias", [True, False])
def test_weights_in_nz_order_mean_the_same(bias: bool, device: torch.device) -> None:
    import torch_npu

    from ascend_plugin.ops.npu import linear

    torch.manual_seed(0)
    weight = torch.randn(96, 64).to(torch.bfloat16)
    x = torch.randn(5, 64).to(torch.bfloat16)
    shift = torch.randn(96).to(torch.bfloat16) if bias else None
    ordered = linear.to_nz(weight.to(device))
    assert torch_npu.get_npu_format(ordered) == linear.FORMAT_NZ
    assert torch.equal(ordered.cpu(), weight)
    got = linear.linear(x.to(device), ordered, None if shift is None else shift.to(device))
    want = torch.nn.functional.linear(
        x.float(), weight.float(), None if shift is None else shift.float()
    )
    torch.testing.assert_close(got.cpu().float(), want, atol=0.1, rtol=2e-2)


@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_takes_parts_of_heads(scaled: bool, device: torch.device) -> None:
    """As latent attention has them: beside what is not turned; nothing there is written."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding as layers

    from ascend_plugin.worker.npu_layers import _rotary_forward

    torch.manual_seed(4)
    with set_current_vllm_config(VllmConfig()):
        sizes = (64, 64, 128, 10000.0, False)
        if scaled:
            turn = layers.DeepseekScalingRotaryEmbedding(*sizes, 4.0, torch.bfloat16, mscale=0.7)
        else:
            turn = layers.RotaryEmbedding(*sizes, torch.bfloat16)
    positions = torch.randint(0, 128, (9,))
    query = torch.randn(9, 4, 192).to(torch.bfloat16)
    latents = torch.randn(9, 576).to(torch.bfloat16)
    parts = query[..., 128:], latents[:, None, 512:]
    want = turn.forward_native(positions, *parts)
    on_device = query.to(device), latents.to(device)
    got = _rotary_forward(
        turn.to(device),
        positions.to(device),
        on_device[0][..., 128:],
        on_device[1][:, None, 512:],
    )
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.cpu(), theirs, atol=3e-2, rtol=2e-2)
    assert torch.equal(on_device[0].cpu(), query)


@pytest.mark.parametrize("shape", [(90, 64), (16,)], ids=str)
def test_weights_that_are_no_fractals_stay(shape: tuple[int, ...], device: torch.device) -> None:
    from ascend_plugin.ops.npu import linear

    weight = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    assert linear.to_nz(weight) is weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 70])
def test_dense_matmul(m: int, dtype: torch.dtype, device: torch.device) -> None:
    from ascend_plugin.ops.dense_matmul import dense_matmul

    torch.manual_seed(0)
    x, weights, bias = torch.randn(m, 96), torch.randn(40, 96) / 10, torch.randn(40)
    x, weights, bias = x.to(dtype), weights.to(dtype), bias.to(dtype)
    there = [tensor.to(device) for tensor in (x, weights, bias)]
    _near(dense_matmul(*there), dense_matmul(x, weights, bias))
    _near(dense_matmul(*there[:2]), dense_matmul(x, weights))
    with pytest.raises(ValueError, match=r"bias must be .* \[40\]"):
        dense_matmul(there[0], there[1], there[2][:39])
