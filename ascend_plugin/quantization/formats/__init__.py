"""Which format a checkpoint has, and its description in the plugin's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascend_plugin.quantization.errors import DOWNLOAD_AGAIN, CheckpointError
from ascend_plugin.quantization.scheme import Checkpoint
from ascend_plugin.quantization.tensors import read_index

from . import awq, compressed_tensors, gptq, modelslim

_PARSERS: Mapping[str, Any] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gptq": gptq,
}


def claims(quantization_config: Any) -> str | None:
    """Say which format of the plugin a ``quantization_config`` is; None: vLLM's own path serves it.

    Args:
        quantization_config: of ``config.json``.
    """
    if not isinstance(quantization_config, Mapping):
        return None
    for name, parser in _PARSERS.items():
        if parser.claims(quantization_config):
            return name
    return None


def describe(folder: Path, quantization_config: Any = None) -> Checkpoint | None:
    """Describe the quantised checkpoint in a folder.

    Args:
        folder: of the checkpoint.
        quantization_config: of ``config.json``; None: read it.

    Returns:
        The description; None: the checkpoint is not quantised, or in a way that vLLM serves itself.

    Raises:
        CheckpointError: it is quantised, but not as it says.
    """
    if (folder / modelslim.DESCRIPTION_FILE).is_file():
        return modelslim.parse(folder, read_index(folder))
    if quantization_config is None:
        quantization_config = read_quantization_config(folder)
    name = claims(quantization_config)
    if name is None:
        return None
    found: Checkpoint = _PARSERS[name].parse(read_index(folder), quantization_config)
    return found


def read_quantization_config(folder: Path) -> Mapping[str, Any] | None:
    """Return the ``quantization_config`` of a checkpoint's ``config.json``; None: it has none.

    Raises:
        CheckpointError: there is no readable ``config.json``.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected the model's configuration as JSON ({error}). {DOWNLOAD_AGAIN}"
        ) from error
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None:
        found = (config.get("text_config") or {}).get("quantization_config")
    return found if isinstance(found, Mapping) else None
