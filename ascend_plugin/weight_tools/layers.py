"""What each layer of a checkpoint adds to the error, given the float model's inputs.

A layer's output is the residual stream. Rounding does not turn it, but SpinQuant's R1 does, in
embeddings and in every layer: the rotation is found by comparing the embeddings, and undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ascend_plugin.weight_tools.errors import WeightToolError

#: How far a rotation that was found from rounded embeddings may be from an orthogonal one.
_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class LayerRow:
    """The error of one layer of one checkpoint.

    Attributes:
        model: name of the checkpoint's folder.
        layer: its index.
        error: relative L2 error of what the layer adds to the residual stream, for the float
            model's own inputs; over all positions that were read.
    """

    model: str
    layer: int
    error: float


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """Return the decoder layers of a model of transformers.

    Raises:
        WeightToolError: it has none where they are looked for.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise WeightToolError(
            f"{type(model).__name__} has no list of decoder layers, so no error per layer can be "
            "measured. Use a model such as Llama, Qwen, Mistral or Gemma."
        )
    return layers


class LayerErrors:
    """Runs a checkpoint's layers beside the float model's, on the same inputs."""

    def __init__(self, base: Any, model: Any) -> None:
        """Compare two models of one shape."""
        self._base, self._other = decoder_layers(base), decoder_layers(model)
        count = len(self._base)
        if len(self._other) != count:
            raise WeightToolError(
                f"the checkpoint has {len(self._other)} layers, the float model {count}: it was "
                "made from another model."
            )
        self._sums = torch.zeros(count, 2, dtype=torch.float64)
        self._turn = find_rotation(
            base.get_input_embeddings().weight, model.get_input_embeddings().weight
        )

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure in every pass of the float model inside."""
        hooks = [
            layer.register_forward_hook(self._hook(i), with_kwargs=True)
            for i, layer in enumerate(self._base)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def rows(self, name: str) -> list[LayerRow]:
        """Return the errors of all layers."""
        shares = (self._sums[:, 0] / self._sums[:, 1].clamp_min(1e-30)).sqrt().tolist()
        return [LayerRow(name, i, share) for i, share in enumerate(shares)]

    def _hook(self, index: int) -> Any:
        def measure(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            hidden, *others = args
            wanted = _first(output) - hidden
            turned = hidden if self._turn is None else hidden @ self._turn
            found = _first(self._other[index](turned, *others, **kwargs)) - turned
            if self._turn is not None:
                found = found @ self._turn.T
            self._sums[index, 0] += (found - wanted).double().square().sum()
            self._sums[index, 1] += wanted.double().square().sum()

        return measure


def _first(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


def find_rotation(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """Return the rotation of the residual stream ``[hidden, hidden]``; None: it is not rotated.

    Args:
        base: embeddings ``[vocabulary, hidden]`` of the float model.
        other: the same of the checkpoint.

    Raises:
        WeightToolError: they differ by more than a rotation.
    """
    first, second = base.detach().double(), other.detach().double()
    if first.shape != second.shape:
        raise WeightToolError(
            f"the checkpoint's embeddings are {list(second.shape)}, the float model's "
            f"{list(first.shape)}: it was made from another model."
        )
    if torch.allclose(first, second, rtol=0.02, atol=1e-3):
        return None
    turn: torch.Tensor = torch.linalg.lstsq(first, second).solution
    unit = torch.eye(turn.shape[0], dtype=turn.dtype)
    left = (first @ turn - second).norm() / second.norm()
    if (turn @ turn.T - unit).abs().max() > _TOLERANCE or left > _TOLERANCE:
        raise WeightToolError(
            "the checkpoint's embeddings are not the float model's, nor a rotation of them: it "
            "was made from another model."
        )
    return turn.to(base.dtype)
