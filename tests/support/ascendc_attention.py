"""Launches of ``paged_attention_c8`` over the batches of tests/support/attention_cases.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from ascendc_pages import ENTRIES, Layer, Planes
from attention_cases import Batch
from attention_tiling import Shape

from ascend_plugin.ops.ascendc import host

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(slots=True)
class Launch:
    """A batch as the kernel takes it."""

    batch: Batch
    planes: Planes
    max_query_len: int
    patch_code: int
    quantisation: int
    workspace: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, cores: int) -> Launch:
        """Bring a batch's pages into planes, and reserve a workspace full of garbage."""
        case = batch.case
        layer = Layer(
            case.variant, _DTYPES[case.dtype], case.kv_heads, case.head_dim, case.block_size
        )
        launch = cls(
            batch,
            layer.to_planes(batch.pages),
            max(1, *(count for count, _ in case.sequences)),
            layer.patch_code,
            int(layer.page.quantisation),
            torch.empty(0),
        )
        nbytes = launch.shape.workspace_bytes(cores)
        launch.workspace = torch.full((nbytes,), 0xA7, dtype=torch.uint8)
        return launch

    @property
    def shape(self) -> Shape:
        """What the tiling depends on."""
        case = self.batch.case
        shape = (case.heads, case.kv_heads, case.head_dim, case.block_size)
        return Shape(*shape, self.max_query_len, case.window, self.quantisation)

    def run(self, cores: int, schedule: host.Schedule) -> host.Report:
        """Launch the kernel, which writes ``batch.out``."""
        batch, case = self.batch, self.batch.case
        heads = case.heads * case.head_dim
        lengths = batch.seq_lens
        scalars = [
            lengths.shape[0],
            case.heads,
            case.kv_heads,
            case.head_dim,
            case.block_size,
            self.planes.codes.shape[0],
            batch.block_table.shape[1],
            batch.query.stride(0) if batch.query.shape[0] else heads,
            batch.out.stride(0) if batch.out.shape[0] else heads,
            self.max_query_len,
            batch.options["scale"],
            case.window,
            int(case.causal),
            self.patch_code,
        ]
        buffers = [
            _from(batch.query),
            self.planes.codes,
            self.planes.extras,
            batch.options["channel_scales"],
            batch.block_table,
            batch.query_start_loc,
            lengths,
            _from(batch.out),
            self.workspace,
        ]
        entry = f"paged_attention_{ENTRIES[case.variant]}_{_DTYPES[case.dtype]}"
        return _library().launch(entry, cores, [*buffers, *scalars], schedule=schedule)

    def scales(self) -> torch.Tensor:
        """Return c8d's scales, float32 ``[blocks, 2, kv_heads, block_size]``, a view."""
        assert self.planes.extras is not None
        return self.planes.extras.view(torch.float32)

    def tags(self) -> torch.Tensor:
        """Return c8p's tags, int16 ``[blocks, 2, kv_heads, slots]``, a view."""
        assert self.planes.extras is not None
        return self.planes.extras.view(torch.int16)[..., : self.shape.geometry().slots]

    def patch_scales(self) -> torch.Tensor:
        """Return c8p's scales, float32 ``[blocks, 2, kv_heads, slots]``, a view."""
        assert self.planes.extras is not None
        slots = self.shape.geometry().slots
        first = slots // 2  # tags come before
        return self.planes.extras.view(torch.float32)[..., first : first + slots]

    def last_blocks(self) -> list[tuple[int, int]]:
        """Return (block, written tokens) of each sequence that ends inside a block."""
        size = self.batch.case.block_size
        return [
            (int(self.batch.block_table[i, length // size]), length % size)
            for i, (count, length) in enumerate(self.batch.case.sequences)
            if count and length % size
        ]

    def tokens(self) -> int:
        """Return how many tokens of context the sequences have."""
        return sum(length for count, length in self.batch.case.sequences if count)


def page_bytes(launch: Launch) -> float:
    """Return the bytes of all pages of a launch, by the format's bytes per token and head."""
    page = launch.batch.case.page
    return launch.tokens() * page.page_bytes / page.block_size


@cache
def _library() -> host.KernelLibrary:
    return host.library("paged_attention_c8")


def _from(view: torch.Tensor) -> torch.Tensor:
    """Return the memory from a view's first element on: what a kernel is given."""
    left = view.untyped_storage().nbytes() // view.element_size() - view.storage_offset()
    return view.as_strided((left,), (1,))
