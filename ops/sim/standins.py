"""Builds the stand-ins: one library with every symbol, and empty ones that depend on it.

The library of every symbol is ``libascendcl.so``, compiled from

* ``csrc``: the runtime, against the headers in the wheel, so signatures are checked;
* one assembly stub per aclnn operator: phase one jumps into the operator's Python function, phase
  two enqueues;
* one function for each symbol that is left: it fails and says its name.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import SimulatorBuildError
from .symbols import Needs, phase_one

SOURCE_DIR = Path(__file__).resolve().parent / "csrc"
CORE_LIBRARY = "libascendcl.so"
_FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-Werror=return-type")
_CORE_LINKS = ("-ldl", "-lpthread", "-lrt")

_ASSEMBLY_HEAD = """\
.section .note.GNU-stack,"",@progbits
.text
// An operator that has no function yet: ask the runtime for one, with the arguments kept.
resolve_and_call:
  pushq %rdi; pushq %rsi; pushq %rdx; pushq %rcx; pushq %r8; pushq %r9
  subq $136, %rsp
  movups %xmm0, 0(%rsp); movups %xmm1, 16(%rsp); movups %xmm2, 32(%rsp); movups %xmm3, 48(%rsp)
  movups %xmm4, 64(%rsp); movups %xmm5, 80(%rsp); movups %xmm6, 96(%rsp); movups %xmm7, 112(%rsp)
  movq %r10, %rdi
  call sim_resolve@PLT
  movups 0(%rsp), %xmm0; movups 16(%rsp), %xmm1; movups 32(%rsp), %xmm2; movups 48(%rsp), %xmm3
  movups 64(%rsp), %xmm4; movups 80(%rsp), %xmm5; movups 96(%rsp), %xmm6; movups 112(%rsp), %xmm7
  addq $136, %rsp
  popq %r9; popq %r8; popq %rcx; popq %rdx; popq %rsi; popq %rdi
  testq %rax, %rax
  jz 1f
  jmp *%rax
1: movl $561103, %eax
  ret
"""


def build_standins(needs: Needs, include: Path, target: Path) -> None:
    """Compile all stand-ins into ``target``.

    Args:
        needs: what the wheel needs.
        include: folder of the wheel's C headers.
        target: an empty folder; objects are left in ``target/objects``.

    Raises:
        SimulatorBuildError: no compiler, or it failed.
    """
    objects = target / "objects"
    objects.mkdir(parents=True)
    gxx = _compiler()
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    if not sources:
        raise SimulatorBuildError(f"no sources in {SOURCE_DIR}; the package is incomplete.")
    headers = [f"-I{include}", f"-I{include / 'third_party' / 'hccl' / 'inc'}"]
    jobs = [
        [*gxx, *_FLAGS, *headers, "-c", str(source), "-o", str(objects / f"{source.stem}.o")]
        for source in sources
    ]
    # Two at a time: the compiler takes up to half a gigabyte for these headers.
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        list(pool.map(_run, jobs))
    runtime = [objects / f"{source.stem}.o" for source in sources]
    defined = _defined(runtime)
    assembly, stubs = objects / "operators.S", objects / "unsimulated.cpp"
    assembly.write_text(operator_assembly(needs.operators))
    stubs.write_text(unsimulated_source(needs, defined))
    generated = [str(assembly), str(stubs), *map(str, runtime)]
    core = target / CORE_LIBRARY
    _run([*gxx, *_FLAGS, "-shared", f"-Wl,-soname,{CORE_LIBRARY}", *generated, *_CORE_LINKS,
          "-o", str(core)])  # fmt: skip
    _build_empty_libraries(gxx, needs.libraries, core, target)


def operator_assembly(operators: Sequence[str]) -> str:
    """Return the assembly of all operators' entry points and of the tables that name them."""
    lines = [_ASSEMBLY_HEAD]
    for index, name in enumerate(operators):
        first = phase_one(name)
        lines.append(
            f".globl {first}\n{first}: movq sim_slots+{8 * index}(%rip), %r11\n"
            f"  movl ${index}, %r10d\n  testq %r11, %r11\n  jz resolve_and_call\n  jmp *%r11"
        )
        if first != name:
            lines.append(f".globl {name}\n{name}: movl ${index}, %r8d\n  jmp sim_launch@PLT")
    hidden = "\n".join(
        f".globl {name}\n.hidden {name}" for name in ("sim_slots", "sim_names", "sim_count")
    )
    lines += [".data", ".balign 8", hidden, "sim_slots:", f".zero {8 * len(operators)}"]
    lines += [f"sim_count: .quad {len(operators)}", "sim_names:"]
    lines += [f".quad name_{index}" for index in range(len(operators))]
    lines += [f'name_{index}: .asciz "{name}"' for index, name in enumerate(operators)]
    return "\n".join(lines) + "\n"


def unsimulated_source(needs: Needs, defined: set[str]) -> str:
    """Return C++ for the symbols that the runtime does not define.

    A C function returns an error code after the runtime has kept its name for
    ``aclGetRecentErrMsg``. A C++ function of the graph engine may return anything, so it ends the
    process instead of handing out garbage.
    """
    lines = [
        'extern "C" long sim_unsimulated(const char *name);',
        'extern "C" long sim_unsimulated_abort(const char *name);',
    ]
    for name in needs.functions:
        if name not in defined:
            ends = name.startswith("_Z") and not name.startswith(("_ZN3atb", "_ZNK3atb"))
            call = "sim_unsimulated_abort" if ends else "sim_unsimulated"
            lines.append(f'extern "C" long {name}() {{ return {call}("{name}"); }}')
    lines += [
        f'extern "C" char {name}[8192]; char {name}[8192];'
        for name in needs.objects
        if name not in defined
    ]
    return "\n".join(lines) + "\n"


def _build_empty_libraries(
    gxx: Sequence[str], libraries: Sequence[str], core: Path, target: Path
) -> None:
    """``dlsym`` on the handle of a library also searches what that library depends on."""
    empty = target / "objects" / "empty.cpp"
    empty.write_text("")
    for name in libraries:
        if name != CORE_LIBRARY:
            _run([*gxx, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-Wl,--no-as-needed",
                  str(empty), str(core), "-o", str(target / name)])  # fmt: skip


def _defined(objects: Sequence[Path]) -> set[str]:
    done = subprocess.run(
        ["nm", "-g", "--defined-only", *map(str, objects)],
        capture_output=True,
        text=True,
        check=False,
    )
    return {line.split()[-1] for line in done.stdout.splitlines() if len(line.split()) == 3}


def _compiler() -> list[str]:
    configured = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(configured[0]) is None:
        raise SimulatorBuildError(
            f"the C++ compiler {configured[0]!r} is not installed; the simulated NPU is compiled "
            "on this machine. Install g++ (Debian: apt-get install g++) or set CXX."
        )
    return configured


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SimulatorBuildError(
            f"compiling the simulated NPU failed (exit {done.returncode}); g++ 12 is tested\n"
            f"$ {shlex.join(command)}\n{done.stderr.strip()}"
        )
