"""Which part of a checkpoint's module a process holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .errors import CheckpointError
from .scheme import ModuleScheme
from .unpack import Codes


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows and columns of a module that this process holds.

    Attributes:
        rows: ranges of output features, ``(first, count)``, one after the other.
        columns: range of input features.
        padding: rows of zeros at the end.
    """

    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]
    padding: int = 0

    @property
    def n(self) -> int:
        """Output features of this process."""
        return sum(count for _, count in self.rows) + self.padding

    def take_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this process' rows of ``[n, …]``."""
        parts = [tensor.narrow(0, first, count) for first, count in self.rows]
        if self.padding:
            parts.append(tensor.new_zeros(self.padding, *tensor.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_shard(module: ModuleScheme, shard: Shard) -> None:
    """Refuse tensor parallel shards that cut groups apart.

    Raises:
        CheckpointError: they do.
    """
    first, count = shard.columns
    if count == module.k or not module.quantised:
        return
    info = next(iter(module.tensors.values()))
    where = f"{info.file}: tensor {info.name}: {module.name}"
    world = module.k // count
    if module.activation_order:
        raise CheckpointError(
            f"{where} has groups in the order of activations (desc_act), which {world} tensor "
            "parallel processes cannot share; expected desc_act=false. Serve it with "
            "--tensor-parallel-size 1, or quantise the model with desc_act=false."
        )
    if module.group != module.k and (first % module.group or count % module.group):
        raise CheckpointError(
            f"{where} has {module.k} input features in groups of {module.group}; {world} tensor "
            f"parallel processes get {count} each, expected a multiple of the group. Use another "
            "--tensor-parallel-size, or quantise the model with smaller groups."
        )


def shard_codes(module: ModuleScheme, codes: Codes, shard: Shard) -> Codes:
    """Return this process' part of an unpacked weight."""
    first, count = shard.columns
    part = shard.take_rows(codes.codes).narrow(1, first, count).contiguous()
    if module.group == module.k:
        groups = (0, 1)
    else:
        groups = (first // module.group, count // module.group)
    scales = shard.take_rows(codes.scales).narrow(1, *groups).contiguous()
    zeros = codes.zeros
    if zeros is not None:
        zeros = shard.take_rows(zeros).narrow(1, *groups).contiguous()
    return replace(codes, codes=part, scales=scales, zeros=zeros)


def shards_of(layer: Any, modules: Sequence[ModuleScheme], columns: tuple[int, int]) -> list[Shard]:
    """Return what this process holds of each part of a layer.

    Args:
        layer: vLLM's, perhaps fused from several modules.
        modules: its parts in order; one that is fused in the checkpoint stands for all.
        columns: range of its input features.

    Raises:
        CheckpointError: the module of the checkpoint has another number of output features.
    """
    if hasattr(layer, "shard_indices"):  # an output embedding
        indices = layer.shard_indices
        first = int(indices.org_vocab_start_index)
        count = min(int(indices.org_vocab_end_index), modules[0].n) - first
        return [Shard(((first, count),), columns, int(layer.output_size_per_partition) - count)]
    ranges = _row_ranges(layer)
    if len(modules) == len(ranges):
        for module, (_, _, size) in zip(modules, ranges, strict=True):
            _check_rows(module, size)
        return [Shard(((first, count),), columns) for first, count, _ in ranges]
    _check_rows(modules[0], sum(size for _, _, size in ranges))
    rows, before = [], 0
    for first, count, size in ranges:
        rows.append((before + first, count))
        before += size
    return [Shard(tuple(rows), columns)]


def _row_ranges(layer: Any) -> list[tuple[int, int, int]]:
    """Return first row, rows here and rows in all of every part of a layer."""
    counts = list(getattr(layer, "output_partition_sizes", [layer.output_size]))
    rank, world = int(getattr(layer, "tp_rank", 0)), int(getattr(layer, "tp_size", 1))
    if sum(counts) == layer.output_size:  # not split by rows
        return [(0, count, count) for count in counts]
    replicas = int(getattr(layer, "num_kv_head_replicas", 1))
    found = []
    for i, count in enumerate(counts):
        copies = replicas if i > 0 else 1
        found.append((rank // copies * count, count, count * world // copies))
    return found


def _check_rows(module: ModuleScheme, size: int) -> None:
    if module.n != size:
        info = next(iter(module.tensors.values()))
        raise CheckpointError(
            f"{info.file}: tensor {info.name} makes {module.name} {module.n} output features, "
            f"expected {size} (config.json). The files belong to another model: download the "
            "checkpoint again."
        )
