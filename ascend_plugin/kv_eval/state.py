"""What a long calibration keeps on disk, to go on after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ascend_plugin.kv_eval.errors import KVEvalError

_KIND = "ascend-plugin-calibration-state"


class StateFile:
    """A file beside the output; replaced as a whole after every step, gone when all is done.

    Attributes:
        path: of the file.
    """

    def __init__(self, output: Path, identity: Mapping[str, str]) -> None:
        """Name the file of an output, and what a state must agree with to be used.

        Raises:
            KVEvalError: the output's folder does not exist.
        """
        if not output.parent.is_dir():
            raise KVEvalError(f"-o {output}: there is no folder {output.parent}. Make it first.")
        if output.is_dir():
            raise KVEvalError(f"-o {output} is a folder. Name a file.")
        self.path = output.with_name(f".{output.name}.state")
        self._identity = {**identity, "kind": _KIND}

    def load(self) -> dict[str, torch.Tensor] | None:
        """Return what was kept, or None.

        Raises:
            KVEvalError: it was kept by a calibration of something else, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        remedy = "Start anew with --restart, or name another output with -o."
        try:
            with safe_open(self.path, framework="pt") as file:
                found = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise KVEvalError(
                f"{self.path}, left by an interrupted calibration, cannot be read ({error}). "
                f"{remedy}"
            ) from error
        differing = [name for name, value in self._identity.items() if found.get(name) != value]
        if differing:
            raise KVEvalError(
                f"{self.path} was left by an interrupted calibration that differs in "
                f"{', '.join(differing)}. {remedy}"
            )
        return tensors

    def save(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace what is kept.

        Raises:
            KVEvalError: the folder cannot be written.
        """
        from safetensors.torch import save_file

        staged = self.path.with_name(f"{self.path.name}.new")
        try:
            save_file(dict(tensors), staged, self._identity)
            staged.replace(self.path)
        except OSError as error:
            raise KVEvalError(f"{self.path} cannot be written ({error.strerror}).") from error

    def remove(self) -> None:
        """Forget what is kept."""
        self.path.unlink(missing_ok=True)
