"""Draft layers as files, and checkpoints in MiMo's layout that vLLM serves.

A layer's file holds the layer alone, says which base it belongs to, and in which order of frequency
a draft head keeps tokens. A checkpoint is the base's folder with one more file of weights, and one
of that order: the base's own files are linked, not copied, where the file
system can.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ascend_plugin.mtp.base import LayerShape, check_base, fingerprint, read_config
from ascend_plugin.mtp.errors import MTPError
from ascend_plugin.mtp.layer import PREFIX
from ascend_plugin.spec_decode.token_order import (
    FILE,
    TENSOR,
    VOCABULARY,
    TokenOrder,
    load_order,
    save_order,
)

#: What marks the metadata of a layer's file.
KIND = "ascend-plugin-mtp-layer"
#: The file of a checkpoint that holds the draft layer and, for bases without one, zero biases.
WEIGHTS = "mtp.safetensors"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: Files of a base that its checkpoint with a layer does not share.
_OWN = ("config.json", _INDEX, "ascend_plugin_model.json", FILE)


class WeightFiles:
    """The safetensors of a checkpoint: which file has which tensor."""

    def __init__(self, folder: Path) -> None:
        """Read the index, or the header of the only file.

        Raises:
            MTPError: there are no safetensors.
        """
        from safetensors import SafetensorError, safe_open

        self._folder = folder
        try:
            if (folder / _INDEX).is_file():
                index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
                self.files: dict[str, str] = dict(index["weight_map"])
            else:
                with safe_open(folder / _SINGLE, framework="pt") as file:
                    self.files = dict.fromkeys(file.keys(), _SINGLE)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise MTPError(f"{folder} has no readable safetensors ({error}).") from error

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Raises:
            MTPError: it is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._folder / self.files[name], framework="pt") as file:
                return file.get_tensor(name)
        except KeyError as error:
            raise MTPError(f"{self._folder} has no tensor {name}.") from error
        except (OSError, SafetensorError) as error:
            raise MTPError(f"{self._folder}: {name} cannot be read ({error}).") from error


def base_fingerprint(folder: Path) -> str:
    """Return what ties a draft layer to the model in ``folder``.

    Raises:
        MTPError: it is no model that can have one.
    """
    config = read_config(folder)
    shape = check_base(config, folder)
    files = WeightFiles(folder)
    last = config["num_hidden_layers"] - 1
    weights = (f"model.layers.{last}.mlp.down_proj.weight", "model.norm.weight")
    return fingerprint(shape, *(files.read(name) for name in reversed(weights)))


def save_layer(
    path: Path, weights: Mapping[str, torch.Tensor], order: TokenOrder, about: Mapping[str, str]
) -> None:
    """Write a layer's file.

    Args:
        path: of the file.
        weights: parameters of ``MTPLayer`` by their own names.
        order: which tokens a draft head keeps.
        about: metadata; ``base`` is the fingerprint of its base.
    """
    from safetensors.torch import save_file

    staged = path.with_name(path.name + ".new")
    tensors = {PREFIX + name: weight.contiguous() for name, weight in weights.items()}
    tensors[TENSOR] = order.tokens.contiguous()
    save_file(tensors, staged, {"kind": KIND, "format": "pt", **about, **order.metadata()})
    staged.replace(path)


def load_layer(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the weights of a layer's file, named as in a checkpoint, and its metadata.

    Raises:
        MTPError: it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            names = [name for name in file.keys() if name != TENSOR]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise MTPError(f"{path} cannot be read as a draft layer ({error}).") from error
    if about.get("kind") != KIND:
        raise MTPError(
            f"{path} is not a draft layer. Make one with 'ascend-plugin mtp train MODEL -o DIR'."
        )
    return tensors, about


def load_layer_of(base: Path, layer: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return what :func:`load_layer` does, of a layer that was trained for the model in ``base``.

    Raises:
        MTPError: the layer is of another base, or of other sizes.
    """
    tensors, about = load_layer(layer)
    found = base_fingerprint(base)
    if about.get("base") != found:
        raise MTPError(
            f"{layer} was trained for another base ({about.get('model', 'unknown')}, fingerprint "
            f"{about.get('base')}); {base} has fingerprint {found}. Its drafts would be noise. "
            "Train a layer for this base with 'ascend-plugin mtp train'."
        )
    _check_shapes(tensors, check_base(read_config(base), base), layer)
    return tensors, about


def attach(base: Path, layer: Path, output: Path) -> Path:
    """Write a checkpoint of a base with a draft layer.

    Args:
        base: folder of the base.
        layer: file of the layer.
        output: folder to make; an earlier checkpoint of this kind is replaced.

    Raises:
        MTPError: the layer is of another base, or the folder is something else.
    """
    tensors, about = load_layer_of(base, layer)
    config = read_config(base)
    shape = check_base(config, base)
    order = load_order(layer) if VOCABULARY in about else None
    if order is not None:
        order.check_vocabulary(shape.vocabulary, layer)
    with _replacing(output) as staged:
        _write(base, staged, config, shape, tensors)
        if order is not None:
            save_order(staged / FILE, order, {"format": "pt"})
    return output


def _check_shapes(tensors: Mapping[str, torch.Tensor], shape: LayerShape, layer: Path) -> None:
    """Refuse a layer that is incomplete or of other sizes."""
    from ascend_plugin.mtp.layer import MTPLayer

    with torch.device("meta"):
        wanted = {PREFIX + name: w.shape for name, w in MTPLayer(shape).state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    differing = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if differing:
        name = differing[0]
        raise MTPError(
            f"{layer} does not fit its base: {name} is {_size(found.get(name))}, "
            f"{_size(wanted.get(name))} is needed."
        )


def _size(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _write(
    base: Path,
    folder: Path,
    config: dict[str, Any],
    shape: LayerShape,
    tensors: dict[str, torch.Tensor],
) -> None:
    from safetensors.torch import save_file

    files = WeightFiles(base)
    for file in sorted(base.iterdir()):
        if file.is_file() and file.name not in _OWN:
            _link(file, folder / file.name)
    norm = files.read("model.norm.weight")
    added = {name: tensor.to(norm.dtype) for name, tensor in tensors.items()}
    for name, rows in _missing_biases(files, config, shape):
        added[name] = torch.zeros(rows, dtype=norm.dtype)
    save_file(added, folder / WEIGHTS, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files.files | dict.fromkeys(added, WEIGHTS)}
    (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    text = json.dumps(mimo_config(config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def mimo_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a base's configuration as that of a MiMo model with one draft layer.

    vLLM goes by the architecture. The type stays the base's: transformers, which knows no MiMo,
    chooses the tokenizer by it, and Qwen2's splits text in its own way whatever the files say.
    """
    return {
        **config,
        "architectures": ["MiMoForCausalLM"],
        "num_nextn_predict_layers": 1,
        "attention_bias": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config["num_hidden_layers"],
    }


def _missing_biases(
    files: WeightFiles, config: Mapping[str, Any], shape: LayerShape
) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of the biases that MiMo's layers have and the base's have not."""
    kv = shape.kv_heads * shape.head_dim
    for i in range(config["num_hidden_layers"]):
        for part, rows in (("q", shape.hidden), ("k", kv), ("v", kv)):
            name = f"model.layers.{i}.self_attn.{part}_proj.bias"
            if name not in files.files:
                yield name, rows


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where that is not possible."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` when all went well."""
    if output.exists() and not (output / WEIGHTS).is_file() and any(output.iterdir()):
        raise MTPError(f"{output} holds something else. Name another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(f".{output.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    shutil.rmtree(output, ignore_errors=True)
    staged.replace(output)
