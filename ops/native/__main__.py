"""``python -m ascend_plugin.ops.native``: build the kernel libraries in place."""

from __future__ import annotations

import sys

from ascend_plugin.ops.native import build


def main() -> int:
    """Builds every instruction set that suits this machine."""
    try:
        paths = build.build(build.LIBRARY_DIR)
    except build.NativeBuildError as error:
        print(error, file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
