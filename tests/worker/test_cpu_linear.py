"""vLLM's layers without quantisation on ``dense_matmul``: which, with what, and once in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import utils

from ascend_plugin.compat import apply_worker_patches
from ascend_plugin.worker import cpu_linear


@pytest.fixture
def dispatch() -> Iterator[Callable[..., None]]:
    """The patched function, and vLLM's own or what this process had before it afterwards."""
    current = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = getattr(current, "__wrapped__", current)
    apply_worker_patches()
    yield utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = current


def _layer(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return layer


def _config(mode: CompilationMode) -> VllmConfig:
    config = VllmConfig()
    config.compilation_config.mode = mode
    return config


def test_the_patch_is_applied_once(dispatch: Callable[..., None]) -> None:
    apply_worker_patches()
    assert utils.dispatch_cpu_unquantized_gemm is dispatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("remove_weight", [True, False])
def test_weights_stay_where_they_are(
    dispatch: Callable[..., None], dtype: torch.dtype, remove_weight: bool
) -> None:
    layer = _layer(torch.randn(48, 33).to(dtype), torch.randn(48).to(dtype))
    where, want = layer.weight.data_ptr(), layer.weight.clone()
    with set_current_vllm_config(_config(CompilationMode.NONE)):
        dispatch(layer, remove_weight=remove_weight)
    assert layer.cpu_linear is cpu_linear.multiply
    assert layer.weight.data_ptr() == where
    assert torch.equal(layer.weight, want)
    for shape in ((33,), (5, 33), (2, 3, 33), (0, 33), (2, 0, 33)):
        x = torch.randn(shape).to(dtype)
        out = layer.cpu_linear(x, layer.weight, layer.bias)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    x = torch.randn(33, 4).to(dtype).t()
    torch.testing.assert_close(
        layer.cpu_linear(x, layer.weight, None),
        layer.cpu_linear(x.contiguous(), layer.weight, None),
    )


def test_weights_in_another_order_are_put_into_rows(dispatch: Callable[..., None]) -> None:
    layer = _layer(torch.randn(20, 30).t())
    dispatch(layer, remove_weight=True)
    x = torch.randn(3, 20)
    out = layer.cpu_linear(x, layer.weight, None)
    torch.testing.assert_close(out, x @ layer.weight.t())


def test_compiled_models_keep_vllms_path(dispatch: Callable[..., None]) -> None:
    layer = _layer(torch.randn(48, 32))
    with set_current_vllm_config(_config(CompilationMode.VLLM_COMPILE)):
        dispatch(layer, remove_weight=True)
    assert layer.cpu_linear is not cpu_linear.multiply
    assert layer.weight.numel() == 0  # packed


@pytest.mark.parametrize(
    "layer",
    [
        _layer(torch.randn(4, 1, 3)),
        _layer(torch.randn(4, 8, device="meta")),
        _layer(torch.randn(16, 32).bfloat16(), torch.randn(16)),
    ],
    ids=["three dimensions", "meta", "bias of another type"],
)
def test_others_are_left_alone(dispatch: Callable[..., None], layer: torch.nn.Module) -> None:
    dispatch(layer, remove_weight=False)
    assert getattr(layer, "cpu_linear", None) is not cpu_linear.multiply
