"""Errors of quantised checkpoints: each names tensor, file, what was expected and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tensors import TensorInfo

#: What to do about a file that is not what its tool wrote.
DOWNLOAD_AGAIN = "Copy or download the checkpoint again, or quantise the model again."


class CheckpointError(ValueError):
    """A quantised checkpoint cannot be served as it is."""


def missing_tensor(name: str, folder: Path, why: str) -> CheckpointError:
    """Return the error for a tensor that no file holds.

    Args:
        name: of the tensor.
        folder: of the checkpoint.
        why: what says that there must be one.
    """
    return CheckpointError(
        f"{folder}: tensor {name} is missing; expected because {why}. {DOWNLOAD_AGAIN}"
    )


def wrong_tensor(
    info: TensorInfo,
    expected: str,
    why: str,
    remedy: str = DOWNLOAD_AGAIN,
) -> CheckpointError:
    """Return the error for a tensor of another shape or type.

    Args:
        info: the tensor as it is.
        expected: shape and type that it should have.
        why: where the expectation comes from.
        remedy: what to do.
    """
    return CheckpointError(
        f"{info.file}: tensor {info.name} is {info.dtype} {list(info.shape)}, expected "
        f"{expected} ({why}). {remedy}"
    )


def contradiction(where: str, first: str, second: str, remedy: str) -> CheckpointError:
    """Return the error for two statements of a checkpoint that exclude each other."""
    return CheckpointError(f"{where}: {first}, but {second}. {remedy}")


def unknown_value(
    where: str, value: object, allowed: Sequence[str], remedy: str
) -> CheckpointError:
    """Return the error for a value outside of the known ones."""
    return CheckpointError(f"{where} is {value!r}; allowed here: {', '.join(allowed)}. {remedy}")
