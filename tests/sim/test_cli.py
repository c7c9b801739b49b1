"""``ascend-plugin sim`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ascend_plugin.ops.sim.errors import SimulatorError
from ascend_plugin.ops.sim.options import OPTIONS_VARIABLE, SimulatorOptions, parse_size

pytestmark = pytest.mark.timeout(120)


def sim(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it from an environment without a simulated NPU."""
    environment = {name: value for name, value in os.environ.items() if name != OPTIONS_VARIABLE}
    environment.pop("LD_LIBRARY_PATH", None)
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, "-m", "ascend_plugin.cli", "sim", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_run_shows_a_banner_on_stderr_and_passes_the_exit_code_on():
    code = "import torch; print(torch.npu.device_count()); raise SystemExit(7)"
    done = sim("run", "--devices", "3", "--memory", "1GiB", "--", sys.executable, "-c", code)
    assert done.returncode == 7
    assert done.stdout.strip().splitlines()[-1] == "3"
    assert "SIMULATED NPU: 3 x Ascend910B1, 1GiB, lazy schedule" in done.stderr
    assert "say nothing about the hardware" in done.stderr


def test_run_passes_options_of_the_command_on():
    done = sim(
        "run", "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", "--devices", "9"
    )
    assert done.stdout.strip() == "['--devices', '9']"


def test_the_environment_outside_is_untouched():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch, importlib.util as u; print(u.find_spec('torch_npu'))",
        ],
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LD_LIBRARY_PATH")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_status_in_json():
    done = sim("status", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["rows"][0]["version"] == answer["meta"]["version"]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--devices", "99"], "99 devices cannot be simulated; choose from 1 to 16"),
        (["--memory", "lots"], "the size 'lots' is not"),
        (["--memory", "1KiB"], "give at least 64MiB"),
        (["--schedule", "late"], "the schedule 'late' is unknown; choose from lazy, eager, random"),
        (["--soc", "H100"], "'H100' is no Ascend NPU"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, text):
    done = sim("run", *arguments, "--", "true")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_that_does_not_exist_is_named():
    done = sim("run", "--", "no-such-command")
    assert done.returncode == 1
    assert "'no-such-command' is not on PATH" in done.stderr


def test_options_travel_unchanged(tmp_path):
    path = str(tmp_path / 'a "quoted" \\ näme')
    options = SimulatorOptions(devices=2, memory=1 << 30, schedule="random", seed=3, trace=path)
    assert SimulatorOptions.from_environment({OPTIONS_VARIABLE: options.to_json()}) == options
    options = SimulatorOptions(products=False)
    assert SimulatorOptions.from_environment({OPTIONS_VARIABLE: options.to_json()}) == options
    assert SimulatorOptions.from_environment({}) is None


@pytest.mark.parametrize("text, size", [("8GiB", 8 << 30), ("512 MiB", 512 << 20), ("4096", 4096)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8GB", "-1", "0", "1.5GiB"])
def test_wrong_sizes(text):
    with pytest.raises(SimulatorError, match="is not a positive number"):
        parse_size(text)


@pytest.mark.parametrize(("option", "product"), [("--products", 8.0), ("--no-products", 0.0)])
def test_products_may_be_left_out(option, product):
    code = """
import torch, torch_npu
ones = torch.ones(2, 2, device="npu")
bias = torch.ones(2, device="npu")
print((ones @ ones).sum().item(), torch.addmm(bias, ones, ones).sum().item(), ones.sum().item())
"""
    found = sim("run", option, "--", sys.executable, "-c", code).stdout.splitlines()[-1].split()
    assert [float(each) for each in found] == [product, product and product + 4, 4.0]


def test_products_of_integers_may_be_left_out():
    code = """
import torch, torch_npu
codes, x = torch.ones(2, 64, 32, dtype=torch.int8).npu(), torch.ones(5, 64).bfloat16().npu()
scale = torch.ones(2, 32).bfloat16().npu()
split = {"group_list": torch.tensor([2, 3]).npu(), "group_type": 0, "group_list_type": 1}
factors = {"antiquant_scale": [scale], "antiquant_offset": [scale]}
found = [
    torch_npu.npu_quant_matmul(x.to(torch.int8), codes[0], scale[0], output_dtype=torch.bfloat16),
    torch_npu.npu_weight_quant_batchmatmul(x, codes[0], scale[0]),
    torch_npu.npu_grouped_matmul([x], [codes], split_item=2, **factors, **split)[0],
]
print([each.sum().item() for each in found])
"""
    found = sim("run", "--no-products", "--", sys.executable, "-c", code)
    assert found.stdout.splitlines()[-1] == "[0.0, 0.0, 0.0]"


def test_run_leaves_the_log_level_of_vllm_to_the_user():
    code = "import os; print(os.environ.get('VLLM_LOGGING_LEVEL'))"
    assert sim("run", "--", sys.executable, "-c", code).stdout.strip() == "None"
