"""Instructions of the host model against torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ascend_plugin.ops.ascendc import build, host

KERNELS = Path(__file__).parent / "kernels"
MODES = {"none": 0, "rint": 1, "floor": 2, "ceil": 3, "round": 4, "trunc": 5, "odd": 6}


def launch(name: str, *arguments: host.Argument, kernel: str = "instructions") -> None:
    """Run an entry point on one core, eagerly and as late as possible."""
    for schedule in host.schedules(2):
        host.library(kernel, KERNELS).launch(name, 1, arguments, schedule=schedule)


def cast(name: str, x: torch.Tensor, out: torch.Tensor, mode: str, count: int = 0) -> torch.Tensor:
    launch(name, x, out, count or x.numel(), MODES[mode], x.nbytes, out.nbytes)
    return out


def halves() -> torch.Tensor:
    """Values with ties, signs, and magnitudes beyond and below what 16 bits hold."""
    steps = torch.arange(-40, 40, dtype=torch.float32) / 4
    wide = torch.tensor([1.0 + 2.0**-11, -1.0 - 2.0**-11, 1.0 + 3 * 2.0**-11, 40000.5, -70000.0])
    return torch.cat([steps, wide, torch.tensor([1e-6, -1e-6, 300.7, -300.7, 2.0**-24])])


@pytest.mark.parametrize(
    ("mode", "rounding"),
    [
        ("rint", torch.round),
        ("floor", torch.floor),
        ("ceil", torch.ceil),
        ("trunc", torch.trunc),
        ("round", lambda x: torch.sign(x) * torch.floor(x.abs() + 0.5)),
    ],
)
def test_rounding_to_integers(mode: str, rounding) -> None:
    x = halves()
    want = rounding(x.double())
    got = cast("cast_float_int32", x, torch.zeros(x.numel(), dtype=torch.int32), mode)
    assert torch.equal(got, want.int())
    got = cast("cast_float_int16", x, torch.zeros(x.numel(), dtype=torch.int16), mode)
    assert torch.equal(got, want.clamp(-32768, 32767).short())
    got = cast("cast_float_float", x, torch.zeros_like(x), mode)
    assert torch.equal(got, want.float())
    small = x.clamp(-300, 300).half()
    got = cast("cast_half_int8", small, torch.zeros(x.numel(), dtype=torch.int8), mode)
    assert torch.equal(got, rounding(small.double()).clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize(
    ("name", "dtype"), [("cast_float_half", torch.half), ("cast_float_bfloat16", torch.bfloat16)]
)
def test_rounding_to_16_bits(name: str, dtype: torch.dtype) -> None:
    x = halves().clamp(-60000, 60000)
    out = {mode: cast(name, x, torch.zeros(x.numel(), dtype=dtype), mode) for mode in
           ("rint", "floor", "ceil", "trunc")}  # fmt: skip
    assert torch.equal(out["rint"], x.to(dtype))
    assert bool((out["floor"].double() <= x.double()).all())
    assert bool((out["ceil"].double() >= x.double()).all())
    assert bool((out["trunc"].double().abs() <= x.double().abs()).all())
    # Neighbours: where floor and ceil differ, the nearest is one of the two.
    differ = out["floor"] != out["ceil"]
    assert bool(differ.any())
    assert bool(((out["rint"] == out["floor"]) | (out["rint"] == out["ceil"])).all())
    assert torch.equal(out["floor"][~differ].float(), x[~differ])


def test_nan_and_saturation() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e9, -3e9, 7.0, 8.0, 9.0])
    got = cast("cast_float_int32", x, torch.zeros(8, dtype=torch.int32), "rint")
    assert got.tolist() == [0, 2147483647, -2147483648, 2147483647, -2147483648, 7, 8, 9]
    wide = torch.tensor([70000, -70000, 5, -5], dtype=torch.int32)
    got = cast("cast_int32_int16", wide, torch.zeros(4, dtype=torch.int16), "none")
    assert got.tolist() == [32767, -32768, 5, -5]


def test_int8_and_int4() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    assert torch.equal(cast("cast_int8_half", codes, torch.zeros(256).half(), "none"), codes.half())
    values = torch.arange(-8, 8, dtype=torch.float16)
    packed = cast("cast_half_int4", values, torch.zeros(8, dtype=torch.uint8), "rint")
    nibbles = values.int() & 15
    assert torch.equal(packed, (nibbles[::2] | nibbles[1::2] << 4).to(torch.uint8))  # low first
    back = cast("cast_int4_half", packed, torch.zeros(16).half(), "none", count=16)
    assert torch.equal(back, values)


def test_bfloat16_widens_exactly() -> None:
    x = halves().bfloat16()
    assert torch.equal(cast("cast_bfloat16_float", x, torch.zeros(x.numel()), "none"), x.float())


def test_a_cast_writes_its_count_only() -> None:
    out = torch.full((64,), 7, dtype=torch.int8)
    cast("cast_half_int8", torch.ones(64).half(), out, "rint", count=37)
    assert out.tolist() == [1] * 37 + [7] * 27


@pytest.mark.parametrize("mask", [1, 17, 64])
def test_masks_and_broadcast(mask: int) -> None:
    a, b = torch.randn(5, 64), torch.randn(8)
    out = torch.full((5, 64), 9.0)
    launch("add_broadcast", a, b, out, mask, 5)
    want = torch.full((5, 64), 9.0)
    want[:, :mask] = (a + b.repeat(8))[:, :mask]
    assert torch.equal(out, want)


def test_mask_of_bits() -> None:
    x, out = torch.arange(256).half(), torch.zeros(256).half()
    low, high = 0x8000000000000005, 0x3
    launch("scale_bits", x, out, low, high)
    lanes = [0, 2, 63, 64, 65]
    want = torch.zeros(256).half()
    for lane in [*lanes, *(lane + 128 for lane in lanes)]:
        want[lane] = 3 * x[lane]
    assert torch.equal(out, want)


@pytest.mark.parametrize("mask", [64, 50])
def test_reductions_of_repeats(mask: int) -> None:
    x = torch.randint(-50, 50, (6, 64)).float()
    out = torch.full((256,), 99.0)
    launch("reduce_repeats", x, out, mask, 6)
    inside = x[:, :mask]
    assert torch.equal(out[:6], inside.amax(1))
    assert torch.equal(out[64:70], inside.sum(1))  # integers: exact in any order
    assert torch.equal(out[128:140:2], inside.amin(1))
    indices = out[129:140:2].contiguous().view(torch.int32)
    assert torch.equal(indices.long(), inside.argmin(1))
    blocks = torch.nn.functional.pad(x[0, :mask], (0, 64 - mask), value=-1e9).view(8, 8)
    used = (mask + 7) // 8
    assert torch.equal(out[192 : 192 + used], blocks.amax(1)[:used])


@pytest.mark.parametrize("count", [1, 64, 65, 1000])
def test_reductions_of_a_tensor(count: int) -> None:
    x = torch.randint(-50, 50, (count,)).float()
    out = torch.zeros(16)
    launch("reduce_all", x, out, count)
    assert out[0] == x.sum()
    assert out[8] == x.max()
    assert int(out[9:10].view(torch.int32)) == int((x == x.max()).nonzero()[0])


def test_compare_and_select() -> None:
    x, out = torch.randn(256), torch.zeros(256)
    launch("keep_large", x, out, 256, 0.25, -1.0)
    assert torch.equal(out, torch.where(x >= 0.25, x, torch.tensor(-1.0)))


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [(1, slice(0, None, 2)), (2, slice(1, None, 2)), (5, slice(2, None, 4)), (7, slice(None))],
)
def test_gather(pattern: int, chosen: slice) -> None:
    x = torch.randn(64)
    places = torch.randperm(64)
    out = torch.zeros(136)
    launch("gather", x, (places * 4).int(), out, 64, pattern)
    assert torch.equal(out[:64], x[places])
    kept = int(out[128])
    assert torch.equal(out[64 : 64 + kept], x[chosen])
    assert not out[64 + kept : 128].any()


def test_gather_by_bits() -> None:
    x = torch.randn(64)
    mask = torch.rand(64) < 0.5
    words = [sum(int(mask[32 * w + i]) << i for i in range(32)) for w in range(2)]
    bits = torch.tensor(words, dtype=torch.int64).to(torch.uint32)
    out = torch.zeros(64)
    launch("gather_bits", x, bits, out, 64)
    assert torch.equal(out[: int(mask.sum())], x[mask])
    assert not out[int(mask.sum()) :].any()


def test_fill() -> None:
    x, out = torch.randn(16), torch.zeros(256)
    launch("fill", x, out)
    assert torch.equal(out[:128].view(16, 8), x[:, None].expand(16, 8))
    numbers = out.view(torch.int32)
    assert numbers[128:144].tolist() == list(range(-4, 12))
    assert torch.allclose(out[160:176], x * 2 + 1)
    assert numbers[192:208].tolist() == [value >> 3 for value in range(-4, 12)]


def test_sort_is_descending_and_stable() -> None:
    scores = torch.randint(0, 20, (128,)).float()
    out, order = torch.zeros(256), torch.arange(128, dtype=torch.int32)
    launch("sort", scores, out, order)
    values, indices = scores.sort(descending=True, stable=True)
    assert torch.equal(out[:128], values)
    assert torch.equal(out[128:].view(torch.int32).long(), indices)


@pytest.mark.parametrize(
    ("name", "operands", "result"),
    [
        ("multiply_int8", torch.int8, torch.int32),
        ("multiply_half", torch.half, torch.float32),
        ("multiply_bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(("m", "n", "k"), [(16, 32, 32), (48, 96, 64)])
def test_transposed_loads_and_mmad(
    name: str, operands: torch.dtype, result: torch.dtype, m: int, n: int, k: int
) -> None:
    a = torch.randint(-9, 10, (m, k)).to(operands)
    b = torch.randint(-9, 10, (k, n)).to(operands)
    c = torch.zeros(m, n, dtype=result)
    launch(name, a, b, c, m, n, k, kernel="matmul_transposed")
    want = a.double() @ b.double()  # integers: exact in float32
    assert torch.equal(c, want.to(result))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("LocalTensor<bfloat16_t> t; Add(t, t, t, 16);", "Add: the chip supports half, float"),
        (
            "LocalTensor<float> x; LocalTensor<int8_t> y; Cast(y, x, RoundMode::CAST_RINT, 32);",
            "int8_t converts to and from half only",
        ),
        (
            "LocalTensor<int8_t> a; LocalTensor<float> c; Mmad(c, a, a, MmadParams());",
            "Mmad: int8_t x int8_t to int32_t",
        ),
        ("LocalTensor<int32_t> t; And(t, t, t, 8);", "And: the chip supports int16_t"),
        ("LocalTensor<int8_t> t; Duplicate(t, (int8_t)1, 32);", "Duplicate: the chip supports"),
    ],
)
def test_types_the_chip_lacks_do_not_compile(tmp_path: Path, body: str, message: str) -> None:
    text = '#include "kernel_operator.h"\nusing namespace AscendC;\n'
    text += f'extern "C" __global__ __aicore__ void broken(GM_ADDR x) {{ {body} }}\n'
    (tmp_path / "broken.cpp").write_text(text)
    with pytest.raises(build.KernelBuildError, match=message):
        build.library_path("broken", tmp_path)
