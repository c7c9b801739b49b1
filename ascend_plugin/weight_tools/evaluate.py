"""Quantised checkpoints against the float model that they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ascend_plugin.kv_eval.evaluate import Predictions
from ascend_plugin.kv_eval.text import Windows, cut_windows, text_digest
from ascend_plugin.quantization.formats import describe
from ascend_plugin.quantization.report import totals
from ascend_plugin.quantization.tensors import read_index
from ascend_plugin.weight_tools.environments import Progress
from ascend_plugin.weight_tools.errors import WeightToolError
from ascend_plugin.weight_tools.layers import LayerErrors, LayerRow
from ascend_plugin.weight_tools.meaning import load_meaning

#: Windows in which the errors of layers are measured: each costs a pass more.
LAYER_WINDOWS = 2


@dataclass(frozen=True, slots=True)
class WeightRow:
    """What one checkpoint does to a model.

    Attributes:
        model: name of its folder.
        scheme: of most of its weights.
        ppl: perplexity.
        ppl_delta: relative change against the float model.
        kl_mean: mean KL divergence of the next token's distribution, float against quantised.
        kl_p99: its 99th percentile over positions.
        top1_agreement: share of positions whose likeliest token is the float model's.
        layer_error: mean over layers of the error of a layer's output; see :class:`LayerRow`.
        bytes: of all tensors.
        bits_per_weight: of the quantised matrices, scales and zero points included.
        tokens: positions that were compared.
    """

    model: str
    scheme: str
    ppl: float
    ppl_delta: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    layer_error: float
    bytes: int
    bits_per_weight: float
    tokens: int


@dataclass(frozen=True, slots=True)
class WeightOutcome:
    """Result of an evaluation: a row per model, and one per checkpoint and layer."""

    rows: list[WeightRow]
    layers: list[LayerRow]
    method: dict[str, object]


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """What is to be evaluated; names as in the options of ``eval weights``."""

    base: Path
    checkpoints: Sequence[Path]
    texts: Sequence[str]
    tokens: int
    context: int
    dtype: str


def evaluate_weights(request: WeightRequest, report: Progress) -> WeightOutcome:
    """Run every window through the float model and through each checkpoint.

    All models are in memory at once, so that the float model reads the text once.

    Raises:
        WeightToolError: a folder holds something else.
        CheckpointError: a checkpoint is not what it says.
        KVEvalError: the texts are too short.
    """
    report("loading the float model", 0, 1)
    base, tokenizer = _load_base(request)
    windows = cut_windows(request.texts, tokenizer, request.context, request.tokens)
    subjects = []
    for i, path in enumerate(request.checkpoints):
        report(f"loading {path.name}", i, len(request.checkpoints))
        subjects.append(_Subject(path, base))
    reference = _compare(base, subjects, windows, report)
    rows = [_base_row(request.base, reference, windows)]
    rows += [subject.row(rows[0].ppl, windows) for subject in subjects]
    method = {
        "model": request.base.resolve().name,
        "dtype": str(base.dtype).removeprefix("torch."),
        "context": windows.context,
        "tokens": windows.tokens,
        "layer_tokens": min(LAYER_WINDOWS, len(windows.ids)) * windows.context,
        "text_sha256": text_digest(request.texts),
        "windows_sha256": windows.digest,
    }
    layers = [row for subject in subjects for row in subject.layer_rows()]
    return WeightOutcome(rows, layers, method)


class _Subject:
    """One checkpoint and what was found of it.

    Attributes:
        name: of its folder.
        model: what it means.
        errors: of its layers.
        predictions: against the float model's.
    """

    def __init__(self, path: Path, base: Any) -> None:
        """Load it."""
        self.name = path.resolve().name
        self.model, self._checkpoint = load_meaning(path, base.dtype)
        self.errors = LayerErrors(base, self.model)
        self.predictions = Predictions()

    def layer_rows(self) -> list[LayerRow]:
        """Return the errors of its layers."""
        return self.errors.rows(self.name)

    def row(self, base_ppl: float, windows: Windows) -> WeightRow:
        """Return what it does to the model."""
        sizes = totals(self._checkpoint)
        quantised = [size for size in sizes if size.scheme not in ("FLOAT", "others")]
        weights = sum(size.weights for size in quantised)
        numbers = self.predictions.numbers()
        return WeightRow(
            model=self.name,
            scheme=max(quantised, key=lambda size: size.weights).scheme if quantised else "FLOAT",
            **numbers,
            ppl_delta=numbers["ppl"] / base_ppl - 1.0,
            layer_error=fmean(row.error for row in self.layer_rows()),
            bytes=sum(size.bytes for size in sizes),
            bits_per_weight=8 * sum(size.bytes for size in quantised) / max(weights, 1),
            tokens=windows.tokens,
        )


def _compare(
    base: Any, subjects: Sequence[_Subject], windows: Windows, report: Progress
) -> Predictions:
    """Read all windows; return the float model's predictions, against themselves."""
    reference = Predictions()
    count = len(windows.ids)
    with torch.no_grad():
        for i, window in enumerate(windows.ids):
            report(f"window {i + 1}", i, count)
            ids, targets = window[None, :-1], window[1:]
            with ExitStack() as stack:
                for subject in subjects if i < LAYER_WINDOWS else ():
                    stack.enter_context(subject.errors.measuring())
                expected = base(input_ids=ids, use_cache=False).logits[0].float()
            reference.compare(expected, expected, targets)
            for subject in subjects:
                found = subject.model(input_ids=ids, use_cache=False).logits[0].float()
                subject.predictions.compare(found, expected, targets)
    report("done", count, count)
    return reference


def _load_base(request: WeightRequest) -> tuple[Any, Any]:
    """Return the float model and its tokenizer."""
    from ascend_plugin.kv_eval.model import check_context, load_causal_model

    if not request.checkpoints:
        raise WeightToolError(
            "one folder is not enough: name the float model, then checkpoints made from it."
        )
    for path in (request.base, *request.checkpoints):
        if not (path / "config.json").is_file():
            raise WeightToolError(
                f"{path} is not a model: it has no config.json. Give the folder of a checkpoint."
            )
    if describe(request.base) is not None:
        raise WeightToolError(
            f"{request.base} is quantised; name the float model first, it is what the others are "
            "compared with."
        )
    model, tokenizer = load_causal_model(request.base, request.dtype)
    check_context(model, request.base.resolve().name, request.context)
    return model, tokenizer


def _base_row(path: Path, reference: Predictions, windows: Windows) -> WeightRow:
    index = read_index(path)
    return WeightRow(
        model=path.resolve().name,
        scheme="FLOAT",
        **reference.numbers(),
        ppl_delta=0.0,
        layer_error=0.0,
        bytes=sum(info.nbytes for info in index.values()),
        bits_per_weight=16.0,
        tokens=windows.tokens,
    )
