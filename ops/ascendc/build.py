"""Compiles AscendC kernels against the host model: one shared library per kernel file, cached."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..native.build import NativeBuildError, find_compiler

MODEL_DIR = Path(__file__).resolve().parent / "host"
KERNEL_DIR = Path(__file__).resolve().parent / "kernels"

#: Build variables: another folder of kernels, another cache of libraries.
KERNELS_VARIABLE = "ASCENDC_KERNELS_DIR"
CACHE_VARIABLE = "ASCENDC_BUILD_DIR"

#: No contraction: results must not depend on which multiply-adds the compiler fuses.
FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
)
#: Kernels are compiled often and spend little time themselves; the model is compiled once.
KERNEL_OPTIMISATION = "-O1"
MODEL_OPTIMISATION = "-O3"
#: Conversions of half need it to be fast; every x86-64 of the last ten years has it.
X86_FLAGS = ("-mavx2", "-mf16c")

#: Values of ``TaskType`` in host/model/machine.h.
TASK_TYPES = {
    "KERNEL_TYPE_AIV_ONLY": "AIV_ONLY",
    "KERNEL_TYPE_AIC_ONLY": "AIC_ONLY",
    "KERNEL_TYPE_MIX_AIV_1_0": "MIX_AIV_1_0",
    "KERNEL_TYPE_MIX_AIC_1_0": "MIX_AIC_1_0",
    "KERNEL_TYPE_MIX_AIC_1_1": "MIX_AIC_1_1",
    "KERNEL_TYPE_MIX_AIC_1_2": "MIX_AIC_1_2",
}
#: Arguments that an entry point may take.
ARGUMENT_TYPES = (
    "GM_ADDR",
    "uint64_t",
    "int64_t",
    "uint32_t",
    "int32_t",
    "uint16_t",
    "int16_t",
    "uint8_t",
    "int8_t",
    "bool",
    "float",
    "double",
)

_MARK = "ascendc_entry_point"
_ENTRY = re.compile(
    rf'extern\s+"C"\s+{_MARK}\s+void\s+(?P<name>\w+)\s*\((?P<arguments>[^)]*)\)\s*\{{'
)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_TASK_TYPE = re.compile(r"KERNEL_TASK_TYPE_DEFAULT\s*\(\s*(\w+)\s*\)")


class KernelBuildError(RuntimeError):
    """A kernel could not be compiled against the host model; the message says why."""


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """An entry point of a kernel file.

    Attributes:
        name: of the function.
        task_type: a value of ``TASK_TYPES``.
        arguments: pairs of type and name.
    """

    name: str
    task_type: str
    arguments: tuple[tuple[str, str], ...]


def kernel_folder() -> Path:
    """Folder of the kernels: ``$ASCENDC_KERNELS_DIR`` or the package's own."""
    chosen = os.environ.get(KERNELS_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else KERNEL_DIR


def cache_folder() -> Path:
    """Folder of the compiled libraries: ``$ASCENDC_BUILD_DIR`` or one below the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "ascend-plugin", "ascendc")


def library_path(name: str, folder: Path | None = None) -> Path:
    """Return the shared library of ``<name>.cpp``, compiled if it is not yet.

    It exports ``aclrtlaunch_<entry point>`` and what ``host`` calls. The cache is keyed by the hash
    of the kernel, the headers it includes, the model, the compiler's name and the flags.

    Args:
        name: stem of the kernel file.
        folder: folder of the kernel; ``kernel_folder()`` when None.

    Raises:
        KernelBuildError: no such kernel, no compiler, an entry point that cannot be launched, or an
            error of the compiler.
    """
    source = (folder or kernel_folder()) / f"{name}.cpp"
    if not source.is_file():
        known = ", ".join(sorted(path.stem for path in source.parent.glob("*.cpp"))) or "none"
        raise KernelBuildError(f"no kernel {name!r} in {source.parent}; there are: {known}")
    compiler = _compiler()
    target = cache_folder() / f"{name}-{_hash(source, compiler)}.so"
    if not target.is_file():
        with _lock():
            if not target.is_file():
                _build(compiler, source, target)
    return target


def entry_points(source: Path) -> list[EntryPoint]:
    """Entry points of a kernel file, in the order of the text, macros expanded.

    Args:
        source: the kernel file.

    Raises:
        KernelBuildError: an argument or task type that cannot be launched, or no entry point.
    """
    text = _preprocess(_compiler(), source)
    found = [_entry_point(text, match) for match in _ENTRY.finditer(text)]
    if not found:
        raise KernelBuildError(
            f'{source.name} has no entry point: extern "C" __global__ __aicore__ void name(...)'
        )
    return found


def _entry_point(text: str, match: re.Match[str]) -> EntryPoint:
    name = match["name"]
    arguments = []
    for declaration in filter(None, (part.strip() for part in match["arguments"].split(","))):
        kind, _, argument = declaration.rpartition(" ")
        kind = kind.replace("const", "").strip()
        if kind not in ARGUMENT_TYPES:
            raise KernelBuildError(
                f"{name}: argument {declaration!r}; the types that can be launched are "
                f"{', '.join(ARGUMENT_TYPES)}"
            )
        arguments.append((kind, argument))
    stated = _TASK_TYPE.search(text, match.end(), _end_of_body(text, match.end()))
    task_type = stated[1] if stated else "KERNEL_TYPE_AIV_ONLY"
    if task_type not in TASK_TYPES:
        raise KernelBuildError(
            f"{name}: KERNEL_TASK_TYPE_DEFAULT({task_type}); known are {', '.join(TASK_TYPES)}"
        )
    return EntryPoint(name, TASK_TYPES[task_type], tuple(arguments))


def _end_of_body(text: str, start: int) -> int:
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return len(text)


def _compiler() -> list[str]:
    try:
        return find_compiler()
    except NativeBuildError as error:
        raise KernelBuildError(str(error)) from None


def _flags() -> tuple[str, ...]:
    return FLAGS + X86_FLAGS if os.uname().machine == "x86_64" else FLAGS


def _model_sources() -> list[Path]:
    return sorted((MODEL_DIR / "model").glob("*.cpp"))


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _model_digest(compiler: tuple[str, ...]) -> str:
    """Hash of what every library depends on; read once, so edit the model between processes."""
    options = repr((compiler, _flags(), KERNEL_OPTIMISATION, MODEL_OPTIMISATION))
    return hashlib.sha256(
        (options + _digest([Path(__file__), *_model_files()])).encode()
    ).hexdigest()


def _model_files() -> list[Path]:
    return sorted(path for path in MODEL_DIR.rglob("*") if path.suffix in (".h", ".cpp"))


def _hash(source: Path, compiler: Sequence[str]) -> str:
    kernel = _digest(_own_files(source))
    return hashlib.sha256((kernel + _model_digest(tuple(compiler))).encode()).hexdigest()[:16]


def _own_files(source: Path) -> list[Path]:
    """The kernel file and the headers of its folder that it includes, however deep."""
    found = [source]
    for path in found:
        for name in _INCLUDE.findall(path.read_text()):
            header = source.parent / name
            if header.is_file() and header not in found:
                found.append(header)
    return found


def _preprocess(compiler: Sequence[str], source: Path) -> str:
    """The kernel file after the preprocessor, with marked entry points and without the model."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "kernel_operator.h").write_text("")
        command = [
            *compiler, "-E", "-P", "-std=c++17", f"-D__global__={_MARK}", "-D__aicore__=",
            "-I", scratch, str(source),
        ]  # fmt: skip
        return _run(command, source.name)


def _run(command: Sequence[str], what: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise KernelBuildError(
            f"compiling {what} against the host model failed (exit {result.returncode})\n"
            f"$ {shlex.join(command)}\n{result.stderr.strip()}"
        )
    return result.stdout


def _build(compiler: Sequence[str], source: Path, target: Path) -> None:
    entries = entry_points(source)
    model = _model_archive(compiler)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        glue = Path(scratch, "entries.cpp")
        glue.write_text(_glue(source, entries))
        made = Path(scratch, target.name)
        options = [*_flags(), KERNEL_OPTIMISATION, "-shared"]
        folders = ["-I", str(MODEL_DIR), "-I", str(source.parent)]
        inputs = [str(glue), *map(str, model), "-ldl"]
        command = [*compiler, *options, *folders, *inputs, "-o", str(made)]
        _run(command, source.name)
        made.replace(target)


def _model_archive(compiler: Sequence[str]) -> list[Path]:
    """Object files of the model, compiled once for all kernels."""
    folder = cache_folder() / f"model-{_model_digest(tuple(compiler))[:16]}"
    objects = [folder / f"{path.stem}.o" for path in _model_sources()]
    command = [*compiler, *_flags(), MODEL_OPTIMISATION, "-c"]
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".model-") as scratch:
            made = Path(scratch, "objects")
            made.mkdir()
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                jobs = [
                    pool.submit(
                        _run, [*command, str(path), "-o", str(made / target.name)], path.name
                    )
                    for path, target in zip(_model_sources(), objects, strict=True)
                ]
                for job in jobs:
                    job.result()
            made.rename(folder)
    return objects


def _glue(source: Path, entries: Sequence[EntryPoint]) -> str:
    lines = [f'#include "{source}"', '#include "model/launch.h"', "", "namespace ascendc_host {"]
    for entry in entries:
        values = ", ".join(
            f"argument<{kind}>(words[{index}])" for index, (kind, _) in enumerate(entry.arguments)
        )
        lines += [
            f"static void run_entry_{entry.name}([[maybe_unused]] const uint64_t* words) {{",
            f"  {entry.name}({values});",
            "}",
        ]
    lines.append("const Entry ENTRIES[] = {")
    for entry in entries:
        signature = ",".join(f"{kind} {name}" for kind, name in entry.arguments)
        lines.append(
            f'    {{"{entry.name}", TaskType::{entry.task_type}, "{signature}", '
            f"{len(entry.arguments)}, run_entry_{entry.name}}},"
        )
    lines += ["};", f"const int ENTRY_COUNT = {len(entries)};", "}  // namespace ascendc_host", ""]
    for index, entry in enumerate(entries):
        lines += _stream_launch(index, entry)
    return "\n".join(lines) + "\n"


def _stream_launch(index: int, entry: EntryPoint) -> list[str]:
    """The function that the vendor's build makes for an entry point, for the simulated NPU."""
    declared = "".join(f", {kind} {name}" for kind, name in entry.arguments)
    words = ", ".join(f"ascendc_host::word({name})" for _, name in entry.arguments)
    return [
        'extern "C" __attribute__((visibility("default"))) uint32_t',
        f"aclrtlaunch_{entry.name}(uint32_t block_dim, void* stream{declared}) {{",
        f"  const uint64_t words[] = {{{words or '0'}}};",
        f"  return ascendc_host::launch_on_stream(ascendc_host::ENTRIES[{index}], block_dim, "
        "stream, words);",
        "}",
    ]


@contextmanager
def _lock() -> Iterator[None]:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise KernelBuildError(
            f"the cache folder {folder} cannot be written ({error}); set {CACHE_VARIABLE} to a "
            "folder that can."
        ) from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
