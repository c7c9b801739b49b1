#!/usr/bin/env python3
"""Break the AscendC kernels, one place at a time, and report how many of these mutants tests kill.

The mutants (tools/ascendc_mutations.py) of a kernel are compiled against the host model into one
library, in which the environment chooses one; the quick tests of the kernel then run on it. A
mutant that they pass has survived: the tests do not need what was removed, or do not see that it is
gone::

    tools/ascendc_mutants.py beam_topk -j 2 --kinds synchronisation
    tools/ascendc_mutants.py --json > mutants.json      # every kernel, every kind

Exit status 1: fewer synchronisation mutants were killed than --bar asks for.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ascendc_mutations as mutations
from ascendc_mutations import Mutant

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "ops" / "ascendc" / "kernels"
TESTS = ROOT / "tests" / "ascendc"

#: Kernels whose tests are not in ``test_<kernel>.py``.
TEST_FILES = {"paged_attention_c8": "test_paged_attention.py"}

#: What ``ops/ascendc/build.py`` reads, and what the library reads.
KERNELS_VARIABLE, BUILD_VARIABLE = "ASCENDC_KERNELS_DIR", "ASCENDC_BUILD_DIR"
MUTANT_VARIABLE = "ASCENDC_MUTANT"

#: Exit statuses of a mutant's process, beside those of pytest (0: passed, 1: failed).
PASSED, FAILED, NOT_REACHED = 0, 1, 64

#: Modules that are loaded once; each mutant is a fork, which starts with everything but kernels.
PRELOADED = ("torch", "hypothesis", "pytest", "ascend_plugin.ops.ascendc.host")

#: A loop without an end fills memory with instructions; this stops it.
MEMORY_BYTES = 12 << 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant, and how.

    ``killed``, ``survived``, ``not tried`` (it does not compile), or ``not used``: in a header that
    kernels share, code that this one never runs. That belongs to the others' campaigns.
    """

    kernel: str
    mutant: Mutant
    verdict: str
    how: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Campaign:
    """One kernel with its mutants in it, and how to test it.

    Attributes:
        kernel: its name.
        mutants: by number; -1 is none.
        library: compiled, with all of them.
        folder: for a ``log<number>`` each.
        tests: the test file.
        select: pytest's ``-k``.
        jobs: processes at a time.
        shared: files that other kernels include too.
    """

    kernel: str
    mutants: dict[int, Mutant]
    library: Path
    folder: Path
    tests: Path
    select: str
    jobs: int
    shared: frozenset[Path]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernel", nargs="*", help="names of kernels (default: all)")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--kinds",
        default="all",
        help=f"all, synchronisation, or some of {', '.join(mutations.KINDS)}, with commas",
    )
    parser.add_argument("--sample", type=int, help="at most so many of each kind of addressing")
    parser.add_argument("--lines", help="only mutants of FILE:LINE, with commas")
    parser.add_argument("--bar", type=float, default=95.0, help="percent that must be killed")
    parser.add_argument("--select", default="quick", help="pytest's -k (default: quick)")
    parser.add_argument("--kernels-dir", type=Path, default=KERNELS)
    parser.add_argument("--tests-dir", type=Path, default=TESTS)
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--json", action="store_true", help="write the results as JSON")
    return parser.parse_args()


def main() -> int:
    """Run the campaigns; return the exit status."""
    options = parse_arguments()
    kernels = options.kernel or sorted(path.stem for path in options.kernels_dir.glob("*.cpp"))
    chosen = {
        kernel: _chosen(mutations.mutants_of(options.kernels_dir, kernel), options)
        for kernel in kernels
    }
    if options.list:
        for kernel, mutants in chosen.items():
            for each in mutants:
                print(f"{kernel}: {each.kind} {each.path}:{each.line}: {each.what}")
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads do not survive a fork
    for module in PRELOADED:
        importlib.import_module(module)
    outcomes: list[Outcome] = []
    for kernel, mutants in chosen.items():
        with tempfile.TemporaryDirectory(prefix="ascendc-mutants-") as folder:
            outcomes += _campaign(kernel, mutants, Path(folder), options)
    report = summarise(outcomes)
    print(json.dumps(report, indent=1) if options.json else _text(report))
    return 0 if report["synchronisation_percent"] >= options.bar else 1


def _chosen(found: Sequence[Mutant], options: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the options ask for."""
    groups = {"all": mutations.KINDS, "synchronisation": mutations.SYNCHRONISATION}
    kinds = groups.get(options.kinds) or options.kinds.split(",")
    unknown = set(kinds) - set(mutations.KINDS)
    if unknown:
        sys.exit(f"--kinds {sorted(unknown)} unknown; allowed: {', '.join(mutations.KINDS)}.")
    places = set(options.lines.split(",")) if options.lines else None
    found = [each for each in found if each.kind in kinds]
    found = [each for each in found if not places or f"{each.path}:{each.line}" in places]
    if options.sample is None:
        return list(found)
    kept: list[Mutant] = []
    for kind in kinds:
        some = [each for each in found if each.kind == kind]
        few = kind in mutations.ADDRESSING and len(some) > options.sample
        kept += random.Random(0).sample(some, options.sample) if few else some
    return kept


def _campaign(
    kernel: str, mutants: Sequence[Mutant], folder: Path, options: argparse.Namespace
) -> Iterator[Outcome]:
    """Compile the mutants of a kernel and test each."""
    numbered = dict(enumerate(mutants))
    library, refused = _compile(options.kernels_dir, kernel, numbered, folder)
    for number in refused:
        yield Outcome(kernel, numbered.pop(number), "not tried", "does not compile", 0.0)
    tests = options.tests_dir / TEST_FILES.get(kernel, f"test_{kernel}.py")
    shared = _shared(options.kernels_dir, kernel)
    campaign = Campaign(
        kernel, numbered, library, folder, tests, options.select, options.jobs, shared
    )
    for number, status, seconds in _run(campaign, [-1], 600.0):
        if status not in (PASSED, NOT_REACHED):
            text = (folder / f"log{number}").read_text(errors="replace")
            sys.exit(f"{kernel}: its own tests fail before anything is changed:\n{text}")
        limit = 10 * seconds + 30
    for done, (number, status, seconds) in enumerate(_run(campaign, list(numbered), limit), 1):
        outcome = _judge(campaign, number, status, seconds)
        mutant = outcome.mutant
        print(
            f"[{done}/{len(numbered)}] {kernel} {mutant.kind} {mutant.path}:{mutant.line}: "
            f"{outcome.verdict} ({outcome.how}, {seconds:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
        yield outcome


def _shared(kernels: Path, kernel: str) -> frozenset[Path]:
    """Return the files of a kernel that others include too."""
    others = {path.stem for path in kernels.glob("*.cpp")} - {kernel}
    theirs = {file for other in others for file in mutations.files_of(kernels, other)}
    return frozenset(theirs.intersection(mutations.files_of(kernels, kernel)))


def _compile(
    kernels: Path, kernel: str, mutants: dict[int, Mutant], folder: Path
) -> tuple[Path, list[int]]:
    """Build one library with all mutants; return it, and the numbers of those that do not compile.

    Where a number must be a constant, the line that the compiler names is left as it was.
    """
    from ascend_plugin.ops.ascendc import build

    sources, left, refused = folder / "kernels", dict(mutants), list[int]()
    (folder / "build").mkdir()
    for model in build.cache_folder().glob("model-*"):  # the host model, which no mutant changes
        (folder / "build" / model.name).symlink_to(model)
    os.environ[KERNELS_VARIABLE] = str(sources)
    os.environ[BUILD_VARIABLE] = str(folder / "build")
    while True:
        shutil.rmtree(sources, ignore_errors=True)
        shutil.copytree(kernels, sources)
        (sources / mutations.HEADER).write_text(mutations.HEADER_TEXT, encoding="utf-8")
        for path in {each.path for each in left.values()} | {Path(f"{kernel}.cpp")}:
            some = [(number, each) for number, each in left.items() if each.path == path]
            text = (sources / path).read_text(encoding="utf-8")
            (sources / path).write_text(mutations.instrument(text, some), encoding="utf-8")
        try:
            return build.library_path(kernel), refused
        except build.KernelBuildError as error:
            places = re.findall(r"([\w.]+):(\d+):\d+: error:", str(error))
            wrong = [
                number
                for number, each in left.items()
                if any((each.path.name, str(line)) in places for line in _lines_of(each, kernels))
            ]
            if not wrong:
                sys.exit(f"{kernel} does not compile with its mutants:\n{error}")
            for number in wrong:
                del left[number]
            refused += wrong


def _lines_of(mutant: Mutant, kernels: Path) -> set[int]:
    text = (kernels / mutant.path).read_text(encoding="utf-8")
    return {text.count("\n", 0, wrap.start) + 1 for wrap in mutant.wraps}


def _run(
    campaign: Campaign, numbers: Sequence[int], limit: float
) -> Iterator[tuple[int, int, float]]:
    """Test mutants, some at a time; yield number, exit status and seconds of each."""
    waiting, running = list(numbers), dict[int, tuple[int, float]]()
    while waiting or running:
        while waiting and len(running) < campaign.jobs:
            number = waiting.pop(0)
            running[_start(campaign, number)] = (number, time.monotonic())
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            for child, (_, start) in running.items():
                if time.monotonic() - start > limit:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
            continue
        number, start = running.pop(pid)
        yield number, os.waitstatus_to_exitcode(status), time.monotonic() - start


def _start(campaign: Campaign, number: int) -> int:
    """Fork a process that tests a mutant; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = FAILED
        try:
            status = _test(campaign, number)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def _test(campaign: Campaign, number: int) -> int:
    """Run the tests on a mutant; in a process of its own."""
    log = os.open(campaign.folder / f"log{number}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ[MUTANT_VARIABLE] = str(number)
    import pytest

    from ascend_plugin.ops.ascendc import build

    def library_path(name: str, folder: Path | None = None) -> Path:
        return campaign.library if name == campaign.kernel else compiled(name, folder)

    # The library is not looked up again: its sources may be edited meanwhile.
    compiled = build.library_path
    build.library_path = library_path
    quiet = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    status = int(pytest.main([str(campaign.tests), "-k", campaign.select, *quiet]))
    library = ctypes.CDLL(str(campaign.library))
    reached = ctypes.c_int.in_dll(library, "ascendc_mutant_reached").value
    return NOT_REACHED if status == PASSED and not reached else status


def _judge(campaign: Campaign, number: int, status: int, seconds: float) -> Outcome:
    """Say what a process' exit status means."""
    text = (campaign.folder / f"log{number}").read_text(errors="replace")
    if status == NOT_REACHED and campaign.mutants[number].path in campaign.shared:
        verdict, how = "not used", "not reached"
    elif status in (PASSED, NOT_REACHED):
        verdict, how = "survived", "not reached" if status == NOT_REACHED else "tests pass"
    elif status == FAILED:
        verdict, how = "killed", next(iter(_lines(text, "Error", "assert")), "a test fails")
    elif status < 0:
        verdict, how = "killed", signal.Signals(-status).name
    else:
        sys.exit(f"{campaign.kernel}: pytest ended with status {status}:\n{text}")
    return Outcome(campaign.kernel, campaign.mutants[number], verdict, how, seconds)


def _lines(text: str, *words: str) -> Iterator[str]:
    for line in text.splitlines():
        if any(word in line for word in words):
            yield line.strip()[-400:][:200]


def summarise(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Count outcomes per kernel and kind, and list the survivors."""
    kernels: dict[str, dict[str, Counter[str]]] = {}
    for each in outcomes:
        kinds = kernels.setdefault(each.kernel, {})
        kinds.setdefault(each.mutant.kind, Counter())[each.verdict] += 1
    judged = [
        each.verdict
        for each in outcomes
        if each.mutant.kind in mutations.SYNCHRONISATION and each.verdict in ("killed", "survived")
    ]
    return {
        "kernels": {
            name: {k: dict(v) for k, v in kinds.items()} for name, kinds in kernels.items()
        },
        "synchronisation_mutants": len(judged),
        "synchronisation_percent": 100.0 * judged.count("killed") / max(1, len(judged)),
        "survivors": [_row(each) for each in outcomes if each.verdict == "survived"],
        "not_tried": [_row(each) for each in outcomes if each.verdict == "not tried"],
        "how": [_row(each) | {"verdict": each.verdict} for each in outcomes],
    }


def _row(outcome: Outcome) -> dict[str, object]:
    fields = asdict(outcome.mutant)
    del fields["wraps"]
    return {"kernel": outcome.kernel, **fields, "path": str(fields["path"]), "how": outcome.how}


def _text(report: dict[str, object]) -> str:
    """Return a report for people."""
    lines = []
    kernels = report["kernels"]
    assert isinstance(kernels, dict)
    for name, kinds in kernels.items():
        for kind, counts in kinds.items():
            numbers = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
            lines.append(f"{name:24} {kind:12} {numbers}")
    survivors = report["survivors"]
    assert isinstance(survivors, list)
    lines += [f"survived: {s['path']}:{s['line']} {s['kind']}: {s['what']}" for s in survivors]
    percent = report["synchronisation_percent"]
    total = report["synchronisation_mutants"]
    lines.append(f"synchronisation: {percent:.1f} % of {total} killed")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
