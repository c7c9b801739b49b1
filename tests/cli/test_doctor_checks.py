"""The doctor's checks one by one."""

from __future__ import annotations

import sys

import pytest

from ascend_plugin.cli.doctor import hardware, operators, plugins
from ascend_plugin.cli.doctor.plugins import GENERAL_GROUP, PLATFORM_GROUP, Plugin
from ascend_plugin.cli.doctor.subprocesses import ask
from ascend_plugin.ops import dispatch
from ascend_plugin.ops.native.loader import IsaStatus

OURS = [
    Plugin(PLATFORM_GROUP, "ascend", "ascend_plugin:register_platform", "ascend-plugin"),
    Plugin(GENERAL_GROUP, "ascend_general", "ascend_plugin:register_general", "ascend-plugin"),
]


def _problems(environment, installed=OURS):
    rows = plugins.check_plugins(installed, environment)
    return {row.name: row for row in rows if row.status != "ok"}


def test_our_plugins_alone_are_fine():
    assert _problems({}) == {}
    assert _problems({"VLLM_PLUGINS": "ascend,ascend_general,other"}) == {}


@pytest.mark.parametrize(
    "value, missing, remedy",
    [
        ("ascend", "ascend_general", "VLLM_PLUGINS=ascend,ascend_general"),
        ("ascend_general", "ascend", "VLLM_PLUGINS=ascend_general,ascend"),
        ("other", "ascend and ascend_general", "VLLM_PLUGINS=other,ascend,ascend_general"),
        ("", "ascend and ascend_general", "VLLM_PLUGINS=ascend,ascend_general"),
    ],
)
def test_a_filter_without_our_names(value, missing, remedy):
    row = _problems({"VLLM_PLUGINS": value})["VLLM_PLUGINS"]
    assert row.status == "problem"
    assert f"leaves out {missing}:" in row.detail
    assert remedy in row.remedy


def test_a_filter_resolves_a_conflict():
    rival = Plugin(PLATFORM_GROUP, "rival", "rival:register", "rival-package")
    assert "platform plugins" in _problems({}, [*OURS, rival])
    allowed = {"VLLM_PLUGINS": "ascend,ascend_general"}
    assert "platform plugins" not in _problems(allowed, [*OURS, rival])


def test_a_rival_with_our_name_cannot_be_filtered():
    # The real vllm-ascend registers "ascend" as well.
    rival = Plugin(PLATFORM_GROUP, "ascend", "vllm_ascend:register", "vllm-ascend")
    row = _problems({"VLLM_PLUGINS": "ascend,ascend_general"}, [*OURS, rival])["platform plugins"]
    assert "whichever comes last" in row.detail
    assert "pip uninstall vllm-ascend" in row.remedy


def test_a_target_device_that_skips_plugins():
    row = _problems({"VLLM_TARGET_DEVICE": "cpu"})["VLLM_TARGET_DEVICE"]
    assert "Unset VLLM_TARGET_DEVICE" in row.remedy


def test_missing_entry_points():
    assert "ascend_general" in _problems({}, OURS[:1])["own entry points"].detail


def test_instruction_sets():
    statuses = [
        IsaStatus("avx512", True, False, "this processor does not have it"),
        IsaStatus("avx2", True, True, ""),
        IsaStatus("portable", False, False, "missing"),
    ]
    rows = {row.name: row for row in hardware.check_instruction_sets(statuses, "avx2")}
    assert rows["instruction set avx512"].detail.startswith("built, but cannot run: this")
    assert rows["instruction set avx2"].detail == "chosen"
    assert rows["instruction set portable"].detail.startswith("not built")
    nothing = hardware.check_instruction_sets(statuses[:1], None)
    assert nothing[-1].status == "problem"


@pytest.mark.parametrize("setting, status", [("madvise", "ok"), ("never", "warning")])
def test_huge_pages(setting, status):
    assert hardware.check_huge_pages(setting)[0].status == status
    assert hardware.check_huge_pages(None)[0].status == "warning"


def test_preload_names_what_is_missing(tmp_path):
    there = tmp_path / "lib.so"
    there.touch()
    assert hardware.check_preload({"LD_PRELOAD": str(there)})[0].status == "ok"
    row = hardware.check_preload({"LD_PRELOAD": f"{there}:{tmp_path}/gone.so"})[0]
    assert (row.status, "gone.so does not exist" in row.detail) == ("warning", True)


def test_a_missing_compiler():
    row = hardware.check_compiler({"CXX": "no-such-compiler"})[0]
    assert row.status == "warning"
    assert "--enforce-eager" in row.remedy


def test_operators_on_the_reference_are_a_warning():
    before = dispatch.policy()
    dispatch.set_policy("reference")
    try:
        rows = operators.check_operators()
    finally:
        dispatch.set_policy(before)
    assert {row.status for row in rows} == {"warning"}
    assert all("not native: the policy asks for 'reference'" in row.detail for row in rows)


def test_a_question_to_another_process():
    assert ask("answer(1 + 1)").text == "2"
    failed = ask("raise SystemError('broken build')")
    assert (failed.text, failed.error) == (None, "SystemError: broken build")
    assert ask("import time; time.sleep(60)", timeout=0.5).error == "no answer within 0.5 seconds"
    assert ask(f"import sys; answer(sys.executable == {sys.executable!r})").text == "True"
    assert ask("import os; answer(os.environ.get('HOME'))", {"HOME": None}).text == "None"
