"""Safetensors files of bounded size, with an index if there are several."""

from __future__ import annotations

import json
from pathlib import Path

import torch

#: A file is closed when it holds so many bytes: what is kept in memory.
SHARD_BYTES = 4 << 30


class ShardWriter:
    """Collects tensors and writes them into files."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Write ``STEM-0000N-of-….safetensors`` into a folder."""
        self._folder, self._stem = folder, stem
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""
        self._held[name] = tensor.contiguous().clone()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is left, and the index."""
        if self._held or not self._files:
            self._flush()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._files):
            final = f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        path = self._folder / f"{self._stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._held, self._part(len(self._files)), {"format": "pt"})
        self._files.append(list(self._held))
        self._held, self._bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"{self._stem}.part-{index}"
