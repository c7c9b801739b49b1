"""Static scales from a text: the largest absolute value of each channel, then the errors.

Two passes over the same windows. The first finds scales; the second measures, with these scales,
the mean relative error of K's and V's rows, which tells later what an outlier is. Errors under
scales that still grow would be too small, so one pass is not enough.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from ascend_plugin.kv_cache.scales import LayerScales, save_kv_scales
from ascend_plugin.kv_eval.errors import KVEvalError
from ascend_plugin.kv_eval.geometry import Geometry
from ascend_plugin.kv_eval.model import CausalModel
from ascend_plugin.kv_eval.pages import PagedSequence
from ascend_plugin.kv_eval.routing import Hook, LayerCall
from ascend_plugin.kv_eval.state import StateFile
from ascend_plugin.kv_eval.text import Windows
from ascend_plugin.kv_eval.variants import Variant
from ascend_plugin.ops.quantise import MAX_CODE, quantise_static

#: Called with what is being done, how much of it is done, and the total.
Progress = Callable[[str, int, int], None]

#: A channel gets at least this share of its head's largest value: one that was silent in the
#: calibration text would otherwise saturate at its first whisper.
_SILENT_SHARE = 1e-4


@dataclass(frozen=True, slots=True)
class CalibratedRow:
    """What calibration found in one layer.

    Attributes:
        layer: its index.
        kv_heads: key/value heads.
        head_dim: channels per head.
        k_absmax: largest absolute value of K.
        v_absmax: the same of V.
        k_error: mean relative error of K's rows with static scales.
        v_error: the same of V.
    """

    layer: int
    kv_heads: int
    head_dim: int
    k_absmax: float
    v_absmax: float
    k_error: float
    v_error: float


class Statistics:
    """Everything that is added up: small, and saved after every window.

    Attributes:
        done: windows that both passes have seen, together.
        absmax: float32 ``[2, kv_heads, head_dim]`` by layer, K first.
        errors: float64 ``[2, 2]`` by layer: of K and of V, sum of errors and number of rows.
    """

    def __init__(self, layers: Mapping[int, Geometry]) -> None:
        """Start with nothing seen."""
        self.done = 0
        self.absmax = {i: torch.zeros(2, g.kv_heads, g.head_dim) for i, g in layers.items()}
        self.errors = {i: torch.zeros(2, 2, dtype=torch.float64) for i in layers}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all of it by name; ``restore`` takes it back."""
        kept = {f"{i}.absmax": absmax for i, absmax in self.absmax.items()}
        kept |= {f"{i}.errors": errors for i, errors in self.errors.items()}
        return kept | {"done": torch.tensor([self.done])}

    def restore(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Go on from what ``tensors`` returned."""
        self.done = int(kept["done"])
        # New tables: a copy has its own.
        self.absmax = {i: kept[f"{i}.absmax"] for i in self.absmax}
        self.errors = {i: kept[f"{i}.errors"] for i in self.errors}

    def copy(self) -> Statistics:
        """Return a copy that shares nothing."""
        other = copy.copy(self)
        other.restore({name: tensor.clone() for name, tensor in self.tensors().items()})
        return other

    def see_values(self, call: LayerCall) -> None:
        """Note the largest value of each channel.

        Raises:
            KVEvalError: there is a NaN or an infinity.
        """
        rows = torch.stack((call.key, call.value)).float()  # [2, tokens, kv_heads, head_dim]
        if not bool(rows.isfinite().all()):
            raise KVEvalError(
                f"layer {call.layer} computes keys or values that are not finite; no scale can "
                "hold them. Check the checkpoint, or use another --dtype."
            )
        self.absmax[call.layer] = torch.maximum(self.absmax[call.layer], rows.abs().amax(1))

    def see_errors(self, call: LayerCall, scales: torch.Tensor) -> None:
        """Add up relative errors of rows under ``scales`` ``[2, kv_heads, head_dim]``."""
        sums = self.errors[call.layer]
        for i, rows in enumerate((call.key, call.value)):
            x = rows.float()
            error = (quantise_static(x, scales[i]).residual * scales[i]).norm(dim=-1)
            norm = x.norm(dim=-1)
            share = (error / norm)[norm > 0]
            sums[i, 0] += share.double().sum()
            sums[i, 1] += share.numel()

    def scales(self, layer: int) -> torch.Tensor:
        """Return the scales that the largest values ask for, float32 as ``absmax``."""
        absmax = self.absmax[layer]
        loudest = absmax.amax(-1, keepdim=True)
        # A head that is silent altogether tells nothing: its scale is as good as any other.
        least = torch.where(loudest > 0, loudest * _SILENT_SHARE, 1.0)
        return torch.maximum(absmax, least) / MAX_CODE


def calibrate(
    model: CausalModel, windows: Windows, state: StateFile, report: Progress
) -> tuple[dict[int, LayerScales], list[CalibratedRow]]:
    """Find scales and mean errors of every layer.

    Args:
        model: what to calibrate.
        windows: what it reads.
        state: where to go on after an interruption.
        report: told of each window.

    Raises:
        KVEvalError: keys or values are not finite, or the state is of another calibration.
    """
    statistics = Statistics(model.layers)
    kept = state.load()
    if kept is not None:
        statistics.restore(kept)
    pages = PagedSequence(Variant("plain", dtype=model.dtype), windows.context)
    count = len(windows.ids)
    while statistics.done < 2 * count:
        second = statistics.done >= count
        report("mean errors" if second else "largest values", statistics.done, 2 * count)
        seen = statistics.copy()  # an interrupted window leaves no trace
        scales = {i: seen.scales(i) for i in model.layers} if second else None
        model.logits(windows.ids[seen.done % count, :-1], _hook(seen, scales, pages))
        seen.done += 1
        state.save(seen.tensors())
        statistics = seen
    report("done", 2 * count, 2 * count)
    return _results(model, statistics)


def _hook(
    statistics: Statistics, scales: Mapping[int, torch.Tensor] | None, pages: PagedSequence
) -> Hook:
    """Return attention over unquantised pages that looks at values, or at errors under scales."""

    def attend(call: LayerCall) -> torch.Tensor:
        if scales is None:
            statistics.see_values(call)
        else:
            statistics.see_errors(call, scales[call.layer])
        pages.write(call.key, call.value)
        return pages.attend(call.query, call)

    return attend


def calibrate_into(
    output: Path,
    model: CausalModel,
    windows: Windows,
    about: Mapping[str, str],
    state: StateFile,
    report: Progress,
) -> list[CalibratedRow]:
    """Calibrate and write the scales file; other arguments as in :func:`calibrate`.

    Args:
        output: the file.
        about: its metadata, from :func:`describe`.
    """
    layers, rows = calibrate(model, windows, state, report)
    save_kv_scales(output, layers, about)
    state.remove()
    return rows


def describe(model: CausalModel, windows: Windows, text_sha256: str) -> dict[str, str]:
    """Return what a scales file remembers of its making."""
    return {
        "model": model.name,
        "model_digest": model.digest,
        "tokens": str(windows.tokens),
        "context": str(windows.context),
        "text_sha256": text_sha256,
        "conversations": str(windows.conversations),
        "windows_sha256": windows.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "ascend_plugin": metadata.version("ascend-plugin"),
    }


def _results(
    model: CausalModel, statistics: Statistics
) -> tuple[dict[int, LayerScales], list[CalibratedRow]]:
    layers, rows = {}, []
    for i, geometry in model.layers.items():
        sums = statistics.errors[i]
        errors = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()
        absmax = statistics.absmax[i].flatten(1).amax(1).tolist()
        k_scale, v_scale = (scale.contiguous() for scale in statistics.scales(i))
        layers[i] = LayerScales(k_scale, v_scale, *errors)
        rows.append(CalibratedRow(i, geometry.kv_heads, geometry.head_dim, *absmax, *errors))
    return layers, rows
