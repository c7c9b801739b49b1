"""Checks of the device: NPU or CPU, and whether torch survives finding out."""

from __future__ import annotations

from importlib import metadata

from ascend_plugin.cli.doctor.check import Check, ok
from ascend_plugin.cli.doctor.subprocesses import ask
from ascend_plugin.device import DetectedDevice

AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def check_device(detected: DetectedDevice) -> list[Check]:
    """Say what runs here and why."""
    detail = f"{detected.kind}: {detected.reason}"
    if not detected.broken:
        return [ok("device", detail)]
    remedy = (
        "For the NPU: install the CANN toolkit and source its set_env.sh, then check npu-smi info. "
        "For the CPU: pip uninstall torch-npu, or set ASCEND_PLUGIN_DEVICE=cpu."
    )
    return [Check("device", "warning", detail, remedy)]


def check_torch_import(users_autoload: str | None) -> list[Check]:
    """Import torch as users do: torch imports every installed device backend by itself.

    Args:
        users_autoload: value of ``TORCH_DEVICE_BACKEND_AUTOLOAD`` in the user's environment.
    """
    name = "import torch"
    backends = sorted(entry.name for entry in metadata.entry_points(group="torch.backends"))
    reply = ask("import torch; answer(torch.__version__)", {AUTOLOAD_VARIABLE: users_autoload})
    if reply.text is not None:
        loaded = f", with the backends {', '.join(backends)}" if backends else ""
        return [ok(name, f"{reply.text}{loaded}")]
    without = ask("import torch; answer(torch.__version__)", {AUTOLOAD_VARIABLE: "0"})
    if without.text is None:
        detail = f"fails: {without.error}"
        return [Check(name, "problem", detail, "Install the tested version of torch again.")]
    detail = (
        f"fails ({reply.error}): torch imports the installed backend {', '.join(backends)} by "
        "itself, and that one is broken"
    )
    remedy = (
        f"Set {AUTOLOAD_VARIABLE}=0 in the environment, or pip uninstall torch-npu, or repair it "
        "(CANN toolkit, set_env.sh)."
    )
    return [Check(name, "problem", detail, remedy)]
