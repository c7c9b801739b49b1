"""A model with each variant of the KV cache against the same model with bfloat16 pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from ascend_plugin.kv_cache.scales import LayerScales, check_layers
from ascend_plugin.kv_eval.model import CausalModel
from ascend_plugin.kv_eval.pages import PagedSequence, Statics
from ascend_plugin.kv_eval.probe import LayerProbe, LayerRow, Workspace, probes_by_layer
from ascend_plugin.kv_eval.routing import LayerCall
from ascend_plugin.kv_eval.text import Windows
from ascend_plugin.kv_eval.variants import BASELINE, BLOCK_SIZE, Variant
from ascend_plugin.ops import paged_attention
from ascend_plugin.ops.page_layout import Quantisation

#: Rows of logits that are compared at once: bounds the memory that vocabularies take.
_SLICE = 256

#: Called with what is being done, how much of it is done, and the total.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class EvalRow:
    """What one variant does to a model; shares and errors of layers are means over layers.

    Attributes:
        variant: its name.
        ppl: perplexity.
        ppl_delta: relative change of perplexity against bf16.
        kl_mean: mean KL divergence of the next token's distribution, bf16 against the variant.
        kl_p99: its 99th percentile over positions.
        top1_agreement: share of positions whose likeliest token is bf16's.
        attn_rel_l2: see :class:`LayerRow`, like all that follows.
        attn_rel_l2_outliers: as there.
        eps_k: as there.
        eps_v: as there.
        eps_k_outliers: as there.
        eps_v_outliers: as there.
        outlier_share_k: as there.
        outlier_share_v: as there.
        patched_share: as there.
        overflow_share: as there.
        saturated_share: as there.
        bytes_per_token: bytes of all layers' pages per token.
        tokens: positions that were compared.
    """

    variant: str
    ppl: float
    ppl_delta: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    attn_rel_l2: float
    attn_rel_l2_outliers: float | None
    eps_k: float
    eps_v: float
    eps_k_outliers: float | None
    eps_v_outliers: float | None
    outlier_share_k: float
    outlier_share_v: float
    patched_share: float
    overflow_share: float
    saturated_share: float
    bytes_per_token: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of an evaluation: a row per variant, and one per variant and layer."""

    rows: list[EvalRow]
    layers: list[LayerRow]


class Predictions:
    """How one variant predicts, against the baseline's predictions of the same text."""

    def __init__(self) -> None:
        """Start with nothing compared."""
        self._loss = 0.0
        self._divergences: list[torch.Tensor] = []
        self._agreeing = 0

    def compare(self, logits: torch.Tensor, baseline: torch.Tensor, targets: torch.Tensor) -> None:
        """Add one sequence.

        Args:
            logits: float32 ``[tokens, vocabulary]`` of the variant.
            baseline: the same of the baseline.
            targets: int64 ``[tokens]``, the tokens that really come next.
        """
        for start in range(0, len(targets), _SLICE):
            rows = slice(start, start + _SLICE)
            ours = logits[rows].log_softmax(-1)
            theirs = baseline[rows].log_softmax(-1)
            self._loss -= float(ours.gather(1, targets[rows, None]).double().sum())
            self._divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
            self._agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    def numbers(self) -> dict[str, float]:
        """Return the fields of a row that come from predictions; ``ppl_delta`` comes later."""
        divergences = torch.cat(self._divergences).double()
        count = divergences.numel()
        return {
            "ppl": math.exp(self._loss / count),
            "kl_mean": float(divergences.mean()),
            "kl_p99": float(divergences.quantile(0.99)),
            "top1_agreement": self._agreeing / count,
        }


def make_statics(
    model: CausalModel,
    scales: Mapping[int, LayerScales],
    source: str,
    threshold: float | None,
) -> dict[int, Statics]:
    """Return what static variants need of every layer.

    Raises:
        KVScalesError: the scales do not belong to this model.
    """
    for kv_heads, head_dim in {(s.kv_heads, s.head_dim) for s in model.layers.values()}:
        alike = [
            i for i, s in model.layers.items() if (s.kv_heads, s.head_dim) == (kv_heads, head_dim)
        ]
        check_layers(scales, alike, kv_heads, head_dim, source)
    return {layer: Statics.of(scales[layer], threshold) for layer in model.layers}


def evaluate(
    model: CausalModel,
    windows: Windows,
    variants: Sequence[Variant],
    statics: Mapping[int, Statics],
    report: Progress,
) -> Outcome:
    """Run every window once per variant.

    The baseline's run also measures each layer: all variants there see the same queries, keys and
    values. In a variant's own run its errors pass on from layer to layer, into the predictions.

    Args:
        model: what to evaluate.
        windows: what it reads.
        variants: the baseline first.
        statics: of every layer; empty if no variant is static.
        report: told of each run.

    Raises:
        KVEvalError: c8p is wanted and its thresholds are unknown.
    """
    workspace = Workspace(variants, windows.context)
    probes = probes_by_layer(model.layers, workspace, statics)
    served = {v.name: PagedSequence(v, windows.context) for v in variants}
    predictions = {v.name: Predictions() for v in variants}
    total = len(windows.ids) * len(variants)
    for i, window in enumerate(windows.ids):
        baseline: torch.Tensor | None = None
        for j, variant in enumerate(variants):
            report(f"{variant.name}, window {i + 1}", i * len(variants) + j, total)
            hook = _hook(served[variant.name], statics, probes if variant is BASELINE else {})
            logits = model.logits(window[:-1], hook)
            baseline = logits if baseline is None else baseline
            predictions[variant.name].compare(logits, baseline, window[1:])
    report("done", total, total)
    layers = [row for probe in probes.values() for row in probe.rows()]
    numbers = {name: each.numbers() for name, each in predictions.items()}
    return Outcome(_rows(variants, numbers, layers, windows.tokens), layers)


def implementations(model: CausalModel, variants: Sequence[Variant]) -> dict[str, str]:
    """Return which implementation of attention each variant's predictions come from."""
    shape = next(iter(model.layers.values()))
    return {
        v.name: paged_attention.operator.choose(
            paged_attention.AttentionRequest(
                model.dtype,
                v.dtype,
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                BLOCK_SIZE,
                Quantisation(v.quantisation),
            )
        ).implementation.name
        for v in variants
    }


def _hook(
    sequence: PagedSequence, statics: Mapping[int, Statics], probes: Mapping[int, LayerProbe]
) -> Callable[[LayerCall], torch.Tensor]:
    """Return attention over a variant's pages, which measures where there are probes."""

    def attend(call: LayerCall) -> torch.Tensor:
        if call.layer in probes:
            probes[call.layer].measure(call)
        sequence.write(call.key, call.value, statics.get(call.layer))
        return sequence.attend(call.query, call)

    return attend


def _rows(
    variants: Sequence[Variant],
    numbers: Mapping[str, Mapping[str, float]],
    layers: Sequence[LayerRow],
    tokens: int,
) -> list[EvalRow]:
    reference = numbers[BASELINE.name]["ppl"]
    rows = []
    for name in (v.name for v in variants):
        own = [row for row in layers if row.variant == name]
        rows.append(
            EvalRow(
                variant=name,
                **numbers[name],
                ppl_delta=numbers[name]["ppl"] / reference - 1.0,
                **layer_means(own),
                bytes_per_token=sum(row.bytes_per_token for row in own),
                tokens=tokens,
            )
        )
    return rows


#: Fields that a row of a model takes from its layers as means.
_MEANS = (
    "attn_rel_l2",
    "attn_rel_l2_outliers",
    "eps_k",
    "eps_v",
    "eps_k_outliers",
    "eps_v_outliers",
    "outlier_share_k",
    "outlier_share_v",
    "patched_share",
    "overflow_share",
    "saturated_share",
)


def layer_means(rows: Sequence[LayerRow]) -> dict[str, Any]:
    """Return means over layers, without the layers that have no number; None where none has."""
    means: dict[str, float | None] = {}
    for name in _MEANS:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        means[name] = fmean(values) if values else None
    return means
