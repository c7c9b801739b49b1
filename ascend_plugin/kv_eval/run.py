"""An evaluation from files to rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ascend_plugin.kv_cache.scales import load_kv_scales
from ascend_plugin.kv_eval.evaluate import (
    Outcome,
    Progress,
    evaluate,
    implementations,
    make_statics,
)
from ascend_plugin.kv_eval.model import CausalModel
from ascend_plugin.kv_eval.pages import OUTLIER_FACTOR
from ascend_plugin.kv_eval.text import cut_windows, text_digest
from ascend_plugin.kv_eval.variants import BLOCK_SIZE, Variant


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What is to be evaluated; names as in the options of ``eval kv``."""

    model: Path
    texts: list[str]
    variants: tuple[Variant, ...]
    scales: Path | None
    threshold: float | None
    tokens: int
    context: int
    dtype: str


def run(request: EvalRequest, report: Progress) -> tuple[Outcome, dict[str, object]]:
    """Load everything, evaluate, and say how it was done.

    Returns:
        The rows, and the part of ``meta`` that describes the method.

    Raises:
        KVEvalError: something cannot be evaluated.
        KVScalesError: the scales cannot be used.
    """
    # Scales that cannot be used are refused before the model is loaded.
    scales, about = load_kv_scales(request.scales) if request.scales else ({}, {})
    report("loading the model", 0, 1)
    model = CausalModel(request.model, request.dtype)
    model.check_context(request.context)
    statics = {}
    if request.scales:
        statics = make_statics(model, scales, str(request.scales), request.threshold)
    windows = cut_windows(request.texts, model.tokenizer, request.context, request.tokens)
    outcome = evaluate(model, windows, request.variants, statics, report)
    threshold: float | str | None = request.threshold
    if threshold is None and statics:
        threshold = f"{OUTLIER_FACTOR:g} times the calibrated mean error"
    method: dict[str, object] = {
        "model": model.name,
        "model_digest": model.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": windows.context,
        "tokens": windows.tokens,
        "text_sha256": text_digest(request.texts),
        "windows_sha256": windows.digest,
        "block_size": BLOCK_SIZE,
        "threshold": threshold,
        "scales": about or None,
        "implementations": implementations(model, request.variants),
    }
    return outcome, method
