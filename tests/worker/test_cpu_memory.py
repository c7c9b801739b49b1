"""What is measured while a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ascend_plugin.ops.native import memory
from ascend_plugin.ops.weight_quant_matmul import pack
from ascend_plugin.worker.cpu_memory import (
    LoadReport,
    measure_load,
    resident_bytes,
    use_huge_pages,
)

MIB = 2**20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file({"weight": torch.ones(32 * MIB, dtype=torch.int8)}, tmp_path / "model.safetensors")
    return tmp_path


def _read(checkpoint: Path) -> torch.Tensor:
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor("weight")
    return tensor


def test_copies_count_and_mapped_files_do_not(checkpoint: Path) -> None:
    kept = []

    def load() -> None:
        mapped = _read(checkpoint)
        kept.append(mapped)
        assert int(mapped.sum()) == 32 * MIB, "every page of it was read"

    report = measure_load(load, checkpoint)
    assert report.checkpoint_bytes == 32 * MIB
    assert report.resident_bytes is not None
    assert report.resident_bytes < 4 * MIB
    report = measure_load(lambda: kept.append(kept[0].clone()), checkpoint)
    assert report.resident_bytes is not None
    assert report.resident_bytes == pytest.approx(32 * MIB, rel=0.05)


def test_what_was_freed_does_not_count() -> None:
    """Small blocks of the heap, too, whose end is in use."""

    def load() -> list[torch.Tensor]:
        blocks = [torch.ones(16 << 10, dtype=torch.int8) for _ in range(2000)]
        return blocks[-1:]

    kept = []
    report = measure_load(lambda: kept.extend(load()), None)
    assert report.checkpoint_bytes is None
    assert report.resident_bytes is not None
    assert report.resident_bytes < 8 * MIB


@pytest.mark.parametrize("files", ["none", "other"])
def test_checkpoints_whose_bytes_are_not_known(tmp_path: Path, files: str) -> None:
    folder = tmp_path / "model"
    if files == "other":
        folder.mkdir()
        (folder / "pytorch_model.bin").write_bytes(b"-")
    assert measure_load(lambda: None, folder).checkpoint_bytes is None


def test_sentences() -> None:
    assert LoadReport(1.25, None, None).describe() == "Loading took 1.2 s."
    said = LoadReport(2.0, 3 * MIB, 2 * MIB).describe()
    assert (
        said == "Loading took 2.0 s and 3.0 MiB of memory for 2.0 MiB of tensors in the checkpoint."
    )
    assert resident_bytes() > MIB  # type: ignore[operator]


def test_weights_in_a_kernels_order_get_huge_pages(monkeypatch) -> None:
    """Packed weights are neither parameters nor buffers."""
    given: list[torch.Tensor] = []
    monkeypatch.setattr(memory, "collapse_into_huge_pages", lambda found: given.extend(found) or 0)
    linear = torch.nn.Linear(32, 32)
    quantised = torch.nn.Module()
    quantised.packed = pack(
        torch.zeros(32, 64, dtype=torch.int8), torch.ones(32, 2), bits=4, group=32
    )
    quantised.register_buffer("scale", torch.ones(3))
    use_huge_pages([torch.nn.Sequential(linear, quantised)])
    addresses = {tensor.data_ptr() for tensor in given}
    wanted = (linear.weight, linear.bias, quantised.scale)
    wanted += (quantised.packed.weight, quantised.packed.scales)
    assert addresses >= {tensor.data_ptr() for tensor in wanted}
