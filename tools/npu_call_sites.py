#!/usr/bin/env python3
"""List every call of torch_npu in the package, and fail if the tests left one unexecuted.

The code for NPUs is written where there is none. What was never executed, on the simulated NPU at
least, is not known to be accepted by torch_npu at all::

    ascend-plugin sim run -- coverage run -m pytest -n 2 tests/sim tests/npu
    coverage combine
    tools/npu_call_sites.py
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Names through which the package reaches torch_npu: ``npu`` is ``ops.npu.device.npu``, and
#: platforms, which must not import it early, have a function.
DOORS = ("torch_npu", "torch.npu", "torch.ops.npu", "npu", "_npu()")


@dataclass(frozen=True, slots=True)
class CallSite:
    """A call in the source.

    Attributes:
        path: of the file, relative to the repository.
        line: of the call.
        name: what is called, such as ``torch_npu.npu_rms_norm``.
    """

    path: Path
    line: int
    name: str


def call_sites(source: str, path: Path) -> Iterator[CallSite]:
    """Yield the calls of torch_npu in a file, in its order."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            if any(name.startswith(f"{door}.") for door in DOORS):
                found.append(CallSite(path, node.lineno, name))
    yield from sorted(found, key=lambda site: site.line)


def _dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` for attributes of a name or of a plain call (``f().b``), else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and not node.args and (called := _dotted(node.func)):
        return f"{called}()"
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def package_files(root: Path) -> list[Path]:
    """Return the package's own files, without the simulator, which stands in for torch_npu."""
    rooms = (root / "ascend_plugin", root / "ops", root / "graph")
    files = [path for room in rooms for path in sorted(room.rglob("*.py"))]
    return [path for path in files if "sim" not in path.relative_to(root).parts]


def executed_lines(data_file: Path) -> dict[Path, set[int]]:
    """Return the lines that ran, by file."""
    from coverage import CoverageData

    data = CoverageData(str(data_file))
    data.read()
    return {Path(name): set(data.lines(name) or ()) for name in data.measured_files()}


def main() -> int:
    """Print the table; the exit status says whether a call was never executed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / ".coverage", help="coverage's file")
    parser.add_argument("--all", action="store_true", help="print the executed ones too")
    arguments = parser.parse_args()
    if not arguments.data.exists():
        print(f"{arguments.data} is missing; run the tests under coverage first (make test).")
        return 1
    ran = executed_lines(arguments.data)
    missed = total = 0
    for path in package_files(ROOT):
        for site in call_sites(path.read_text(encoding="utf-8"), path.relative_to(ROOT)):
            total += 1
            executed = site.line in ran.get(path, ())
            missed += not executed
            if arguments.all or not executed:
                state = "executed" if executed else "NEVER EXECUTED"
                print(f"{site.path}:{site.line}: {site.name}: {state}")
    print(f"calls of torch_npu: {total}, never executed: {missed}")
    return 1 if missed or not total else 0


if __name__ == "__main__":
    sys.exit(main())
