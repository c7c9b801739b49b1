#!/usr/bin/env python3
"""Make prose to calibrate and evaluate models with, from two books that Debian ships.

Fetches the packages debian-handbook and developers-reference (through apt, or from a Debian
mirror), takes the paragraphs and headings out of their English HTML and writes ``calibrate.txt``
and ``evaluate.txt``: different pages of both books, none in both files. Files that are complete
stay as they are. Both books are free: GPL-2+ (the handbook also CC-BY-SA-3.0).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

#: Raised when the texts that come out of the same packages would differ.
RECIPE = "1"
STAMP = "prepared.json"
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60
_CHUNK = 1 << 20


class PrepareError(Exception):
    """Something the person at the keyboard has to change; the text says what."""


@dataclass(frozen=True)
class Book:
    """A package with a book.

    Attributes:
        package: its name.
        pool: path on a mirror, of a version that is known to work.
        folder: of the HTML, inside the package.
    """

    package: str
    pool: str
    folder: str


BOOKS = (
    Book(
        "debian-handbook",
        "pool/main/d/debian-handbook/debian-handbook_11.20220922_all.deb",
        "./usr/share/doc/debian-handbook/html/en-US/",
    ),
    Book(
        "developers-reference",
        "pool/main/d/developers-reference/developers-reference_12.18_all.deb",
        "./usr/share/developers-reference/",
    ),
)

#: Pages without prose of their own: contents, search, the whole book in one page.
_SKIPPED = {"index.html", "genindex.html", "search.html", "ix01.html", "developers-reference.html"}


class Prose(HTMLParser):
    """Collects headings and paragraphs; code listings, tables and navigation are left out.

    Attributes:
        blocks: the paragraphs found so far.
    """

    _BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "dt", "li", "dd"})
    _SKIPPED = frozenset({"pre", "script", "style", "table", "title", "head", "nav"})
    _VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "wbr"})
    _SKIPPED_CLASSES = frozenset({"docnav", "related", "sphinxsidebar", "footer", "headerlink"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._parts: list[str] = []
        self._stack: list[tuple[str, bool, bool]] = []  # tag, ends a block, is skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        if tag in self._VOID:
            self.handle_data(" ")
            return
        classes = set((dict(attrs).get("class") or "").split())
        skipped = tag in self._SKIPPED or bool(classes & self._SKIPPED_CLASSES)
        block = tag in self._BLOCKS or "para" in classes
        if block:
            self._flush()
        self._stack.append((tag, block, skipped))

    def handle_endtag(self, tag: str) -> None:
        """Leave an element, and what was left open inside it."""
        if tag not in (entry[0] for entry in self._stack):
            return
        while self._stack:
            name, block, _ = self._stack.pop()
            if block:
                self._flush()
            if name == tag:
                return

    def handle_data(self, data: str) -> None:
        """Keep text inside a block."""
        if any(entry[2] for entry in self._stack) or not any(entry[1] for entry in self._stack):
            return
        self._parts.append(data)

    def _flush(self) -> None:
        text = " ".join("".join(self._parts).split())
        self._parts.clear()
        if text:
            self.blocks.append(text)


def page_text(html: str) -> str:
    """Return the prose of a page, paragraphs apart by an empty line."""
    parser = Prose()
    parser.feed(html)
    parser.close()
    return "\n\n".join(parser.blocks)


def deb_pages(deb: Path, folder: str) -> dict[str, str]:
    """Return the HTML pages of a folder in a Debian package, by file name.

    Raises:
        PrepareError: it is no package, or has no such pages.
    """
    pages = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_member(deb, "data.tar")), mode="r:*") as tar:
            for item in tar:
                name = item.name.removeprefix(folder)
                if not item.isfile() or name == item.name or "/" in name:
                    continue
                content = tar.extractfile(item)
                if name.endswith(".html") and content is not None:
                    pages[name] = content.read().decode("utf-8", errors="replace")
    except tarfile.TarError as error:
        raise PrepareError(f"{deb} cannot be unpacked ({error}). Fetch it again.") from error
    if "index.html" not in pages:
        raise PrepareError(
            f"{deb} has no {folder}index.html. Give the package {deb.name} of BOOKS."
        )
    return pages


def _member(deb: Path, prefix: str) -> bytes:
    """Return a member of the ``ar`` archive that a Debian package is."""
    content = deb.read_bytes()
    if not content.startswith(_AR_MAGIC):
        raise PrepareError(f"{deb} is not a Debian package. Fetch it again.")
    at = len(_AR_MAGIC)
    while at + _AR_HEADER <= len(content):
        name = content[at : at + 16].decode("ascii", errors="replace").strip()
        size = int(content[at + 48 : at + 58])
        at += _AR_HEADER
        if name.startswith(prefix):
            return content[at : at + size]
        at += size + size % 2
    raise PrepareError(f"{deb} has no {prefix}. Fetch it again.")


def reading_order(pages: dict[str, str]) -> list[str]:
    """Return names of pages in the order of the book's contents."""
    linked = re.findall(r'href="([^"#]+\.html)', pages["index.html"])
    ordered = dict.fromkeys(name for name in linked if name in pages and name not in _SKIPPED)
    return list(ordered)


def split_pages(texts: list[str]) -> tuple[list[str], list[str]]:
    """Deal pages to two parts of about the same length."""
    parts: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        lengths = [sum(map(len, part)) for part in parts]
        parts[lengths.index(min(lengths))].append(text)
    return parts


def fetch(book: Book, folder: Path, mirror: str | None, say: Callable[[str], None]) -> Path:
    """Fetch a package into a folder and return its path.

    Raises:
        PrepareError: it cannot be fetched.
    """
    if mirror is None and shutil.which("apt-get"):
        say(f"fetching {book.package} with apt-get")
        done = subprocess.run(
            ["apt-get", "download", book.package],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        found = sorted(folder.glob(f"{book.package}_*.deb"))
        if done.returncode == 0 and found:
            return found[-1]
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PrepareError(
            f"apt-get does not get {book.package} ({reason}). Run apt-get update, or give --mirror "
            "with the address of a Debian mirror."
        )
    if mirror is None:
        raise PrepareError(
            "there is no apt-get here. Give --mirror with a Debian mirror, or --deb."
        )
    path = folder / Path(book.pool).name
    _download(f"{mirror.rstrip('/')}/{book.pool}", path, say)
    return path


def _download(url: str, path: Path, say: Callable[[str], None]) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 1)
            told = -1
            while block := response.read(_CHUNK):
                file.write(block)
                tenths = 10 * file.tell() // total
                if tenths > told:
                    told = tenths
                    say(f"fetching {path.name}: {10 * tenths} %")
    except (OSError, ValueError) as error:
        raise PrepareError(
            f"{url} cannot be fetched ({error}). Check --mirror: it must hold this version, as "
            "snapshot archives do."
        ) from error


def prepare(
    folder: Path, mirror: str | None, debs: list[Path], say: Callable[[str], None]
) -> list[Path]:
    """Write the texts into a folder and return their paths.

    Args:
        folder: made if absent.
        mirror: address of a Debian mirror; None: apt.
        debs: packages that are here already.
        say: told of each step.

    Raises:
        PrepareError: a package cannot be had or read.
    """
    targets = [folder / "calibrate.txt", folder / "evaluate.txt"]
    if complete(folder, targets):
        say(f"{folder} is complete; nothing to do")
        return targets
    folder.mkdir(parents=True, exist_ok=True)
    parts: tuple[list[str], list[str]] = ([], [])
    with tempfile.TemporaryDirectory(prefix="prepare-text-") as scratch:
        for book in BOOKS:
            given = [path for path in debs if path.name.startswith(f"{book.package}_")]
            deb = given[0] if given else fetch(book, Path(scratch), mirror, say)
            say(f"reading {deb.name}")
            pages = deb_pages(deb, book.folder)
            texts = [page_text(pages[name]) for name in reading_order(pages)]
            for part, half in zip(parts, split_pages([t for t in texts if t]), strict=True):
                part += half
    stamp = {"recipe": RECIPE}
    for target, part in zip(targets, parts, strict=True):
        content = ("\n\n".join(part) + "\n").encode()
        _replace(target, content)
        stamp[target.name] = hashlib.sha256(content).hexdigest()
        say(f"{target}: {len(content.split())} words")
    _replace(folder / STAMP, (json.dumps(stamp, indent=2) + "\n").encode())
    return targets


def complete(folder: Path, targets: list[Path]) -> bool:
    """Say whether a folder holds what this recipe makes, unchanged."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in targets}
    except (OSError, ValueError):
        return False
    return bool(stamp == {"recipe": RECIPE, **found})


def _replace(path: Path, content: bytes) -> None:
    staged = path.with_name(f".{path.name}.new")
    staged.write_bytes(content)
    staged.replace(path)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that says on stderr what is done: one line that changes on a terminal."""
    if not sys.stderr.isatty():
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    width = shutil.get_terminal_size().columns - 1
    yield lambda line: print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def main() -> int:
    """Run the tool; 0, or 1 after an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where calibrate.txt and evaluate.txt go")
    parser.add_argument("--mirror", help="address of a Debian mirror (default: what apt uses)")
    parser.add_argument(
        "--deb", type=Path, action="append", default=[], help="a package that is here already"
    )
    options = parser.parse_args()
    for deb in options.deb:
        if not deb.is_file():
            parser.error(f"--deb {deb} is not a file")
    try:
        with progress() as say:
            prepare(options.folder, options.mirror, options.deb, say)
    except (PrepareError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C.UTF-8")  # apt-get's messages in English
    sys.exit(main())
