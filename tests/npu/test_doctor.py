"""``ascend-plugin doctor`` where there is an NPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    """What the doctor says here, by name of the check."""
    command = [sys.executable, "-m", "ascend_plugin.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return {row["name"]: row for row in json.loads(done.stdout)["rows"]}


def test_the_platform_is_that_of_an_npu(rows: dict[str, dict[str, str]]) -> None:
    assert rows["device"]["detail"].startswith("npu: torch_npu sees")
    assert rows["platform that vLLM chooses"]["detail"].endswith(".npu.AscendNPUPlatform")


@pytest.mark.parametrize("pages", ["bf16", "fp16", "c8d", "c8s", "c8p"])
def test_every_kind_of_page_has_its_path_and_the_reason(
    rows: dict[str, dict[str, str]], pages: str
) -> None:
    """The same choice as an engine's, or why the NPU refuses."""
    from ascend_plugin.cli.doctor.npu_operators import _requests
    from ascend_plugin.ops.dispatch import UnsupportedRequestError

    asked = {label: each for label, *each in _requests() if f", {pages} pages" in label}
    names = {"paged_attention", "kv_cache_write"}
    names |= set() if pages == "c8p" else {"mla_attention", "mla_cache_write"}
    assert {label.split()[2].rstrip(",") for label in asked} == names
    for label, (operator, request) in asked.items():
        try:
            choice = operator.choose(request)
        except UnsupportedRequestError:
            assert rows[label]["status"] == "warning"
            assert rows[label]["detail"].startswith("refused: not ")
        else:
            assert rows[label]["status"] == "ok"
            wanted = f"{choice.implementation.name}: {choice.reason}"
            assert rows[label]["detail"].startswith(wanted)
            assert all(reason in rows[label]["detail"] for _, reason in choice.rejected)


def test_operators_without_a_choice_are_looked_for(
    rows: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ascend_plugin.cli.doctor import npu_operators

    assert rows["NPU operator SwiGLU"]["detail"].startswith("npu_swiglu of torch_npu ")
    monkeypatch.setitem(npu_operators._FIXED, "SwiGLU", ("npu_swiglu_of_tomorrow",))
    found = {row.name: row for row in npu_operators._check_fixed()}
    assert found["NPU operator SwiGLU"].status == "problem"
    assert "lacks npu_swiglu_of_tomorrow" in found["NPU operator SwiGLU"].detail
    assert found["NPU operator RMS norm"].status == "ok"
