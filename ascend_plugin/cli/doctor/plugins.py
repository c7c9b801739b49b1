"""Checks of vLLM's plugins: which are there, which are allowed, and which platform comes out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from ascend_plugin.cli.doctor.check import Check, ok
from ascend_plugin.cli.doctor.subprocesses import ask

PLATFORM_GROUP = "vllm.platform_plugins"
GENERAL_GROUP = "vllm.general_plugins"
OUR_PLATFORM, OUR_GENERAL = "ascend", "ascend_general"
ALLOW_OURS = f"VLLM_PLUGINS={OUR_PLATFORM},{OUR_GENERAL}"

_RESOLVE = """
from vllm.platforms import current_platform
kind = type(current_platform)
answer(f"{kind.__module__}.{kind.__qualname__}")
"""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point.

    Attributes:
        group: vLLM's plugin group.
        name: the name that ``VLLM_PLUGINS`` filters by.
        target: ``module:function``.
        distribution: the package that brings it.
    """

    group: str
    name: str
    target: str
    distribution: str

    @property
    def ours(self) -> bool:
        """Whether it is this plugin's."""
        return self.target.partition(":")[0].partition(".")[0] == "ascend_plugin"

    def __str__(self) -> str:
        """Name, target and package."""
        return f"{self.name} ({self.target}, from {self.distribution})"


def installed_plugins() -> list[Plugin]:
    """Return the entry points of the groups that matter for a platform."""
    return [
        Plugin(group, entry.name, entry.value, entry.dist.name if entry.dist else "unknown")
        for group in (PLATFORM_GROUP, GENERAL_GROUP)
        for entry in metadata.entry_points(group=group)
    ]


def allowed_plugins(environment: Mapping[str, str]) -> list[str] | None:
    """Return the names in ``VLLM_PLUGINS``; None: everything is allowed."""
    value = environment.get("VLLM_PLUGINS")
    return None if value is None else value.split(",")


def check_plugins(
    plugins: Sequence[Plugin], environment: Mapping[str, str] = os.environ
) -> list[Check]:
    """Check what is installed against what ``VLLM_PLUGINS`` and ``VLLM_TARGET_DEVICE`` allow."""
    allowed = allowed_plugins(environment)
    return [
        *_list_groups(plugins),
        *_check_installed(plugins),
        *_check_conflict(plugins, allowed),
        *_check_filter(allowed),
        *_check_target_device(environment),
    ]


def _list_groups(plugins: Sequence[Plugin]) -> list[Check]:
    rows = []
    for group in (PLATFORM_GROUP, GENERAL_GROUP):
        members = [str(plugin) for plugin in plugins if plugin.group == group]
        rows.append(ok(group, "; ".join(members) or "none"))
    return rows


def _check_installed(plugins: Sequence[Plugin]) -> list[Check]:
    present = {plugin.name for plugin in plugins if plugin.ours}
    missing = [name for name in (OUR_PLATFORM, OUR_GENERAL) if name not in present]
    if not missing:
        return []
    detail = f"ascend-plugin's entry points {', '.join(missing)} are not installed"
    remedy = "Install the plugin: pip install -e . in its checkout."
    return [Check("own entry points", "problem", detail, remedy)]


def _check_conflict(plugins: Sequence[Plugin], allowed: list[str] | None) -> list[Check]:
    """Look for a second platform from outside vLLM; vLLM refuses to choose between two."""
    name = "platform plugins"
    platforms = [
        plugin
        for plugin in plugins
        if plugin.group == PLATFORM_GROUP and (allowed is None or plugin.name in allowed)
    ]
    others = [plugin for plugin in platforms if not plugin.ours]
    if not others or len(platforms) < 2:
        return [ok(name, f"{len(platforms)} from outside vLLM is allowed to load")]
    listed = ", ".join(map(str, others))
    # vLLM keeps plugins in a dictionary by name.
    same_name = [plugin for plugin in others if plugin.name == OUR_PLATFORM]
    if same_name:
        packages = " ".join(plugin.distribution for plugin in same_name)
        detail = f"{listed} has this plugin's name: vLLM loads one of them, whichever comes last"
        remedy = f"VLLM_PLUGINS cannot tell them apart. Run: pip uninstall {packages}"
        return [Check(name, "problem", detail, remedy)]
    packages = " ".join(plugin.distribution for plugin in others)
    detail = (
        f"{listed} may load beside ascend-plugin; when both recognise this machine, vLLM stops "
        "with 'Only one platform plugin can be activated'"
    )
    remedy = (
        f"Set {ALLOW_OURS} (it filters every group of plugins, so both names are needed), "
        f"or run: pip uninstall {packages}"
    )
    return [Check(name, "problem", detail, remedy)]


def _check_filter(allowed: list[str] | None) -> list[Check]:
    name = "VLLM_PLUGINS"
    if allowed is None:
        return [ok(name, "not set: every plugin may load")]
    value = ",".join(allowed)
    missing = [plugin for plugin in (OUR_PLATFORM, OUR_GENERAL) if plugin not in allowed]
    if not missing:
        return [ok(name, value)]
    effect = {
        OUR_PLATFORM: "vLLM runs without this plugin's platform",
        OUR_GENERAL: "this plugin's patches of vLLM are not applied",
    }
    effects = ", ".join(effect[plugin] for plugin in missing)
    detail = f"{value!r} leaves out {' and '.join(missing)}: {effects}"
    names = ",".join([*filter(None, allowed), *missing])
    remedy = (
        f"Set VLLM_PLUGINS={names} (it filters every group of plugins, so both names are needed), "
        "or unset it."
    )
    return [Check(name, "problem", detail, remedy)]


def _check_target_device(environment: Mapping[str, str]) -> list[Check]:
    name = "VLLM_TARGET_DEVICE"
    value = environment.get(name)
    if value is None or value.lower() != "cpu":
        return [ok(name, f"{value!r}" if value else "not set")]
    detail = "is 'cpu': vLLM takes its own CPU platform and asks no plugin"
    return [Check(name, "problem", detail, "Unset VLLM_TARGET_DEVICE; it is for building vLLM.")]


def check_resolved_platform(expected: str, environment: Mapping[str, str | None]) -> list[Check]:
    """Let vLLM choose its platform in a fresh process.

    Args:
        expected: qualified name of the platform class that this plugin names here.
        environment: what that process must find as the user set it.
    """
    name = "platform that vLLM chooses"
    reply = ask(_RESOLVE, environment)
    if reply.text == expected:
        return [ok(name, expected)]
    if reply.text is None:
        detail = f"none: {reply.error}"
        remedy = "Solve the problems above; then run: python -c 'import vllm.platforms'"
    else:
        detail = f"{reply.text}, not {expected}: vLLM runs without this plugin"
        remedy = f"Solve the problems above; {ALLOW_OURS} admits this plugin alone."
    return [Check(name, "problem", detail, remedy)]
