"""Steps that are recorded as native calls and repeated: what they compute, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ascend_plugin.graph.cpu import NotRecordable, Pool, record_step
from ascend_plugin.ops import native
from ascend_plugin.ops.add_rms_norm import add_rms_norm
from ascend_plugin.ops.native.steps import FUNCTIONS, StepError

TOKENS, HIDDEN, HEADS, DIM, VOCABULARY = 3, 64, 4, 32, 50
LAYERS = 6


class Decoder:
    """A step of a small decoder without attention, whose inputs stay at their addresses."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> torch.Tensor:
            drawn = torch.randn(shape, generator=draw) / shape[-1] ** 0.5
            return drawn.to(dtype)

        self.ids = torch.zeros(TOKENS, dtype=torch.int32)
        self.positions = torch.zeros(TOKENS, dtype=torch.int64)
        self.table = weight(VOCABULARY, HIDDEN)
        self.angles = weight(100, DIM)
        self.norm = 1 + weight(HIDDEN)
        self.layers = [
            (weight(2 * HEADS * DIM, HIDDEN), weight(HIDDEN, HEADS * DIM), weight(HIDDEN))
            for _ in range(LAYERS)
        ]

    def set_inputs(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.ids.random_(0, VOCABULARY, generator=draw)
        self.positions.random_(0, 100, generator=draw)

    def __call__(self) -> torch.Tensor:
        residual = F.embedding(self.ids.long(), self.table)  # [tokens, hidden]
        x = residual.clone()
        for both, down, bias in self.layers:
            gate, up = F.linear(x, both).split([HEADS * DIM, HEADS * DIM], dim=-1)
            torch.ops._C.rotary_embedding(self.positions, gate, up, DIM, self.angles, True)
            x = F.linear(F.silu(gate) * up, down, bias)
            x = add_rms_norm(x, residual, self.norm, 1e-5)
        return x + residual


@pytest.fixture(scope="module", autouse=True)
def _stock_operators() -> None:
    from vllm.platforms import current_platform

    from ascend_plugin.bench.stock_operators import load_stock_operators

    assert current_platform.is_cpu()  # decided before stock operators are loaded without plugins
    load_stock_operators("rotary_embedding")


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_computes_what_the_step_computes(dtype: torch.dtype) -> None:
    decoder = Decoder(dtype)
    decoder.set_inputs(0)
    step = record_step(decoder, Pool())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(step.output, decoder(), rtol=tolerance, atol=tolerance)
    seen = []
    for seed in (1, 2, 3):
        decoder.set_inputs(seed)
        got = step.repeat()
        torch.testing.assert_close(got, decoder(), rtol=tolerance, atol=tolerance)
        seen.append(got.clone())
    assert not torch.equal(seen[0], seen[1])


def test_a_repetition_gives_the_recorded_bits() -> None:
    decoder = Decoder(torch.bfloat16)
    decoder.set_inputs(5)
    step = record_step(decoder, Pool())
    first = step.output.clone()
    decoder.set_inputs(6)
    step.repeat()
    decoder.set_inputs(5)
    assert torch.equal(step.repeat(), first)


def test_steps_share_memory_and_read_only_what_they_wrote() -> None:
    pool = Pool()
    decoders = [Decoder(), Decoder()]
    steps = []
    for seed, decoder in enumerate(decoders):
        decoder.set_inputs(seed)
        steps.append(record_step(decoder, pool))
    width = 2 * HEADS * DIM
    # Per step its result; for both together what lives at once within a layer.
    assert pool.nbytes < 4 * TOKENS * 4 * (width + 6 * HIDDEN)
    for block in pool._blocks:
        block.fill_(255)  # NaN in every type
    for decoder, step in zip(decoders, steps, strict=True):
        torch.testing.assert_close(step.repeat(), decoder(), rtol=1e-5, atol=1e-5)


def test_weights_are_read_where_they_are() -> None:
    decoder = Decoder()
    step = record_step(decoder, Pool())
    decoder.layers[2][0].mul_(-0.5)
    torch.testing.assert_close(step.repeat(), decoder(), rtol=1e-5, atol=1e-5)


def test_what_draft_layers_do_with_their_inputs() -> None:
    positions, embeddings, hidden = torch.arange(4), torch.randn(4, 8), torch.randn(4, 6)

    def prepare() -> torch.Tensor:
        kept = torch.where(positions.unsqueeze(-1) == 0, 0, embeddings)
        return torch.cat([hidden, kept], dim=-1)

    step = record_step(prepare, Pool())
    for first in (0, 1, -2):
        torch.arange(first, first + 4, out=positions)
        assert torch.equal(step.repeat(), prepare())


def test_numbers_scale_rows() -> None:
    """As Gemma's embeddings and Granite's residuals; a tensor's number may change."""
    x, factor = torch.randn(4, 8).bfloat16(), torch.tensor(3.25, dtype=torch.bfloat16)

    def scaled() -> torch.Tensor:
        out = x * factor
        out *= 0.22
        return out + 2 * x

    step = record_step(scaled, Pool())
    for value in (3.25, -0.5):
        factor.fill_(value)
        x.normal_()
        assert torch.equal(step.repeat(), scaled())


def test_converted_ids_keep_their_memory() -> None:
    """What is freed while recording must not lend its address to other ids."""
    first, second = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([3, 0])
    table = torch.randn(8, 4)

    def look_up() -> torch.Tensor:
        return F.embedding(first.long(), table) + F.embedding(second, table)

    step = record_step(look_up, Pool())
    first += 1
    second.add_(2)
    assert torch.equal(step.repeat(), look_up())


X = torch.ones(4, 8)
IDS = torch.zeros(4, dtype=torch.int32)
POSITIONS = torch.arange(4)
HALF = X.half()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: X.sort(), "aten.sort"),
        (lambda: X.sum().item(), "aten.sum"),
        (lambda: X.to(torch.bfloat16), "conversion of torch.float32 to torch.bfloat16"),
        (lambda: X + X[0], "add of operands that are not alike"),
        (lambda: X * X[0], "multiply of operands that are not alike"),
        (lambda: torch.add(X, X, alpha=2), "add of operands that are not alike"),
        (lambda: IDS + IDS, "a tensor of torch.int32"),
        (lambda: IDS.long() + IDS.long(), "converted token ids"),
        (lambda: F.silu(X.t()), r"strides \(1, 8\)"),
        (lambda: X.t() + X.t(), r"strides \(1, 8\)"),
        (lambda: torch.zeros(3), "aten.zeros"),
        (lambda: torch.where(X[:, :1].long() == 0, 0, X), "conversion of torch.float32"),
        (lambda: torch.where(POSITIONS[:, None] == 1, 0, X), "not of positions with 0"),
        (lambda: torch.where(POSITIONS[:, None] == 0, 1, X), "does not clear rows"),
        (lambda: (POSITIONS == 0).logical_not(), "logical_not of converted token ids or of a mask"),
        (lambda: torch.cat([X, X]), "concatenation along dimension 0"),
        (lambda: F.embedding(IDS.long()[1:], X), "a part of converted token ids"),
        (lambda: F.embedding(POSITIONS[::2], X), "strided ids"),
        (lambda: torch.cat([IDS.long(), IDS.long()]), "converted token ids"),
        (lambda: F.linear(X, HALF), "of one type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_repeated_is_refused(function: Callable[[], Any], message: str) -> None:
    lib = native.load()
    before = [getattr(lib, name) for name in FUNCTIONS]
    with pytest.raises(NotRecordable, match=message):
        record_step(function, Pool())
    assert [getattr(lib, name) for name in FUNCTIONS] == before


def test_a_repetition_that_leaves_a_table_says_so() -> None:
    decoder = Decoder()
    decoder.set_inputs(0)
    step = record_step(decoder, Pool())
    decoder.ids[1] = VOCABULARY
    with pytest.raises(StepError, match=r"step 0 of \d+ \(embedding\).*token id lies outside"):
        step.repeat()
    decoder.ids[1] = 0
    decoder.positions[2] = 100
    with pytest.raises(StepError, match=r"\(rotary\)"):
        step.repeat()


def test_the_reference_cannot_be_recorded() -> None:
    from implementations import forced

    decoder = Decoder()
    with forced("reference"), pytest.raises(NotRecordable):
        record_step(decoder, Pool())


def test_the_pool_gives_back_what_nobody_holds() -> None:
    pool = Pool()
    one = pool.empty((4, 10), torch.float32)
    view = one[1:]
    other = pool.empty((4, 10), torch.float32)
    assert other.data_ptr() != one.data_ptr()
    address = one.data_ptr()
    del one
    assert pool.empty((2,), torch.int8).data_ptr() != address, "a view still holds it"
    del view
    assert pool.empty((4, 10), torch.float32).data_ptr() == address
    assert pool.empty((0, 3), torch.float32).shape == (0, 3)
