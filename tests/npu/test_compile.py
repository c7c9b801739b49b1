"""What torch.compile does with operators of an NPU, beyond the cutting that vLLM uses."""

from __future__ import annotations

import json

import pytest
from processes import run_python

from ascend_plugin.ops.sim.options import OPTIONS_VARIABLE, SimulatorOptions

#: In a process of its own: graphs and their pools live as long as the process.
SCRIPT = """
import json, sys, warnings
import torch, torch_npu

warnings.simplefilter("ignore")
torch.npu.set_device(0)

def layer(x, weight):
    inner = torch_npu.npu_swiglu(x @ weight)
    return torch_npu.npu_rms_norm(inner, torch.ones_like(inner[0]), 1e-6)[0]

weight = torch.randn(64, 64, dtype=torch.bfloat16).npu()
inputs = [torch.randn(8, 64, dtype=torch.bfloat16).npu() for _ in range(4)]
wanted = [layer(x, weight).cpu() for x in inputs]
replays, replay = [], torch.npu.NPUGraph.replay
torch.npu.NPUGraph.replay = lambda graph: (replays.append(1), replay(graph))[1]
answers = {}
for backend in sys.argv[1:]:
    torch._dynamo.reset()
    replays.clear()
    try:
        compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
        got = [compiled(x, weight).cpu() for x in inputs]
        equal = all(torch.equal(a, b) for a, b in zip(got, wanted))
        answers[backend] = {"equal": equal, "replays": len(replays)}
    except Exception as error:
        answers[backend] = {"refused": f"{type(error).__name__}: {error}"}
print(json.dumps(answers))
"""

RUNNING = ["eager", "aot_eager", "aot_eager_decomp_partition", "npugraphs"]

#: Backends that need what is not here, and what they say.
REFUSED = {"inductor": "There should only be one", "npugraph_ex": "aclrtGetStreamResLimit"}


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, object]]:
    """What each backend did."""
    simulated = SimulatorOptions.from_environment() is not None
    done = run_python(SCRIPT, *RUNNING, *(REFUSED if simulated else ()), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("backend", RUNNING)
def test_values_are_those_of_eager_code(answers: dict, backend: str) -> None:
    assert answers[backend]["equal"], answers[backend]
    # Captured at the first calls, and replayed with new inputs afterwards.
    assert (answers[backend]["replays"] > 1) == (backend == "npugraphs")


@pytest.mark.parametrize("backend", REFUSED)
def test_other_backends_name_what_they_lack(answers: dict, backend: str) -> None:
    if SimulatorOptions.from_environment() is None:
        pytest.skip(f"what {OPTIONS_VARIABLE} simulates lacks it; hardware may not")
    assert REFUSED[backend] in answers[backend]["refused"]
