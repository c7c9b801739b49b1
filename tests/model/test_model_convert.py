"""The conversion of a small GGUF: contents, repetition, damage, replacement."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ascend_plugin.model.checkpoint_dir import MANIFEST
from ascend_plugin.model.errors import ModelDestinationError, ModelSourceError
from ascend_plugin.model.smollm2 import FILES, ConversionResult, convert_checkpoint

SCRIPT = Path(__file__).with_name("convert_tiny.py")


@pytest.fixture
def convert(write_gguf: Any, pin: Any, tmp_path: Path) -> Any:
    """Converts one small GGUF, ``convert(directory, **options)``."""
    path = write_gguf()
    source = pin(path)

    def run(directory: Path = tmp_path / "out", **options: Any) -> ConversionResult:
        return convert_checkpoint(source, directory, **({"gguf": path} | options))

    return run


def test_result_and_manifest_describe_the_files(
    convert: Any, tmp_path: Path, read_manifest: Any
) -> None:
    result = convert()
    assert result.status == "converted"
    assert result.path == tmp_path / "out"
    assert {path.name for path in result.path.iterdir()} == FILES | {MANIFEST}
    rows = {row["file"]: row for row in read_manifest(result.path)["files"]}
    assert {record.file for record in result.files} == set(rows) == FILES
    for name in FILES:
        data = (result.path / name).read_bytes()
        assert rows[name]["bytes"] == len(data)
        assert rows[name]["sha256"] == hashlib.sha256(data).hexdigest()
        assert stat.S_IMODE((result.path / name).stat().st_mode) & 0o444


def test_tensors_and_config_equal_those_of_transformers(write_gguf: Any, convert: Any) -> None:
    transformers = pytest.importorskip("transformers")
    path, result = write_gguf(), convert()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(result.path)
    assert ours.dtype == torch.bfloat16
    ours_by_name, theirs_by_name = ours.state_dict(), theirs.state_dict()
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, tensor in theirs_by_name.items():
        assert torch.equal(ours_by_name[name], tensor), name
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters"):
        assert getattr(ours.config, key) == pytest.approx(getattr(theirs.config, key)), key


def test_an_untied_output_is_kept(write_gguf: Any, pin: Any, tmp_path: Path) -> None:
    path = write_gguf(tensors={"output.weight": (264, 64)})
    result = convert_checkpoint(pin(path), tmp_path / "out", gguf=path)
    assert json.loads((result.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert load_file(result.path / "model.safetensors")["lm_head.weight"].shape == (264, 64)


def test_tokenizer_splits_digits_and_keeps_specials(convert: Any) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(convert().path)
    assert tokenizer.tokenize("hello world 42<|im_end|>") == [
        *("hello", "Ġw", "o", "r", "l", "d", "Ġ", "4", "2", "<|im_end|>")
    ]
    assert tokenizer.decode(tokenizer("hé 4½ 漢")["input_ids"]) == "hé 4½ 漢"
    assert tokenizer.decode([1, 3, 2], skip_special_tokens=True) == "!"
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"


def test_a_rerun_changes_nothing_and_needs_no_source(convert: Any) -> None:
    first = convert()
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    again = convert(gguf=Path("/nowhere/else.gguf"))
    assert (again.status, again.files) == ("unchanged", first.files)
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before


def test_two_conversions_are_equal(convert: Any, tmp_path: Path, tree: Any) -> None:
    assert tree(convert(tmp_path / "a").path) == tree(convert(tmp_path / "b").path)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_file_is_named_and_made_again(
    convert: Any, tree: Any, name: str, damage: str
) -> None:
    directory = convert().path
    intact, path = tree(directory), directory / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    result = convert()
    assert result.status == "rebuilt"
    assert result.reason == f"lacks {name}" if damage == "remove" else f"has a damaged {name}"
    assert tree(directory) == intact
    assert sorted(p.name for p in directory.parent.iterdir()) == ["out", "tiny.gguf"]


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("", "unreadable"),
        ("[]", "unreadable"),
        ('{"files": [{"name": 1}]}', "unreadable"),
        ("version", "is of converter version 0"),
        ("source", "was not made of tiny-gguf==1.0"),
        ("files", "lists other files"),
    ],
)
def test_a_wrong_manifest_leads_to_a_rebuild(
    convert: Any, read_manifest: Any, manifest: str, reason: str
) -> None:
    directory = convert().path
    content = read_manifest(directory)
    if manifest == "version":
        content["converter_version"] = 0
    elif manifest == "source":
        content["source"]["sha256"] = "0" * 64
    elif manifest == "files":
        content["files"] = content["files"][1:]
    known = manifest in content or manifest == "version"
    (directory / MANIFEST).write_text(json.dumps(content) if known else manifest)
    result = convert()
    assert result.status == "rebuilt"
    assert reason in result.reason
    assert convert().status == "unchanged"


def test_files_of_another_origin_are_not_touched(convert: Any, tmp_path: Path, tree: Any) -> None:
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "thesis.txt").write_text("two years of work")
    with pytest.raises(ModelDestinationError, match=r"has files and no .*--force"):
        convert()
    assert tree(directory) == {"thesis.txt": b"two years of work"}
    result = convert(force=True)
    assert result.status == "replaced"
    assert result.kept == tmp_path / "out.replaced-1"
    assert tree(result.kept) == {"thesis.txt": b"two years of work"}
    assert convert().status == "unchanged"


def test_a_damaged_checkpoint_with_other_files_asks_for_force(convert: Any) -> None:
    directory = convert().path
    (directory / "notes.md").write_text("mine")
    assert convert().status == "unchanged"
    (directory / "config.json").unlink()
    with pytest.raises(ModelDestinationError, match=r"lacks config\.json, and .*'notes\.md'"):
        convert()
    kept = convert(force=True).kept
    assert (kept / "notes.md").read_text() == "mine"


def test_force_makes_a_complete_checkpoint_again(convert: Any) -> None:
    inode = convert().path.stat().st_ino
    result = convert(force=True)
    assert (result.status, result.kept) == ("rebuilt", None)
    assert result.path.stat().st_ino != inode


def test_an_empty_directory_and_a_link_are_good_destinations(convert: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    assert convert().path == tmp_path / "real"
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_current_directory_is_refused(
    convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ModelDestinationError, match="holds the current directory"):
        convert(Path())


def test_a_file_as_destination_is_refused(convert: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("text")
    with pytest.raises(ModelDestinationError, match="out is a file"):
        convert()
    with pytest.raises(ModelDestinationError, match="cannot be written"):
        convert(tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "text"


def test_an_unwritable_place_is_one_sentence(convert: Any) -> None:
    with pytest.raises(ModelDestinationError, match=r"^/proc/x/y cannot be written \(.*\.$"):
        convert(Path("/proc/x/y"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_one_sentence(convert: Any, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ModelDestinationError, match=r"cannot be written \(Permission denied\)"):
        convert(tmp_path / "locked" / "out")


def test_a_failure_leaves_nothing_behind(convert: Any, tmp_path: Path, tree: Any) -> None:
    before = tree(tmp_path)
    with pytest.raises(ModelSourceError, match="does not exist"):
        convert(tmp_path / "new" / "parents" / "out", gguf=tmp_path / "absent.gguf")
    assert tree(tmp_path) == before


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("step", ["converting the weights", "writing model.safetensors"])
def test_a_killed_conversion_is_cleared_away_by_the_next(
    write_gguf: Any, tmp_path: Path, step: str
) -> None:
    path = write_gguf()
    assert run_script(path, tmp_path / "out", f"kill_at={step}").returncode == -9
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names[0].startswith(".out.partial-")
    assert names[1:] == ["tiny.gguf"]
    assert run_script(path, tmp_path / "out").stdout == "converted\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_simultaneous_conversions_take_turns(write_gguf: Any, tmp_path: Path) -> None:
    arguments = [str(write_gguf()), str(tmp_path / "out"), "sleep_at=reading the GGUF"]
    command = [sys.executable, str(SCRIPT), *arguments]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert sorted(output for output, _ in outputs) == ["converted\n", "unchanged\n", "unchanged\n"]
