"""Conversions onto disks that are too small, on real file systems and limits."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ascend_plugin.model.errors import ModelDestinationError
from ascend_plugin.model.smollm2 import convert_checkpoint

SCRIPT = Path(__file__).with_name("convert_tiny.py")


def test_free_space_is_checked_first(write_gguf: Any, pin: Any, tmp_path: Path, tree: Any) -> None:
    path = write_gguf()
    before = tree(tmp_path)
    steps: list[str] = []
    with pytest.raises(ModelDestinationError, match=r"\d+ MB free, \d+ MB are needed: free some"):
        convert_checkpoint(
            pin(path, checkpoint_bytes=shutil.disk_usage(tmp_path).total),
            tmp_path / "out",
            gguf=path,
            progress=lambda what, _done, _total: steps.append(what),
        )
    assert steps == [f"checking {tmp_path / 'out'}"]
    assert tree(tmp_path) == before


def test_a_download_needs_more_space(pin: Any, write_gguf: Any, tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    with pytest.raises(ModelDestinationError, match="are needed"):
        convert_checkpoint(pin(write_gguf(), wheel_bytes=total), tmp_path / "out")


@pytest.mark.parametrize("limit", [1000, 60_000])
def test_a_file_size_limit_while_writing(
    write_gguf: Any, tmp_path: Path, tree: Any, limit: int
) -> None:
    path = write_gguf()
    before = tree(tmp_path)
    command = [sys.executable, str(SCRIPT), str(path), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, f"file_limit={limit}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"{tmp_path / 'out'} cannot be written (File too large): free")
    assert done.stdout.count("\n") == 1
    assert tree(tmp_path) == before


def in_small_disk(mount: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command with a new tmpfs of 18 MiB at `mount`, then lists on stderr what is left."""
    script = (
        f"mount -t tmpfs -o size=18m tmpfs {mount} || exit 99; "
        f"{shlex.join(command)}; code=$?; find {mount} -mindepth 1 >&2; exit $code"
    )
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    return subprocess.run(isolated, capture_output=True, text=True, timeout=120, check=False)


def test_a_full_disk_while_writing(write_gguf: Any, tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    mount = tmp_path / "disk"
    mount.mkdir()
    if in_small_disk(mount, ["true"]).returncode:
        pytest.skip("this user may not mount a tmpfs in a namespace of its own")
    # The check at the start wants 16 MiB and finds 18, but the checkpoint has 25 MB.
    wide = 32_768
    parts = {"gate": (wide, 64), "up": (wide, 64), "down": (64, wide)}
    path = write_gguf(
        changed={"llama.feed_forward_length": wide},
        tensors={f"blk.{i}.ffn_{k}.weight": v for i in range(2) for k, v in parts.items()},
    )
    done = in_small_disk(mount, [sys.executable, str(SCRIPT), str(path), str(mount / "out")])
    assert done.returncode == 1, done.stderr
    assert "out cannot be written (No space left on device): free some space" in done.stdout
    assert done.stderr == ""
