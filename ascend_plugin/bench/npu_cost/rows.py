"""The result of ``bench npu-cost``. No import of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ascend_plugin.bench.npu_cost.chip import Bound, Chip, estimate
from ascend_plugin.bench.npu_cost.models import Geometry
from ascend_plugin.bench.npu_cost.trace import Work, Works


@dataclass(frozen=True, slots=True)
class CostRow:
    """One row of the result; docs in benchmarks/README.md."""

    model: str
    phase: str
    variant: str
    graphs: str
    batch: int
    context: int
    layers: int
    launches_per_layer: int | None
    drafts: int | None
    acceptance: float | None
    launches_per_accepted_token: float | None
    bytes_per_layer: int
    bytes_per_token: int
    bound: Bound
    estimated_us: float
    measured_us: float | None
    kernel_us: float | None
    kernel_bound: str | None
    pages_read_ratio: float | None
    note: str | None


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One launch of the AscendC kernel of attention; docs in benchmarks/README.md."""

    model: str
    phase: str
    variant: str
    batch: int
    query_tokens: int
    context: int
    cores: int | None
    cycles: int | None
    estimated_us: float | None
    bound: str | None
    busiest: str | None
    busiest_cycles: int | None
    memory_cycles: int | None
    bytes: int | None
    pages_bytes: int
    pages_read: int | None
    pages_read_ratio: float | None
    workspace_bytes: int | None
    roofline_us: float
    roofline_bound: Bound
    measured_us: float | None
    note: str | None


@dataclass(frozen=True, slots=True)
class Speculation:
    """Drafts of a step, and how often they are taken for granted to be right.

    Attributes:
        drafts: of a proposal.
        acceptance: how likely a draft is accepted if those before it were.
    """

    drafts: int
    acceptance: float

    @property
    def tokens(self) -> float:
        """Tokens of a sequence that a verification yields on average, the model's own included."""
        return sum(self.acceptance**place for place in range(self.drafts + 1))

    def launches(self, layers: int, per_layer: int, outside: int) -> int:
        """Return the launches of a verification and of the proposal after it, an estimate.

        A verification launches what a decode step does: its rows are more, not its operators. Each
        draft is taken for a decode step of one layer, with embedding, norm and head.

        Args:
            layers: of the model.
            per_layer: launches of a layer.
            outside: launches of a step outside of layers.
        """
        return layers * per_layer + outside + self.drafts * (per_layer + outside)


@dataclass(frozen=True, slots=True)
class Case:
    """What a row is about.

    Attributes:
        geometry: of the model.
        phase: of the engine.
        variant: of the KV cache.
        graphs: what runs in the end.
        batch: sequences.
        context: tokens of each.
        note: to the row.
    """

    geometry: Geometry
    phase: str
    variant: str
    graphs: str
    batch: int
    context: int
    note: str | None = None


def traced_row(case: Case, layer: Works, chip: Chip, kernel: KernelRow | None = None) -> CostRow:
    """Return the row of a layer whose launches are known.

    Args:
        case: what it is about.
        layer: its launches.
        chip: of the roofline.
        kernel: the kernel of attention at this batch and context, if the layer launches it.
    """
    launches = sum(work.launches for work in layer.values())
    row = _row(case, layer, chip, launches, None)
    if kernel is None:
        return row
    return replace(
        row,
        kernel_us=kernel.estimated_us,
        kernel_bound=kernel.bound,
        pages_read_ratio=kernel.pages_read_ratio,
    )


def with_speculation(row: CostRow, speculation: Speculation, outside: int) -> CostRow:
    """Add what an accepted token takes to a row whose launches are known.

    Args:
        row: of a decode step.
        speculation: that decode would have.
        outside: launches of a step outside of layers.
    """
    assert row.launches_per_layer is not None
    launches = speculation.launches(row.layers, row.launches_per_layer, outside)
    return replace(
        row,
        drafts=speculation.drafts,
        acceptance=speculation.acceptance,
        launches_per_accepted_token=round(launches / (row.batch * speculation.tokens), 2),
    )


def measured_row(case: Case, chip: Chip, layer_us: float) -> CostRow:
    """Return the row of a layer whose time is measured, and whose bytes the geometry tells."""
    return _row(case, geometry_work(case), chip, None, layer_us * case.geometry.layers)


def geometry_work(case: Case) -> Works:
    """Return the work of a layer's matrices and attention, as the shapes tell it.

    Activations are left out.
    """
    shape = case.geometry
    weights = shape.layer_weight_bytes()
    tokens, rows = case.batch * case.context, 2 * shape.kv_heads
    token = rows * shape.head_dim * (2 if case.variant == "bf16" else 1)
    token += rows * 4 if case.variant == "c8d" else 0  # a float32 scale for each row
    token += rows * (8 + shape.head_dim // 2) // 8 if case.variant == "c8p" else 0  # pools
    return {
        "matrices": Work(4, weights, case.batch * weights),  # two operations per 2-byte weight
        "attention": Work(1, tokens * token, shape.attention_flops(case.batch, case.context)),
    }


def _row(
    case: Case, layer: Works, chip: Chip, launches: int | None, measured_us: float | None
) -> CostRow:
    layers = case.geometry.layers
    moved = sum(work.bytes for work in layer.values())
    found = estimate(layer.values(), chip)
    return CostRow(
        model=case.geometry.name,
        phase=case.phase,
        variant=case.variant,
        graphs=case.graphs,
        batch=case.batch,
        context=case.context,
        layers=layers,
        launches_per_layer=launches,
        drafts=None,
        acceptance=None,
        launches_per_accepted_token=None,
        bytes_per_layer=round(moved),
        bytes_per_token=round(moved * layers / case.batch),
        bound=found.bound,
        estimated_us=round(found.us * layers, 1),
        measured_us=None if measured_us is None else round(measured_us, 1),
        kernel_us=None,
        kernel_bound=None,
        pages_read_ratio=None,
        note=case.note,
    )
