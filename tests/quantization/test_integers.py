"""What is computed with the checkpoint's integers, bit for bit, and what a layer keeps of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quant_checkpoints import QuantisedModels

from ascend_plugin.ops.static_quant import static_quant
from ascend_plugin.quantization.execute import Operand, input_numbers, make_kernel
from ascend_plugin.quantization.formats import describe
from ascend_plugin.quantization.plan import Kernel
from ascend_plugin.quantization.scheme import InputScheme
from ascend_plugin.quantization.unpack import Codes, StaticInput

K, N = 320, 96


def quantise_static(x: torch.Tensor, static: StaticInput) -> torch.Tensor:
    return static_quant(x, *input_numbers(static, torch.float32))


def _operand(extreme: bool) -> Operand:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    if extreme:
        codes.fill_(-128)
        codes[::2] = 127
    # Powers of two: the final scale rounds nothing.
    scales = 2.0 ** torch.randint(-9, -3, (N, 1), generator=generator)
    bias = torch.randint(-(1 << 20), 1 << 20, (N,), generator=generator, dtype=torch.int32)
    static = StaticInput(0.037, -19)
    scheme = InputScheme(dynamic=False, symmetric=False)
    return Operand(Codes(codes, scales), 8, K, scheme, static, bias, None, torch.float32)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_static_w8a8_is_integer_arithmetic(implementation: str, extreme: bool, tokens: int) -> None:
    """With offset and quant_bias, as ModelSlim means it: int32 up to the final scale."""
    operand = _operand(extreme)
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens)) * 3
    if extreme:
        x = x.sign() * 1e6
    quantised = ((x.double() / torch.tensor(0.037).double()).float() - 19).round()
    want = quantised.clamp(-128, 127).long() @ operand.codes.codes.long().T
    want = (want + operand.quant_bias.long()).double() * operand.codes.scales.flatten().double()
    got = make_kernel(Kernel.INT8_STATIC, operand)(x, False)
    assert got.dtype == torch.float32
    same = quantise_static(x, operand.static).long() == quantised.clamp(-128, 127).long()
    assert same.float().mean() > 0.999  # a half may fall to either side
    assert torch.equal(got[same.all(1)].double(), want[same.all(1)])
    assert same.all(1).any()


def test_static_rounds_to_even_and_saturates() -> None:
    x = torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75, 1e9, -1e9, 0.0]])
    codes = quantise_static(x, StaticInput(0.5, 3))
    assert codes.tolist() == [[4, 4, 6, 2, 2, 127, -128, 3]]


class _Layer(torch.nn.Module):
    """As much of vLLM's linear layer as a method sees, with one of ``world`` processes."""

    def __init__(self, sizes: list[int], world: int, rank: int) -> None:
        super().__init__()
        self.output_size = sum(sizes)
        self.output_partition_sizes = [size // world for size in sizes]
        self.tp_size, self.tp_rank = world, rank


def _run_layer(path: str, names: list[str], sizes: tuple[int, int], split: str, world: int) -> Any:
    """Load modules into layers of every process; return their kernels' inputs to outputs."""
    from ascend_plugin.quantization.linear import QuantisedLinearMethod

    checkpoint = describe(Path(path))
    assert checkpoint is not None
    n, k = sizes
    layers = []
    for rank in range(world):
        rows, columns = (world, 1) if split == "rows" else (1, world)
        layer = _Layer([n] * len(names), rows, rank if split == "rows" else 0)
        layer.tp_size, layer.tp_rank = world, rank
        modules = [checkpoint.modules[name] for name in names]
        method = QuantisedLinearMethod(modules, checkpoint.index)
        parts = layer.output_partition_sizes
        method.create_weights(layer, k // columns, parts, k, layer.output_size, torch.float32)
        ids = "qkv" if len(names) == 3 else range(len(names))
        for shard, module in zip(ids, modules, strict=True):
            for role, info in module.tensors.items():
                holder = getattr(layer, role)
                holder.weight_loader(holder, checkpoint.index.read(info.name), shard)
        method.process_weights_after_loading(layer)
        layers.append(SimpleNamespace(layer=layer, method=method))
    return layers


QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
GATE_UP = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]
DOWN = ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    "name", ["modelslim-mixed", "modelslim-w4a16-group-asymmetric", "gptq-desc-act", "awq"]
)
def test_row_shards_are_the_whole(quantised: QuantisedModels, name: str) -> None:
    path = quantised(name).path
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    (whole,) = _run_layer(path, GATE_UP, (256, 128), "rows", 1)
    halves = _run_layer(path, GATE_UP, (256, 128), "rows", 2)
    want = whole.method.apply(whole.layer, x).unflatten(-1, (2, 2, 128))  # part, process, row
    for rank, half in enumerate(halves):
        got = half.method.apply(half.layer, x).unflatten(-1, (2, 128))
        torch.testing.assert_close(got, want[:, :, rank], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "modelslim-w8a8",  # quant_bias is added once
        "modelslim-w4a16-group-asymmetric",
        "compressed-w4a16-channel-asymmetric",
        "gptq-asymmetric",
        "awq",
    ],
)
def test_column_shards_add_up(quantised: QuantisedModels, name: str) -> None:
    path = quantised(name).path
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    (whole,) = _run_layer(path, DOWN, (128, 256), "columns", 1)
    halves = _run_layer(path, DOWN, (128, 256), "columns", 2)
    want = whole.method.apply(whole.layer, x)
    first, second = (
        half.method.apply(half.layer, x[:, rank * 128 : rank * 128 + 128])
        for rank, half in enumerate(halves)
    )
    torch.testing.assert_close(first + second, want, rtol=1e-4, atol=1e-4)


def test_groups_that_columns_cut_apart(quantised: QuantisedModels) -> None:
    from ascend_plugin.quantization.errors import CheckpointError

    path = quantised("compressed-w4a16-group-asymmetric").path  # groups of 64
    with pytest.raises(CheckpointError) as caught:
        _run_layer(path, DOWN, (128, 256), "columns", 8)
    message = str(caught.value)
    for part in ("model.safetensors", "down_proj", "groups of 64", "get 32 each", "--tensor-para"):
        assert part in message


@pytest.mark.parametrize(
    ("name", "names", "runs"),
    [
        ("compressed-w4a16-group", QKV, 1),
        ("modelslim-w8a8", QKV, 1),
        ("gptq-desc-act", QKV, 1),
        ("modelslim-mixed", QKV, 3),
        ("modelslim-mixed", GATE_UP, 2),
        ("gptq-dynamic", QKV, 2),
    ],
)
def test_parts_that_run_alike_run_at_once(
    quantised: QuantisedModels, name: str, names: list[str], runs: int
) -> None:
    sizes = {"q": 256, "k": 128, "v": 128}
    path = quantised(name).path
    if names is GATE_UP:
        (one,) = _run_layer(path, names, (256, 128), "rows", 1)
    else:
        (one,) = _qkv_layer(path, [sizes[part] for part in "qkv"])
    assert len(one.layer.ascend_runs) == runs


def _qkv_layer(path: str, sizes: list[int]) -> Any:
    from ascend_plugin.quantization.linear import QuantisedLinearMethod

    checkpoint = describe(Path(path))
    assert checkpoint is not None
    modules = [checkpoint.modules[name] for name in QKV]
    layer = _Layer(sizes, 1, 0)
    method = QuantisedLinearMethod(modules, checkpoint.index)
    method.create_weights(layer, 128, sizes, 128, sum(sizes), torch.float32)
    for shard, module in zip("qkv", modules, strict=True):
        for role, info in module.tensors.items():
            holder = getattr(layer, role)
            holder.weight_loader(holder, checkpoint.index.read(info.name), shard)
    method.process_weights_after_loading(layer)
    return [SimpleNamespace(layer=layer, method=method)]


@pytest.mark.parametrize("name", ["compressed-w4a16-group", "gptq", "awq", "modelslim-w8a16"])
def test_nothing_but_the_packed_weight_is_kept(quantised: QuantisedModels, name: str) -> None:
    """No second copy: neither in bfloat16 nor as it was loaded."""
    (one,) = _run_layer(quantised(name).path, DOWN, (128, 256), "columns", 1)
    assert not list(one.layer.parameters())
    kept = {}
    for module in one.layer.modules():
        values = [*vars(module).values(), *module._buffers.values()]
        packed = [getattr(value, "packed", value) for value in values]
        for value in [*values, *packed]:
            if hasattr(value, "nbytes") and not isinstance(value, torch.nn.Module):
                kept[id(value)] = value.nbytes
    checkpoint = describe(Path(quantised(name).path))
    assert checkpoint is not None
    stored = checkpoint.modules[DOWN[0]].nbytes
    # g_idx of a few modules and padding of a few rows are all the difference that there is.
    assert 0.5 * stored < sum(kept.values()) < 1.05 * stored
