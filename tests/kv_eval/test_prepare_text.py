"""``tools/prepare_text.py`` on packages that are made here: no network."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

PAGE = """<html><head><title>No</title><style>p {}</style></head><body>
<ul class="docnav"><li><a href="x.html">Next</a></li></ul>
<div class="section"><h2 class="title">Title %s<a class="headerlink">¶</a></h2>
<div class="para">One <code>word</code>
  &amp; two.<img src="x"><div class="para">Inner.</div></div>
<pre>code --listing</pre><table><tr><td><p>cell</p></td></tr></table>
<p>Last<br>line.</div>loose</body></html>"""
TEXT = "Title %s\n\nOne word & two.\n\nInner.\n\nLast line."


@pytest.fixture(scope="module")
def tool(repository) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "prepare_text", repository / "tools" / "prepare_text.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_text"] = module
    spec.loader.exec_module(module)
    return module


def write_deb(path: Path, files: dict[str, str]) -> Path:
    """Write an ``ar`` archive of two members, the second a tar file, as a Debian package is."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(content.encode())
            tar.addfile(item, io.BytesIO(content.encode()))
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


@pytest.fixture
def debs(tool, tmp_path) -> list[Path]:
    paths = []
    for book in tool.BOOKS:
        pages = {f"{book.folder}{i}.html": PAGE % f"{book.package} {i}" for i in range(4)}
        links = "".join(f'<a href="{i}.html#x">{i}</a>' for i in (2, 0, 1, 3, 0))
        pages[f"{book.folder}index.html"] = links
        pages[f"{book.folder}sub/9.html"] = PAGE % "elsewhere"
        paths.append(write_deb(tmp_path / f"{book.package}_1_all.deb", pages))
    return paths


def test_prose_without_code_tables_and_navigation(tool):
    assert tool.page_text(PAGE % "A") == TEXT % "A"


def test_pages_are_dealt_to_two_files_in_reading_order(tool, debs, tmp_path):
    folder = tmp_path / "text"
    tool.prepare(folder, None, debs, lambda line: None)
    names = [book.package for book in tool.BOOKS]
    for file, pages in (("calibrate.txt", (2, 1)), ("evaluate.txt", (0, 3))):
        expected = [TEXT % f"{name} {page}" for name in names for page in pages]
        assert (folder / file).read_text() == "\n\n".join(expected) + "\n"


def test_a_complete_folder_is_left_alone(tool, debs, tmp_path):
    told: list[str] = []
    tool.prepare(tmp_path / "text", None, debs, told.append)
    for deb in debs:
        deb.unlink()
    tool.prepare(tmp_path / "text", "http://127.0.0.1:9", debs, told.append)
    assert "nothing to do" in told[-1]
    (tmp_path / "text" / "evaluate.txt").write_text("spoilt")
    with pytest.raises(tool.PrepareError, match=r"cannot be fetched.*--mirror"):
        tool.prepare(tmp_path / "text", "http://127.0.0.1:9", [], told.append)


def test_packages_come_from_a_mirror(tool, debs, tmp_path):
    for book, deb in zip(tool.BOOKS, debs, strict=True):
        place = tmp_path / "mirror" / book.pool
        place.parent.mkdir(parents=True)
        place.write_bytes(deb.read_bytes())
    told: list[str] = []
    tool.prepare(tmp_path / "text", (tmp_path / "mirror").as_uri() + "/", [], told.append)
    assert any("100 %" in line for line in told)
    assert (tmp_path / "text" / "evaluate.txt").is_file()


@pytest.mark.parametrize(
    "content, words", [(b"x", "not a Debian package"), (b"!<arch>\n", "has no data.tar")]
)
def test_files_that_are_no_package(tool, debs, tmp_path, content, words):
    debs[0].write_bytes(content)
    with pytest.raises(tool.PrepareError, match=words):
        tool.prepare(tmp_path / "text", None, debs, lambda line: None)


def test_a_package_without_the_book(tool, debs, tmp_path):
    write_deb(debs[0], {"./usr/other.html": "x"})
    with pytest.raises(tool.PrepareError, match=r"has no .*index.html"):
        tool.prepare(tmp_path / "text", None, debs, lambda line: None)


def test_the_script(repository, debs, tmp_path):
    script = [sys.executable, repository / "tools" / "prepare_text.py", tmp_path / "text"]
    command = [*script, *(word for deb in debs for word in ("--deb", deb))]
    for words in ("evaluate.txt: 40 words", "nothing to do"):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == ""
        assert words in done.stderr
    done = subprocess.run([*script, "--deb", "none"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not a file" in done.stderr
