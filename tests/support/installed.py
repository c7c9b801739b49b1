"""Packages written into a folder, as if they were installed there: real files, real metadata."""

from __future__ import annotations

from pathlib import Path

#: A torch_npu that fails as it does where CANN is missing.
BROKEN_TORCH_NPU = (
    "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n"
)

#: A torch_npu of which detection sees one NPU. Like the real one it names PrivateUse1 "npu";
#: accelerate and transformers, which vLLM imports, look for the rest.
TORCH_NPU = """\
import torch

class npu:
    device_count = staticmethod(lambda: {count})
    is_available = staticmethod(lambda: {count} > 0)

def npu_fusion_attention(*arguments):
    raise NotImplementedError

torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
"""


def write_module(folder: Path, name: str, source: str) -> Path:
    """Write an importable package; the folder to put on the path."""
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    return folder


def write_metadata(
    folder: Path, name: str, version: str, entry_points: dict[str, dict[str, str]] | None = None
) -> Path:
    """Write a distribution's metadata; the folder to put on the path.

    Args:
        folder: stands for site-packages.
        name: of the distribution.
        version: of the distribution.
        entry_points: name to object, by group.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in (entry_points or {}).items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder
