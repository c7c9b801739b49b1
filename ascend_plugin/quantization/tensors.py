"""What the safetensors files of a checkpoint hold, from their headers alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import DOWNLOAD_AGAIN, CheckpointError, contradiction, missing_tensor

_INDEX_FILES = ("model.safetensors.index.json", "quant_model_weights.safetensors.index.json")

#: A header longer than this is no header.
_LONGEST_HEADER = 100 << 20

_TYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}

#: Types of weights that are not quantised.
FLOAT_TYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: in its file.
        dtype: in safetensors' words, for example ``I8`` or ``BF16``.
        shape: as stored.
        file: that holds it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _TYPE_BYTES[self.dtype]


class TensorIndex(Mapping[str, TensorInfo]):
    """Every tensor of a checkpoint by name."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def without(self, names: Collection[str]) -> TensorIndex:
        """Return the index of the other tensors."""
        kept = {name: info for name, info in self._tensors.items() if name not in names}
        return TensorIndex(self.folder, kept)

    def need(self, name: str, why: str) -> TensorInfo:
        """Return a tensor that must be there.

        Raises:
            CheckpointError: it is not.
        """
        if name not in self._tensors:
            raise missing_tensor(name, self.folder, why)
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """Return the values of a tensor."""
        from safetensors import safe_open

        with safe_open(self[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def read_index(folder: Path) -> TensorIndex:
    """Read the headers of a checkpoint's files, and check that each file is whole.

    Args:
        folder: of the checkpoint. All its ``*.safetensors`` count unless an index says which.

    Raises:
        CheckpointError: no file, a truncated one, or files and index that disagree.
    """
    weight_map = _read_weight_map(folder)
    if weight_map is None:
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = sorted({folder / file for file in weight_map.values()})
    if not files:
        raise CheckpointError(
            f"{folder}: no *.safetensors file. Weights are read from safetensors alone: convert "
            "other files with the tool that wrote them."
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise contradiction(
                    f"{folder}: tensor {name}",
                    f"{tensors[name].file.name} holds it",
                    f"{file.name} holds it too",
                    "Remove the file that does not belong to the checkpoint.",
                )
            tensors[name] = info
    for name, file_name in (weight_map or {}).items():
        if name not in tensors:
            raise contradiction(
                f"{folder}: tensor {name}",
                f"the index says that {file_name} holds it",
                "no file does",
                DOWNLOAD_AGAIN,
            )
    return TensorIndex(folder, tensors)


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    for name in _INDEX_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text())["weight_map"]
            return {str(tensor): str(file) for tensor, file in found.items()}
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise CheckpointError(
                f"{path}: expected JSON with a 'weight_map' ({error!r}). {DOWNLOAD_AGAIN}"
            ) from error
    return None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            prefix = opened.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, size):
                raise _truncated(file, size, "a header of safetensors")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). {DOWNLOAD_AGAIN}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise _truncated(file, size, "a header of safetensors") from error
    tensors, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensors[name] = _entry(file, name, entry)
        end = max(end, int(entry["data_offsets"][1]))
    if size < 8 + length + end:
        last = max(header, key=lambda name: _last_byte(header[name]))
        raise _truncated(file, size, f"{8 + length + end} bytes (tensor {last} ends there)")
    return tensors


def _last_byte(entry: Mapping[str, Any]) -> int:
    return int(entry["data_offsets"][1]) if "data_offsets" in entry else -1


def _entry(file: Path, name: str, entry: Mapping[str, Any]) -> TensorInfo:
    if entry["dtype"] not in _TYPE_BYTES:
        raise CheckpointError(
            f"{file}: tensor {name} has the type {entry['dtype']!r}; allowed here: "
            f"{', '.join(_TYPE_BYTES)}. {DOWNLOAD_AGAIN}"
        )
    return TensorInfo(name, entry["dtype"], tuple(int(size) for size in entry["shape"]), file)


def _truncated(file: Path, size: int, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: truncated or no safetensors file: {size} bytes, expected {expected}. "
        f"{DOWNLOAD_AGAIN}"
    )
