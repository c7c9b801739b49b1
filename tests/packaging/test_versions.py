"""ascend_plugin.versions against real distribution folders."""

from __future__ import annotations

import tomllib

import pytest
from installed import write_metadata
from processes import run_python

from ascend_plugin import versions

PROBLEMS = """
import sys
from ascend_plugin.versions import check_versions
for problem in check_versions():
    print(problem.name, problem.installed, problem.tested, "|", problem)
assert "torch" not in sys.modules and "vllm" not in sys.modules
"""


@pytest.fixture
def problems_with(tmp_path):
    """Ask a fresh process that finds these distributions first."""

    def ask(**distributions: str) -> list[str]:
        for name, version in distributions.items():
            write_metadata(tmp_path, name, version)
        done = run_python(PROBLEMS, path=(tmp_path,))
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return ask


def test_this_environment_is_the_tested_one():
    assert versions.check_versions() == []


def test_installed_covers_every_tested_name(repository):
    text = (repository / "ascend_plugin" / "tested_versions.toml").read_text()
    tested, installed = versions.tested_versions(), versions.installed_versions()
    assert tested == tomllib.loads(text)["runtime"]
    assert installed.keys() == tested.keys()
    assert installed["torch"].startswith(tested["torch"])


def test_local_suffix_is_the_same_version(problems_with):
    assert problems_with(torch="2.13.0+cu130", vllm="0.32.0+empty") == []


@pytest.mark.parametrize("version", ["2.12.1+cpu", "2.13.1", "2.13", "2.130.0", "2.13.0.post1"])
def test_another_torch_is_a_problem_with_a_remedy(problems_with, version):
    (line,) = problems_with(torch=version)
    assert line.startswith(f"torch {version} 2.13.0 | torch is {version}; ")
    assert "pip install" in line
    assert "torch==2.13.0+cpu" in line


def test_several_problems_come_in_order(problems_with):
    lines = problems_with(torch_npu="2.12.0", vllm="0.31.0", torch="2.12.0")
    assert [line.split()[0] for line in lines] == ["torch", "vllm", "torch-npu"]
    # With torch-npu present it is an NPU environment.
    assert "torch-npu==2.13.0" in lines[2]


def test_tested_torch_npu_is_fine(problems_with):
    assert problems_with(torch_npu="2.13.0") == []
