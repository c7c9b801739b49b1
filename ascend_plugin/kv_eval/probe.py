"""One layer's measurements: all variants on the same queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ascend_plugin.kv_eval.geometry import Geometry
from ascend_plugin.kv_eval.pages import OUTLIER_FACTOR, PagedSequence, Statics
from ascend_plugin.kv_eval.routing import LayerCall
from ascend_plugin.kv_eval.variants import EXACT, Variant
from ascend_plugin.ops.quantise import quantise_static


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What one variant does to one layer.

    Attributes:
        variant: its name.
        layer: index of the layer.
        attn_rel_l2: relative L2 error of the attention's output against bf16 pages.
        attn_rel_l2_outliers: the same when only c8s's outliers are quantised; None without scales.
        eps_k: mean relative error of K's rows (token and kv head).
        eps_v: the same of V.
        eps_k_outliers: the same over K's rows that c8s calls outliers; None if there are none.
        eps_v_outliers: the same of V.
        outlier_share_k: share of K's rows that are outliers in this variant: whose error exceeds
            c8p's threshold (static variants with a known one), else 3 times the variant's mean.
        outlier_share_v: the same of V.
        position0_outlier_share_k: share of outliers among K's rows at position 0.
        position0_outlier_share_v: the same of V.
        patched_share: share of rows with a patch.
        overflow_share: share of rows that wanted a patch and found no slot.
        saturated_share: share of rows with an element beyond the calibrated range.
        bytes_per_token: bytes of pages per token.
    """

    variant: str
    layer: int
    attn_rel_l2: float
    attn_rel_l2_outliers: float | None
    eps_k: float
    eps_v: float
    eps_k_outliers: float | None
    eps_v_outliers: float | None
    outlier_share_k: float
    outlier_share_v: float
    position0_outlier_share_k: float
    position0_outlier_share_v: float
    patched_share: float
    overflow_share: float
    saturated_share: float
    bytes_per_token: float


@dataclass(slots=True)
class _Tally:
    """Sums of one variant; ``errors`` has K's and V's rows, one ``[tokens, heads]`` per call."""

    squares: float = 0.0
    outlier_squares: float = 0.0
    counters: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))
    errors: tuple[list[torch.Tensor], list[torch.Tensor]] = field(default_factory=lambda: ([], []))


class Workspace:
    """Pages for the measurements, shared by all layers.

    Attributes:
        variants: those that are measured.
        sequences: their pages by name.
        exact: pages that hold keys and values exactly.
    """

    def __init__(self, variants: Sequence[Variant], capacity: int) -> None:
        """Make room for sequences of ``capacity`` tokens.

        Args:
            variants: those to measure, the baseline first.
            capacity: longest sequence.
        """
        self.variants = tuple(variants)
        self.sequences = {v.name: PagedSequence(v, capacity) for v in variants}
        self.exact = PagedSequence(EXACT, capacity)


class LayerProbe:
    """Measures one layer, one sequence after the other.

    Queries are widened to float32, so that the rounding of a bfloat16 output does not hide the
    errors of small changes.
    """

    def __init__(
        self, layer: int, geometry: Geometry, workspace: Workspace, statics: Statics | None
    ) -> None:
        """Start with nothing measured."""
        self._layer = layer
        self._geometry = geometry
        self._workspace = workspace
        self._statics = statics
        self._tallies = {v.name: _Tally() for v in workspace.variants}
        self._outliers: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._reference_squares = 0.0
        self._exact_squares = 0.0

    def measure(self, call: LayerCall) -> None:
        """Write and attend in every variant, and add up what differs."""
        query = call.query.float()
        originals = (call.key.float(), call.value.float())
        outliers = self._find_outliers(originals)
        exact = self._attend_exactly(call, query, originals)
        reference: torch.Tensor | None = None
        for variant in self._workspace.variants:  # the baseline is the first
            sequence, tally = self._workspace.sequences[variant.name], self._tallies[variant.name]
            tally.counters += sequence.write(call.key, call.value, self._statics)
            out = sequence.attend(query, call)
            reference = out if reference is None else reference
            tally.squares += _squares(out - reference)
            held = sequence.read()
            for rows, original, kept in zip(tally.errors, originals, held, strict=True):
                rows.append(_relative_errors(original, kept))
            if outliers is not None:
                mixed = [
                    torch.where(mask[..., None], kept, original)
                    for mask, original, kept in zip(outliers, originals, held, strict=True)
                ]
                out = self._attend_exactly(call, query, mixed)
                tally.outlier_squares += _squares(out - exact)
        assert reference is not None
        self._reference_squares += _squares(reference)
        self._exact_squares += _squares(exact)

    def rows(self) -> list[LayerRow]:
        """Return one row per variant."""
        return [self._row(name, tally) for name, tally in self._tallies.items()]

    def _find_outliers(
        self, originals: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return which rows c8s calls outliers, bool ``[tokens, kv_heads]`` of K and of V."""
        if self._statics is None or self._statics.thresholds is None:
            return None
        found = []
        for rows, scales, threshold, kept in zip(
            originals,
            self._statics.channel_scales,
            self._statics.thresholds,
            self._outliers,
            strict=True,
        ):
            residual = quantise_static(rows, scales).residual * scales
            mask = _relative_errors(rows, rows - residual) > threshold
            found.append(mask)
            kept.append(mask)
        return found[0], found[1]

    def _attend_exactly(
        self, call: LayerCall, query: torch.Tensor, values: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Attend to K and V as they are, float32."""
        sequence = self._workspace.exact
        sequence.write(values[0], values[1])
        return sequence.attend(query, call)

    def _row(self, name: str, tally: _Tally) -> LayerRow:
        variant = self._workspace.sequences[name].variant
        page = variant.page_format(self._geometry.kv_heads, self._geometry.head_dim)
        written, saturated, patched, overflown = tally.counters.tolist()
        written = max(written, 1)
        errors = [torch.cat(rows) for rows in tally.errors]  # of K and V, [tokens, kv_heads]
        firsts = [torch.stack([call[0] for call in rows]) for rows in tally.errors]
        limits = self._limits(variant, errors)
        beyond = [_mean_where(e, masks) for e, masks in zip(errors, self._outliers, strict=True)]
        outlier_error = _ratio(tally.outlier_squares, self._exact_squares)
        return LayerRow(
            variant=name,
            layer=self._layer,
            attn_rel_l2=_ratio(tally.squares, self._reference_squares),
            attn_rel_l2_outliers=outlier_error if self._outliers[0] else None,
            eps_k=float(errors[0].mean()),
            eps_v=float(errors[1].mean()),
            eps_k_outliers=beyond[0],
            eps_v_outliers=beyond[1],
            outlier_share_k=_share_above(errors[0], limits[0]),
            outlier_share_v=_share_above(errors[1], limits[1]),
            position0_outlier_share_k=_share_above(firsts[0], limits[0]),
            position0_outlier_share_v=_share_above(firsts[1], limits[1]),
            patched_share=patched / written,
            overflow_share=overflown / written,
            saturated_share=saturated / written,
            bytes_per_token=page.page_bytes / page.block_size,
        )

    def _limits(self, variant: Variant, errors: Sequence[torch.Tensor]) -> tuple[float, float]:
        """Return above which errors rows of K and of V are outliers in a variant."""
        if variant.quantisation.static and self._statics and self._statics.thresholds:
            return self._statics.thresholds
        return OUTLIER_FACTOR * float(errors[0].mean()), OUTLIER_FACTOR * float(errors[1].mean())


def probes_by_layer(
    layers: Mapping[int, Geometry], workspace: Workspace, statics: Mapping[int, Statics]
) -> dict[int, LayerProbe]:
    """Return a probe for each layer."""
    return {i: LayerProbe(i, shape, workspace, statics.get(i)) for i, shape in layers.items()}


def _share_above(errors: torch.Tensor, limit: float) -> float:
    return float((errors > limit).double().mean())


def _relative_errors(original: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return ``|x - x'| / |x|`` of each row; 0 where x is 0 and so is x'."""
    error = (original - kept).norm(dim=-1)
    return torch.where(error == 0, 0.0, error / original.norm(dim=-1))


def _squares(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


def _ratio(squares: float, reference: float) -> float:
    return (squares / reference) ** 0.5 if reference else 0.0


def _mean_where(errors: torch.Tensor, masks: list[torch.Tensor]) -> float | None:
    mask = torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)
    return float(errors[mask].mean()) if bool(mask.any()) else None
