"""Static scales of an int8 KV cache: what an element of K and V is worth, per layer and channel.

They come from ``ascend-plugin calibrate kv`` or from a checkpoint. All is checked here, once,
so that operators need not look at values.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

FORMAT = "ascend-plugin-kv-scales"
VERSION = "1"

#: Smaller ones are subnormal: their inverse overflows.
SMALLEST_SCALE = 2.0**-126

_NAME = re.compile(r"layers\.(0|[1-9][0-9]*)\.([kv]_scale|[kv]_error)")
_REMEDY = "Make the file again with 'ascend-plugin calibrate kv'."


class KVScalesError(ValueError):
    """Scales cannot be used; the message names tensor, value, what is allowed and the remedy."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerScales:
    """Scales of one layer, of all heads of the model, before tensor parallel sharding.

    Attributes:
        k_scale: float32 ``[kv_heads, head_dim]``; an element of K is ``code * scale``.
        v_scale: the same of V.
        k_error: mean relative error of K's rows over the calibration text; None: unknown.
        v_error: the same of V.

    Raises:
        KVScalesError: a shape, dtype or value that no KV cache can use.
    """

    k_scale: torch.Tensor
    v_scale: torch.Tensor
    k_error: float | None = None
    v_error: float | None = None

    def __post_init__(self) -> None:
        """Refuse what operators cannot use."""
        check_scale("k_scale", self.k_scale)
        check_scale("v_scale", self.v_scale)
        if self.k_scale.shape != self.v_scale.shape:
            raise KVScalesError(
                f"k_scale is {list(self.k_scale.shape)} and v_scale {list(self.v_scale.shape)}; "
                f"both must be [kv_heads, head_dim]. {_REMEDY}"
            )
        for name, error in (("k_error", self.k_error), ("v_error", self.v_error)):
            if error is not None and not (math.isfinite(error) and error >= 0):
                raise KVScalesError(
                    f"{name} is {error}; allowed are finite numbers >= 0. {_REMEDY}"
                )

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the model."""
        return self.k_scale.shape[0]

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.k_scale.shape[1]

    def channel_scales(self, rank: int = 0, world: int = 1) -> torch.Tensor:
        """Return the scales of one tensor parallel rank, as the operators take them.

        Heads are dealt as vLLM deals them: in equal shares, and where there are fewer heads than
        ranks, each head goes to several ranks in a row.

        Args:
            rank: of this process among the ``world`` ranks.
            world: tensor parallel size.

        Returns:
            float32 ``[2, local_kv_heads, head_dim]``, K first, contiguous.

        Raises:
            KVScalesError: the heads cannot be dealt to so many ranks.
        """
        heads = self.kv_heads
        if not 0 <= rank < world:
            raise KVScalesError(f"rank {rank} is outside of a tensor parallel size of {world}.")
        if heads % world and world % heads:
            raise KVScalesError(
                f"the scales have {heads} kv heads, which cannot be dealt to {world} tensor "
                "parallel ranks; one number must divide the other. Change --tensor-parallel-size, "
                "or use scales of this model."
            )
        share = max(1, heads // world)
        first = rank * heads // world
        both = torch.stack((self.k_scale, self.v_scale))
        return both[:, first : first + share].contiguous()


def check_scale(name: str, scale: torch.Tensor) -> None:
    """Refuse a tensor that is no ``[kv_heads, head_dim]`` of usable scales.

    Raises:
        KVScalesError: rank, dtype or a value (NaN, infinite, zero, negative, too small) is wrong.
    """
    if scale.dim() != 2 or 0 in scale.shape:
        raise KVScalesError(
            f"{name} has shape {list(scale.shape)}; it must be [kv_heads, head_dim]. {_REMEDY}"
        )
    if scale.dtype != torch.float32:
        raise KVScalesError(f"{name} has dtype {scale.dtype}; it must be torch.float32. {_REMEDY}")
    good = torch.isfinite(scale) & (scale >= SMALLEST_SCALE)  # NaN compares false
    if not bool(good.all()):
        head, channel = (int(i) for i in (~good).nonzero()[0])
        raise KVScalesError(
            f"{name} is {float(scale[head, channel])} at kv head {head}, channel {channel} "
            f"({int((~good).sum())} of {good.numel()} such values); scales must be finite and at "
            f"least {SMALLEST_SCALE:.3g}. {_REMEDY}"
        )


def check_layers(
    layers: Mapping[int, LayerScales],
    needed: Collection[int],
    kv_heads: int,
    head_dim: int,
    source: str,
) -> None:
    """Refuse scales that do not belong to a model.

    Args:
        layers: scales by index of the layer.
        needed: layers that the model wants scales for.
        kv_heads: of the whole model.
        head_dim: of the model.
        source: where the scales come from, for the message.

    Raises:
        KVScalesError: a layer is missing, or has another number of heads or channels.
    """
    missing = sorted(set(needed) - set(layers))
    if missing:
        raise KVScalesError(
            f"{source} has no scales for layer{'s' * (len(missing) > 1)} {_spans(missing)}; it has "
            f"{_spans(sorted(layers)) or 'none'}. Calibrate this model with 'ascend-plugin "
            "calibrate kv', or leave these layers unquantised with kv_cache.layers."
        )
    for index in sorted(needed):
        found = (layers[index].kv_heads, layers[index].head_dim)
        if found != (kv_heads, head_dim):
            raise KVScalesError(
                f"{source}: layers.{index} has scales for {found[0]} kv heads of {found[1]} "
                f"channels, the model has {kv_heads} kv heads of {head_dim} (before tensor "
                "parallel sharding). Use scales that were made from this model."
            )


def save_kv_scales(
    path: str | os.PathLike[str], layers: Mapping[int, LayerScales], metadata: Mapping[str, str]
) -> None:
    """Write scales into a file, which appears complete or not at all.

    Args:
        path: safetensors file; replaced if it exists.
        layers: scales by index of the layer.
        metadata: more to remember, such as the model's name; ``format`` and ``version`` are ours.

    Raises:
        KVScalesError: there is nothing to write, or the file cannot be written.
    """
    from safetensors.torch import save_file

    if not layers:
        raise KVScalesError("there are no scales to write: calibrate at least one layer.")
    tensors = {}
    for index, layer in sorted(layers.items()):
        tensors[f"layers.{index}.k_scale"] = layer.k_scale.contiguous().clone()
        tensors[f"layers.{index}.v_scale"] = layer.v_scale.contiguous().clone()
        for name, error in (("k_error", layer.k_error), ("v_error", layer.v_error)):
            if error is not None:
                tensors[f"layers.{index}.{name}"] = torch.tensor([error], dtype=torch.float32)
    path = Path(path)
    try:
        with _replacing(path) as staged:
            save_file(tensors, staged, {**metadata, "format": FORMAT, "version": VERSION})
    except OSError as error:
        raise KVScalesError(
            f"{path} cannot be written ({error.strerror or error}): name a file in a directory "
            "that exists and that you can write."
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    staged = Path(name)
    try:
        yield staged
        umask = os.umask(0)
        os.umask(umask)
        staged.chmod(0o666 & ~umask)  # temporary files are private, results are not
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def load_kv_scales(
    path: str | os.PathLike[str],
) -> tuple[dict[int, LayerScales], dict[str, str]]:
    """Read a file of scales and check everything in it.

    Args:
        path: written by :func:`save_kv_scales`.

    Returns:
        Scales by index of the layer, and the metadata.

    Raises:
        KVScalesError: the file is missing, is something else, or holds what cannot be used.
    """
    tensors, metadata = _read(Path(path))
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise KVScalesError(
            f"{path} is not a file of KV scales: its metadata says format "
            f"{metadata.get('format')!r}, version {metadata.get('version')!r}; needed are "
            f"{FORMAT!r} and {VERSION!r}. {_REMEDY}"
        )
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise KVScalesError(
                f"{path} holds {name!r}; allowed are layers.{{i}}.k_scale, v_scale, k_error and "
                f"v_error. {_REMEDY}"
            )
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    if not found:
        raise KVScalesError(f"{path} holds no scales. {_REMEDY}")
    return {index: _layer(path, index, found[index]) for index in sorted(found)}, metadata


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise KVScalesError(
            f"{path}, named as KV scales, is not a file. Make it with 'ascend-plugin calibrate kv "
            "MODEL --text FILE -o kv_scales.safetensors', or correct kv_cache.scales."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise KVScalesError(f"{path} is not a safetensors file ({error}). {_REMEDY}") from error


def _layer(
    path: str | os.PathLike[str], index: int, tensors: Mapping[str, torch.Tensor]
) -> LayerScales:
    for part in ("k_scale", "v_scale"):
        if part not in tensors:
            raise KVScalesError(f"{path} lacks layers.{index}.{part}. {_REMEDY}")
        check_scale(f"{path}: layers.{index}.{part}", tensors[part])
    errors: dict[str, float | None] = {"k_error": None, "v_error": None}
    for part in errors:
        if part in tensors:
            if tensors[part].shape != (1,) or not tensors[part].is_floating_point():
                raise KVScalesError(
                    f"{path}: layers.{index}.{part} must be one number, got "
                    f"{list(tensors[part].shape)} of {tensors[part].dtype}. {_REMEDY}"
                )
            errors[part] = float(tensors[part])
    try:
        return LayerScales(tensors["k_scale"], tensors["v_scale"], **errors)
    except KVScalesError as error:
        raise KVScalesError(f"{path}: layers.{index}: {error}") from None


def _spans(indices: Collection[int]) -> str:
    """Say sorted numbers in few words: ``0-3, 7``."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
