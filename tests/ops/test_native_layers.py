"""Small layers of a decode step in every instruction set: against float64, torch and vLLM."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import implementations
import pytest
import torch
import torch.nn.functional as F
import vllm._C  # noqa: F401  registers torch.ops._C
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import threads

from ascend_plugin.ops import native
from ascend_plugin.ops.native import abi, loader
from ascend_plugin.ops.native.abi import Elementwise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Rounding the result once, and the arithmetic of float32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}
ISAS = [isa for isa in implementations.ISAS if implementations.why_not(f"native-{isa}") is None]
#: In float64, without the cancellation that torch's have on the negative side.
MEANING: dict[Elementwise, Callable[..., torch.Tensor]] = {
    Elementwise.COPY: lambda x: x,
    Elementwise.SILU: lambda x: x * torch.sigmoid(x),
    Elementwise.GELU: lambda x: 0.5 * x * torch.special.erfc(-x / 2**0.5),
    Elementwise.GELU_TANH: lambda x: (
        x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    ),
    Elementwise.ADD: torch.add,
    Elementwise.MULTIPLY: torch.mul,
}
TORCH: dict[Elementwise, Callable[..., torch.Tensor]] = {
    Elementwise.COPY: torch.clone,
    Elementwise.SILU: F.silu,
    Elementwise.GELU: F.gelu,
    Elementwise.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Elementwise.ADD: torch.add,
    Elementwise.MULTIPLY: torch.mul,
}
BINARY = (Elementwise.ADD, Elementwise.MULTIPLY)

every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_operation = pytest.mark.parametrize("operation", MEANING, ids=lambda each: each.name)


def _close(out: torch.Tensor, want: torch.Tensor) -> None:
    limit = TOLERANCE[out.dtype]
    tiny = torch.finfo(out.dtype).smallest_normal * limit
    torch.testing.assert_close(out.double(), want.double(), rtol=limit, atol=max(tiny, 1e-7))


def _table(rows: int, rotary_dim: int, dtype: torch.dtype) -> torch.Tensor:
    angles = torch.rand(rows, rotary_dim // 2) * 6
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(dtype)


def _turned(
    x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, halves: bool
) -> torch.Tensor:
    """Rotate ``[m, heads, head_dim]`` in float64."""
    out, width = x.double(), table.shape[1]
    cosines, sines = table.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    half = width // 2
    first, second = (
        (slice(0, half), slice(half, width)) if halves else (slice(0, width, 2), slice(1, width, 2))
    )
    a, b = out[..., first].clone(), out[..., second].clone()
    out[..., first] = a * cosines - b * sines
    out[..., second] = b * cosines + a * sines
    return out


@every_isa
@every_dtype
@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(0, 5),
    heads=st.integers(1, 5),
    half=st.integers(1, 70),
    halves=st.booleans(),
    with_key=st.booleans(),
)
def test_rotary(
    isa: str, dtype: torch.dtype, m: int, heads: int, half: int, halves: bool, with_key: bool
) -> None:
    """Odd widths, and heads that are wider than what turns."""
    table = _table(30, 2 * half, dtype)
    positions = torch.randint(0, 30, (m,))
    query = torch.randn(m, heads, 2 * half + 3).to(dtype)
    key = torch.randn(m, 2, 2 * half).to(dtype) if with_key else None
    want = [_turned(each, positions, table, halves) for each in (query, key) if each is not None]
    native.rotary(loader.load(isa), positions, query, key, table, halves)
    for got, expected in zip((query, key), want, strict=False):
        assert got is not None
        _close_turned(got, expected)


def _close_turned(got: torch.Tensor, want: torch.Tensor, roundings: int = 1) -> None:
    """Two products may cancel: the error is relative to them."""
    limit = roundings * TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=limit, atol=4 * 2**-23)


@pytest.mark.parametrize("halves", [True, False])
@every_isa
@every_dtype
def test_rotary_is_vllms(isa: str, dtype: torch.dtype, halves: bool) -> None:
    positions, table = torch.randint(0, 50, (9,)), _table(50, 64, dtype)
    query, key = torch.randn(9, 3 * 80).to(dtype), torch.randn(9, 2 * 80).to(dtype)
    ours = [query.clone().view(9, 3, 80), key.clone().view(9, 2, 80)]
    torch.ops._C.rotary_embedding(positions, query, key, 80, table, halves)
    native.rotary(loader.load(isa), positions, *ours, table, halves)
    for got, want in zip(ours, (query, key), strict=True):
        _close_turned(got, want.view(got.shape).double(), roundings=2)


@pytest.mark.parametrize("halves", [True, False])
@every_isa
def test_rotary_in_a_fused_projection(isa: str, halves: bool) -> None:
    """Queries and keys are slices of one tensor; the values beside them stay, NaN or not."""
    positions, table = torch.tensor([3, 0, 7]), _table(8, 20, torch.bfloat16)
    fused = torch.randn(3, 5, 24).bfloat16()
    fused[:, 3:] = torch.nan
    fused[:, :, 20:] = torch.nan
    fused[1, :3, :20] = torch.nan  # a bad token
    before = fused.clone()
    want = _turned(fused, positions, table, halves)
    native.rotary(loader.load(isa), positions, fused[:, :2], fused[:, 2:3], table, halves)
    _close_turned(fused[[0, 2], :3, :20], want[[0, 2], :3, :20])
    assert fused[1].isnan().all()
    assert fused[:, 3:].isnan().all()
    assert torch.equal(fused[:, :, 20:].view(torch.int16), before[:, :, 20:].view(torch.int16))


@every_isa
def test_rotary_shared_by_threads(isa: str) -> None:
    positions, table = torch.randint(0, 90, (600,)), _table(90, 64, torch.float32)
    query, key = torch.randn(600, 3, 64), torch.randn(600, 1, 64)
    alone = query.clone(), key.clone()
    native.rotary(loader.load(isa), positions, *alone, table, True)
    with threads(2):
        native.rotary(loader.load(isa), positions, query, key, table, True)
    assert torch.equal(query, alone[0])
    assert torch.equal(key, alone[1])


@pytest.mark.parametrize("position", [-1, 8, 2**40])
@every_isa
def test_rotary_refuses_positions(isa: str, position: int) -> None:
    query, table = torch.randn(3, 2, 16), _table(8, 16, torch.float32)
    before, positions = query.clone(), torch.tensor([0, 1, position])
    says = rf"position {position} lies outside the table, which has rows 0 to 7; .*max_model_len"
    with pytest.raises(ValueError, match=says):
        native.rotary(loader.load(isa), positions, query, None, table, True)
    assert torch.equal(query, before)


def test_rotary_refuses_an_odd_width() -> None:
    query, table = torch.randn(1, 1, 16), torch.randn(8, 15)
    with pytest.raises(RuntimeError, match="rotary embedding of 15 elements"):
        native.rotary(loader.load(), torch.zeros(1).long(), query, None, table, True)


def _operands(operation: Elementwise, m: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    count = 2 if operation in BINARY else 1
    return [(4 * torch.randn(m, k)).to(dtype) for _ in range(count)]


def _evaluate(
    isa: str, operation: Elementwise, operands: list[torch.Tensor], out: torch.Tensor
) -> None:
    y = operands[1] if len(operands) > 1 else None
    native.elementwise(loader.load(isa), operation, operands[0], y, out)


@every_isa
@every_dtype
@every_operation
@settings(max_examples=12, deadline=None)
@given(m=st.integers(0, 4), k=st.integers(0, 150))
def test_elementwise(isa: str, dtype: torch.dtype, operation: Elementwise, m: int, k: int) -> None:
    operands = _operands(operation, m, k, dtype)
    out = torch.full((m, k), torch.nan, dtype=dtype)
    _evaluate(isa, operation, operands, out)
    _close(out, MEANING[operation](*(each.double() for each in operands)))
    # Both are rounded, and torch's functions cancel where they are small.
    limit = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(out, TORCH[operation](*operands), rtol=limit, atol=2e-6)


@every_isa
@pytest.mark.parametrize(
    "operation", [Elementwise.SILU, Elementwise.GELU, Elementwise.GELU_TANH], ids=str
)
def test_functions_are_accurate_everywhere(isa: str, operation: Elementwise) -> None:
    """Also where torch's own cancel: at -5 its GELU has one digit."""
    x = torch.cat((torch.linspace(-9, 40, 30001), torch.logspace(-30, -1, 500)))[None]
    out = torch.empty_like(x)
    _evaluate(isa, operation, [x], out)
    want = MEANING[operation](x.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-37)
    near = x > -3  # where the exponent, whose rounding counts, is small
    torch.testing.assert_close(out[near].double(), want[near], rtol=1e-6, atol=1e-37)


@every_isa
@pytest.mark.parametrize(
    "operation", [Elementwise.SILU, Elementwise.GELU_TANH, Elementwise.GELU], ids=str
)
def test_functions_at_the_ends(isa: str, operation: Elementwise) -> None:
    x = torch.tensor([[torch.inf, 3e38, 200.0, 0.0, -200.0, -3e38, -torch.inf, torch.nan]])
    out = torch.empty_like(x)
    _evaluate(isa, operation, [x], out)
    assert out[0, :3].equal(x[0, :3])
    assert out[0, 3:6].abs().max() < 1e-36
    assert out[0, 6:].isnan().all()  # minus infinity as in torch, whose product is infinity by 0


@every_isa
@every_dtype
@pytest.mark.parametrize("operation", [Elementwise.ADD, Elementwise.MULTIPLY], ids=str)
def test_sums_and_products_are_torchs(isa: str, dtype: torch.dtype, operation: Elementwise) -> None:
    operands = _operands(operation, 3, 101, dtype)
    out = torch.empty_like(operands[0])
    _evaluate(isa, operation, operands, out)
    assert torch.equal(out, TORCH[operation](*operands))


@every_isa
@every_operation
def test_elementwise_between_neighbours(isa: str, operation: Elementwise) -> None:
    """Rows lie apart, their neighbours are NaN and stay, and a bad row stays alone."""
    operands = [torch.full((3, 60), torch.nan).half() for _ in range(3)]
    for each in operands:
        each[:, 7:44] = torch.randn(3, 37).half()
    operands[0][1, 9] = torch.nan
    views = [each[:, 7:44] for each in operands]
    given, out = views[: 2 if operation in BINARY else 1], operands[2]
    want = TORCH[operation](*given)
    _evaluate(isa, operation, given, views[2])
    torch.testing.assert_close(views[2], want, rtol=1.2e-3, atol=2e-6, equal_nan=True)
    assert views[2].isnan().sum() == 1
    assert out[:, :7].isnan().all()
    assert out[:, 44:].isnan().all()


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [0, 1, 5, 300])
def test_rows_that_are_kept(isa: str, dtype: torch.dtype, m: int) -> None:
    keep = torch.arange(-2, m - 2)  # one of them is 0
    x = torch.randn(m, 90).to(dtype)[:, 3:80]
    x[keep == 0] = torch.nan
    out = torch.full((m, 77), torch.nan, dtype=dtype)
    native.elementwise(loader.load(isa), Elementwise.KEEP_ROWS, x, keep, out)
    assert torch.equal(out, torch.where(keep[:, None] == 0, 0, x))


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [0, 1, 5, 300])
def test_rows_are_scaled(isa: str, dtype: torch.dtype, m: int) -> None:
    """By a number, and by one element of a tensor; rounded once, as torch does."""
    lib, wide = loader.load(isa), torch.randn(m, 90).to(dtype)
    x, factor = wide[:, 3:80], torch.tensor(0.22, dtype=dtype)
    out = torch.full((m, 77), torch.nan, dtype=dtype)
    native.elementwise(lib, Elementwise.SCALE, x, factor, out)
    assert torch.equal(out, x * factor)
    native.elementwise(lib, Elementwise.SCALE, x, None, out, 0.22)
    assert torch.equal(out, x * 0.22)
    with threads(2):
        native.elementwise(lib, Elementwise.SCALE, x, None, x, 0.22)
    assert torch.equal(x, out)
    assert torch.equal(wide[:, :3].isnan(), torch.zeros(m, 3).bool())


@every_isa
@every_operation
@pytest.mark.parametrize("target", [0, 1])
def test_elementwise_in_place(isa: str, operation: Elementwise, target: int) -> None:
    operands = _operands(operation, 4, 83, torch.bfloat16)
    want = torch.empty_like(operands[0])
    _evaluate(isa, operation, operands, want)
    out = operands[min(target, len(operands) - 1)]
    _evaluate(isa, operation, operands, out)
    assert torch.equal(out, want)


@every_isa
@every_operation
@pytest.mark.parametrize("shape", [(1, 70001), (301, 150)], ids=str)
def test_elementwise_shared_by_threads(
    isa: str, operation: Elementwise, shape: tuple[int, int]
) -> None:
    operands = _operands(operation, *shape, torch.bfloat16)
    alone, shared = torch.zeros_like(operands[0]), torch.zeros_like(operands[0])
    _evaluate(isa, operation, operands, alone)
    with threads(2):
        _evaluate(isa, operation, operands, shared)
    assert torch.equal(shared, alone)


def test_elementwise_refuses_unknown_functions() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="function 8 of"):
        native.elementwise(loader.load(), 8, x, None, x)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="function 4 of"):
        native.elementwise(loader.load(), Elementwise.ADD, x, None, x)


@every_isa
@every_dtype
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("m", [0, 1, 5, 700])
def test_embedding(isa: str, dtype: torch.dtype, ids: torch.dtype, m: int) -> None:
    table = torch.randn(40, 70).to(dtype)[:, :67]
    chosen = torch.randint(0, 40, (m,), dtype=ids)
    out = torch.full((m, 67), torch.nan, dtype=dtype)
    with threads(2):
        native.embedding(loader.load(isa), chosen, table, out)
    assert torch.equal(out, table[chosen.long()])


@every_isa
@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_embedding_refuses_ids(isa: str, ids: torch.dtype, bad: int) -> None:
    table, out = torch.randn(40, 8), torch.zeros(3, 8)
    says = f"id {bad} lies outside the table, which has rows 0 to 39"
    with pytest.raises(ValueError, match=says):
        native.embedding(loader.load(isa), torch.tensor([1, bad, 2], dtype=ids), table, out)
    assert not out.any()


@every_isa
@every_dtype
@settings(max_examples=12, deadline=None)
@given(m=st.integers(0, 9), k=st.integers(1, 700))
def test_rms_norm(isa: str, dtype: torch.dtype, m: int, k: int) -> None:
    wide, weight = (3 * torch.randn(m, k + 5)).to(dtype), torch.rand(k).to(dtype)
    wide[:, k:] = torch.nan
    x, out = wide[:, :k], torch.full((m, k), torch.nan, dtype=dtype)
    before = wide.clone()
    native.add_rms_norm(loader.load(isa), x, None, weight, 1e-5, out)
    _close(out, F.rms_norm(x.double(), (k,), weight.double(), 1e-5))
    assert torch.equal(x, before[:, :k])


@every_isa
def test_rms_norm_in_place_and_a_bad_row(isa: str) -> None:
    x, weight = torch.randn(5, 96), torch.rand(96)
    x[2, 3] = torch.nan
    out = torch.empty_like(x)
    native.add_rms_norm(loader.load(isa), x, None, weight, 1e-5, out)
    native.add_rms_norm(loader.load(isa), x, None, weight, 1e-5, x)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4]].isfinite().all()
    assert torch.equal(x.nan_to_num(), out.nan_to_num())


class _Step(ctypes.Structure):
    _fields_ = (("function", ctypes.c_int64), ("args", ctypes.c_void_p))


def _run(isa: str, steps: list[tuple[int, bytes]]) -> tuple[int, int]:
    """Run steps; their status and where they stopped (-1: nowhere)."""
    kept = [ctypes.create_string_buffer(args, len(args)) for _, args in steps]
    array = (_Step * len(steps))(
        *(
            _Step(function, ctypes.addressof(args))
            for (function, _), args in zip(steps, kept, strict=True)
        )
    )
    stopped = ctypes.c_int64(-1)
    status = loader.load(isa).run_steps(array, ctypes.c_int64(len(steps)), ctypes.byref(stopped))
    return status, stopped.value


def _function(arguments: type[ctypes.Structure]) -> int:
    """Return the number of the function that takes these arguments."""
    return abi._STRUCTS.index(arguments)


def _embedding(ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> tuple[int, bytes]:
    fields = (4 * table.shape[1], len(table), len(ids), 4 * table.shape[1], 8, 1)
    addresses = (each.data_ptr() for each in (ids, table, out))
    return _function(abi.EmbeddingArgs), abi.pack_embedding_args(*addresses, *fields)


def _double(x: torch.Tensor) -> tuple[int, bytes]:
    """Add rows to themselves, in place."""
    fields = (*(x.stride(0),) * 3, *x.shape, Elementwise.ADD, 1.0, abi.Dtype.FLOAT32, 1)
    return _function(abi.ElementwiseArgs), abi.pack_elementwise_args(*(x.data_ptr(),) * 3, *fields)


@every_isa
def test_steps_run_in_order(isa: str) -> None:
    table, out, ids = torch.randn(9, 20), torch.zeros(2, 20), torch.tensor([7, 0])
    assert _run(isa, []) == (abi.Status.OK, -1)
    steps = [_embedding(ids, table, out), _double(out), _double(out)]
    assert _run(isa, steps) == (abi.Status.OK, -1)
    assert torch.equal(out, 4 * table[ids])
    ids[0] = 3  # the next run sees other ids, without a new recording
    assert _run(isa, steps) == (abi.Status.OK, -1)
    assert torch.equal(out, 4 * table[ids])


@every_isa
def test_steps_stop_at_the_first_that_fails(isa: str) -> None:
    table, out, ids = torch.randn(9, 20), torch.zeros(2, 20), torch.tensor([7, 9])
    good = torch.tensor([1, 2])
    steps = [_embedding(good, table, out), _embedding(ids, table, out), _double(out)]
    assert _run(isa, steps) == (abi.Status.BAD_SLOT, 1)
    assert torch.equal(out, table[good])  # neither overwritten nor doubled


@every_isa
@pytest.mark.parametrize("function", [-1, len(abi._STRUCTS), 2**40])
def test_steps_refuse_unknown_functions(isa: str, function: int) -> None:
    out = torch.ones(1, 4)
    steps = [_double(out), (function, b""), _double(out)]
    assert _run(isa, steps) == (abi.Status.UNSUPPORTED, 1)
    assert torch.equal(out, torch.full((1, 4), 2.0))
