"""Which module runs how: the rows of ``ascend-plugin inspect``, and of the log at load."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .plan import plan
from .scheme import Checkpoint, ModuleScheme
from .target import Target

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

#: Checkpoints already logged; several engines and processes of drafts may ask.
_logged: set[str] = set()


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One module of a checkpoint.

    Attributes:
        module: its name in the checkpoint.
        scheme: as the checkpoint says.
        source: the format, and its word for the scheme.
        bits: of a weight.
        group: input features that share a scale; None: a scale per output feature, or none at all.
        symmetric: the weight has no zero points.
        n: output features.
        k: input features.
        runs_as: the scheme that is computed.
        kernel: what computes it.
        note: why it runs differently, or why it stays float.
        rotations: at run time.
        bytes: in the checkpoint.
    """

    module: str
    scheme: str
    source: str
    bits: int
    group: int | None
    symmetric: bool
    n: int
    k: int
    runs_as: str
    kernel: str
    note: str
    rotations: str
    bytes: int


@dataclass(frozen=True, slots=True)
class SchemeTotal:
    """Memory of all modules that run alike.

    Attributes:
        scheme: as the checkpoint says; ``others``: what belongs to no matrix.
        runs_as: the scheme that is computed.
        modules: how many.
        weights: elements of their matrices.
        bytes: in the checkpoint.
        bf16_bytes: of the same matrices in bfloat16.
    """

    scheme: str
    runs_as: str
    modules: int
    weights: int
    bytes: int
    bf16_bytes: int


def module_rows(checkpoint: Checkpoint, target: Target = Target.CPU) -> list[ModuleRow]:
    """Return a row for every matrix of a checkpoint on a device, in the order of the layers."""
    modules = sorted(checkpoint.modules.values(), key=lambda module: _natural(module.name))
    return [_row(module, target) for module in modules]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _row(module: ModuleScheme, target: Target) -> ModuleRow:
    chosen = plan(module, target)
    grouped = module.quantised and module.group != module.k
    return ModuleRow(
        module=module.name,
        scheme=module.scheme.value,
        source=f"{module.source} ({module.source_type})",
        bits=module.bits,
        group=module.group if grouped else None,
        symmetric=module.symmetric,
        n=module.n,
        k=module.k,
        runs_as=chosen.runs_as,
        kernel=chosen.kernel.value,
        note=chosen.note if module.quantised or chosen.refused else module.reason,
        rotations=", ".join(
            f"{rotation.name} {rotation.location} {rotation.kind} {rotation.block}"
            for rotation in module.rotations
        ),
        bytes=module.nbytes,
    )


def totals(checkpoint: Checkpoint, target: Target = Target.CPU) -> list[SchemeTotal]:
    """Return the memory per scheme, and that of everything beside the matrices."""
    found: dict[tuple[str, str], list[ModuleScheme]] = {}
    for module in checkpoint.modules.values():
        found.setdefault((module.scheme.value, plan(module, target).runs_as), []).append(module)
    rows = [
        SchemeTotal(
            scheme=scheme,
            runs_as=runs_as,
            modules=len(modules),
            weights=sum(module.n * module.k for module in modules),
            bytes=sum(module.nbytes for module in modules),
            bf16_bytes=sum(2 * module.n * module.k for module in modules),
        )
        for (scheme, runs_as), modules in sorted(found.items())
    ]
    matrices = sum(row.bytes for row in rows)
    others = sum(info.nbytes for info in checkpoint.index.values()) - matrices
    return [*rows, SchemeTotal("others", "", 0, 0, others, others)]


def grouped_rows(rows: Iterable[ModuleRow]) -> list[tuple[str, ModuleRow, int, int]]:
    """Return rows that differ in the number of their layer alone as one.

    Returns:
        Pattern of the name with ``*`` for the layer, a row, how many there are, and their bytes.
    """
    found: dict[tuple[object, ...], list[ModuleRow]] = {}
    for row in rows:
        name = _NUMBER.sub("*", row.module)
        same = (name, row.scheme, row.source, row.bits, row.group, row.symmetric, row.n, row.k)
        found.setdefault((*same, row.runs_as, row.note, row.rotations), []).append(row)
    return [
        (str(key[0]), alike[0], len(alike), sum(row.bytes for row in alike))
        for key, alike in found.items()
    ]


def describe_lines(checkpoint: Checkpoint, target: Target = Target.CPU) -> list[str]:
    """Return the table as lines of text."""
    lines = []
    for name, row, count, size in grouped_rows(module_rows(checkpoint, target)):
        group = "" if row.group is None else f" g{row.group}"
        zeros = "" if row.symmetric else " asymmetric"
        what = row.scheme if row.scheme == "FLOAT" else f"{row.scheme}{group}{zeros}"
        note = f" [{row.note}]" if row.note else ""
        turned = f", rotated: {row.rotations}" if row.rotations else ""
        lines.append(
            f"{name} ×{count}: {what} from {row.source}, runs as {row.runs_as} with "
            f"{row.kernel}{turned}, {size / 2**20:.1f} MiB{note}"
        )
    if checkpoint.kv is not None:
        lines.append(f"KV cache: {checkpoint.kv.kind} scales of {checkpoint.kv.layers} layers")
    lines.extend(checkpoint.notes)
    return lines


def log_checkpoint(checkpoint: Checkpoint, target: Target) -> None:
    """Log how every module of a checkpoint runs on a device, once per process."""
    if str(checkpoint.folder) in _logged:
        return
    _logged.add(str(checkpoint.folder))
    quantised = sum(module.quantised for module in checkpoint.modules.values())
    logger.info(
        "Quantised weights (%s): %d of %d matrices of %s.",
        checkpoint.source,
        quantised,
        len(checkpoint.modules),
        checkpoint.folder,
    )
    for line in describe_lines(checkpoint, target):
        logger.info("  %s", line)
