"""All checks in the order of the table."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from ascend_plugin.bench import machine
from ascend_plugin.cli.doctor import (
    device,
    hardware,
    npu_operators,
    operators,
    packages,
    plugins,
)
from ascend_plugin.cli.doctor.check import Check

Report = Callable[[str], None]


def collect(report: Report) -> tuple[list[Check], str | None]:
    """Run every check.

    Args:
        report: called with a line before each slow step.

    Returns:
        The rows, and the instruction set of the native kernels (None: none runs).
    """
    users_autoload = os.environ.get(device.AUTOLOAD_VARIABLE)
    # This process must survive a broken torch_npu to report it; others are asked separately.
    os.environ[device.AUTOLOAD_VARIABLE] = "0"
    report("versions")
    rows = [*packages.check_tested_versions(), *packages.check_torch_build()]
    report("importing torch in a fresh process")
    rows += device.check_torch_import(users_autoload)
    rows += packages.check_torch_companions()
    kind, device_rows = _device(report)
    rows += packages.check_vllm_metadata(kind) + device_rows
    rows += hardware.check_processor()
    report("kernels")
    kernel_rows, isa = _kernels()
    rows += kernel_rows
    if kind == "npu":
        report("operators of the NPU")
        rows += npu_operators.check_npu_operators()
    rows += plugins.check_plugins(plugins.installed_plugins())
    report("letting vLLM choose its platform in a fresh process")
    rows += plugins.check_resolved_platform(
        _expected_platform(), {device.AUTOLOAD_VARIABLE: users_autoload}
    )
    rows += hardware.check_huge_pages(machine.huge_pages())
    rows += hardware.check_preload()
    rows += hardware.check_compiler()
    return rows, isa


def _device(report: Report) -> tuple[Literal["cpu", "npu"], list[Check]]:
    from ascend_plugin.device import detect_device

    report("looking for NPUs")
    detected = detect_device()
    return detected.kind, device.check_device(detected)


def _expected_platform() -> str:
    from ascend_plugin import register_platform

    return register_platform()


def _kernels() -> tuple[list[Check], str | None]:
    """Check the libraries and the operators' choices; both need torch in this process."""
    try:
        from ascend_plugin.ops.native import loader
    except Exception as error:  # torch may be missing or broken in many ways
        row = Check("operators", "problem", f"cannot be imported: {error}", "Repair torch first.")
        return [row], None
    try:
        isa = loader.load().isa
    except loader.NativeLibraryError:
        isa = None
    rows = hardware.check_instruction_sets(loader.status(), isa)
    return rows + operators.check_operators(), isa
