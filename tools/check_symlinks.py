#!/usr/bin/env python3
"""Check the symlinks that make ops/, graph/ and configs/ part of the package.

A checkout without symlink support (or an archive tool that follows them) leaves text files or
copies there, which fail later in ways that do not name the cause.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("ops", "graph", "configs")


def problems(root: Path) -> list[str]:
    """Return a sentence for each link of ``root`` that is not as committed."""
    found = []
    for name in LINKS:
        link, target = root / "ascend_plugin" / name, f"../{name}"
        if not link.is_symlink():
            found.append(f"ascend_plugin/{name} must be a symlink to {target}, and is not.")
        elif os.readlink(link) != target:
            found.append(f"ascend_plugin/{name} points to {os.readlink(link)}, not to {target}.")
        elif not link.is_dir():
            found.append(f"ascend_plugin/{name} points to {target}, which is missing.")
    return found


def main() -> int:
    """Print the problems; the exit status says whether there are any."""
    found = problems(ROOT)
    for problem in found:
        print(f"{problem} Restore it: ln -sfn ../NAME ascend_plugin/NAME, or git checkout.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
