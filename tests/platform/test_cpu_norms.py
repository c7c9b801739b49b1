"""The fused norms that eager models use: the meaning of vLLM's own implementation."""

from __future__ import annotations

import pytest
import torch
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.platforms import current_platform

from ascend_plugin.worker.cpu_gemma import fold_norms

current_platform.import_ir_kernels()
PROVIDER = "ascend_cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 64), (7, 576), (3, 9, 80)])
def test_norm_equals_native(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)
    x = wide[..., : shape[-1]]  # strided, as heads cut out of a fused projection
    weight = torch.rand(shape[-1], generator=generator).to(dtype)
    impls = ir.ops.rms_norm.impls
    want = impls["native"].impl_fn(x, weight, 1e-6)
    _close(impls[PROVIDER].impl_fn(x, weight, 1e-6), want)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(5, 576), (3, 9, 80)])
def test_gemmas_norms_are_vllms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Weights in float32, folded: what vLLM's layer computes from its own."""
    with set_current_vllm_config(VllmConfig()):
        layer = GemmaRMSNorm(shape[-1], 1e-6).to(dtype)
    layer.weight.data.copy_(torch.randn(shape[-1]) / 20)
    x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]
    want = layer.forward_native(x)
    assert fold_norms(torch.nn.Sequential(layer, torch.nn.Linear(2, 2))) == 1
    _close(layer(x), want)
    assert ir.ops.rms_norm.impls[PROVIDER].supports_args(x, layer.weight.float(), 1e-6)
    _close(ir.ops.rms_norm.impls[PROVIDER].impl_fn(x, 1 + layer.weight.float(), 1e-6), want)
    layer.weight.data.zero_()
    fold_norms(layer)
    _close(layer(x), layer.forward_native(x))
    if x.dim() == 2:
        added, total = layer(x, x.clone())
        wanted, twice = layer.forward_native(x, x.clone())
        _close(added, wanted)
        _close(total, twice)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_sum_and_its_norm_equal_native(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 7, 576, generator=generator).to(dtype)
    weight = torch.rand(576, generator=generator).to(dtype)
    impls = ir.ops.fused_add_rms_norm.impls
    want, total = impls["native"].impl_fn(x, residual, weight, 1e-6)
    got, kept = impls[PROVIDER].impl_fn(x, residual, weight, 1e-6)
    _close(got, want)
    assert kept is residual  # in place
    assert torch.equal(residual, total)


def test_what_the_kernels_cannot_do_is_left_to_native() -> None:
    x = torch.randn(4, 64)
    norm = ir.ops.rms_norm.impls[PROVIDER].supports_args
    weight = torch.ones(64)
    assert norm(x, weight, 1e-6)
    assert not norm(x, None, 1e-6)
    assert not norm(x, weight.bfloat16(), 1e-6)
    assert not norm(x, weight, 1e-6, 32)
    add = ir.ops.fused_add_rms_norm.impls[PROVIDER].supports_args
    assert add(x, x, weight, 1e-6)
    assert not add(x[None], x[None], weight, 1e-6)
    assert not add(x, x.bfloat16(), weight, 1e-6)
    assert not add(x, x, None, 1e-6)
    assert not add(torch.randn(64, 4).t(), x, weight, 1e-6)
