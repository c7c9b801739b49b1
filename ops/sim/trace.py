"""A record of every launch: one JSON line each, for cost reports and coverage of call sites.

Fields: ``operator``; ``tensors``, each ``[shape, dtype, format]`` in the order of the arguments;
``bytes`` that the kernel reads and writes; ``stream``; ``replay``, the number of the graph's replay
or 0; ``pid``. Processes append whole lines to the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .arguments import FractalTensor, ResizedTensor

if TYPE_CHECKING:
    from .table import Operator


class Trace:
    """Appends launches to a file.

    Args:
        path: file; made when the first launch is written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: int | None = None
        self._pid = os.getpid()

    def launch(self, operator: Operator, args: Sequence[Any], stream: int, replay: int) -> None:
        """Append one launch."""
        line = {
            "operator": operator.name,
            "tensors": [describe(each) for each in tensors(args)],
            "bytes": traffic(operator, args),
            "stream": stream,
            "replay": replay,
            "pid": os.getpid(),
        }
        self._append((json.dumps(line) + "\n").encode())

    def _append(self, line: bytes) -> None:
        if self._file is None or self._pid != os.getpid():  # a forked child opens its own
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file, self._pid = os.open(self._path, flags, 0o644), os.getpid()
        os.write(self._file, line)  # one write with O_APPEND: lines of processes do not mix


def traffic(operator: Operator, args: Sequence[Any]) -> int:
    """Return the bytes that a call moves between memory and the cores."""
    if operator.traffic is not None:
        return operator.traffic(*args)
    return sum(size(each) for each in tensors(args))


def size(tensor: torch.Tensor | FractalTensor | None) -> int:
    """Return a tensor's bytes; a broadcast view counts what it reads from memory."""
    if tensor is None:
        return 0
    if isinstance(tensor, FractalTensor):
        return tensor.cubes.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1
    for count, step in steps:
        elements *= count if step else min(count, 1)
    return elements * tensor.element_size()


def tensors(args: Sequence[Any]) -> Iterator[torch.Tensor | FractalTensor]:
    """Yield the tensors among decoded arguments, lists flattened."""
    for each in args:
        if isinstance(each, ResizedTensor):
            each = each.view
        if isinstance(each, torch.Tensor | FractalTensor):
            yield each
        elif isinstance(each, list):
            yield from tensors(each)


def describe(tensor: torch.Tensor | FractalTensor) -> tuple[list[int], str, str]:
    """Return shape, element type and format."""
    layout = "NZ" if isinstance(tensor, FractalTensor) else "ND"
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch."), layout
