"""Runs ``bench npu-cost``: engines in a process of their own, on a simulated or a real NPU."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.npu_cost import trace
from ascend_plugin.bench.npu_cost.chip import ASCEND_910C_DIE
from ascend_plugin.bench.npu_cost.kernel_rows import kernel_row
from ascend_plugin.bench.npu_cost.messages import Job, Launched, Probe, Probed, to_json
from ascend_plugin.bench.npu_cost.rows import (
    Case,
    CostRow,
    KernelRow,
    Speculation,
    measured_row,
    traced_row,
    with_speculation,
)
from ascend_plugin.bench.npu_cost.settings import (
    DEPTHS,
    NAIVE,
    Settings,
    check_size,
    kernel_cases,
    kernel_shapes,
    simulated_contexts,
    simulated_probes,
    timed_probes,
)
from ascend_plugin.ops import sim
from ascend_plugin.ops.sim.options import OPTIONS_VARIABLE
from ascend_plugin.versions import tested_versions

Report = Callable[[str], None]

_MEMORY = 32 << 30
_LOG_LINES = 12
_MORE_LAYERS = DEPTHS[1] - DEPTHS[0]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows, and how they came about."""

    rows: list[CostRow]
    kernels: list[KernelRow]
    method: dict[str, object]


def run(wanted: Sequence[Settings], scratch: Path, report: Report) -> Outcome:
    """Count a decode step of the plugin and of the naive chain.

    Args:
        wanted: what to count; they differ in the variant alone.
        scratch: folder for configurations, traces and logs.
        report: gets a line for each part.

    Raises:
        BenchError: an engine does not run; the message has its last lines.
    """
    common = wanted[0]
    variants = ", ".join(settings.variant for settings in wanted)
    where = "a simulated" if simulated() else "this machine's"
    if not simulated():
        report(f"{common.geometry.name} {variants}: engines on {where} NPU")
        return _measure(wanted, scratch)
    check_size(common.geometry)
    path = scratch / "trace.jsonl"
    environment = _simulated_environment(path, report)
    report(f"{common.geometry.name} {variants}: engines on {where} NPU")
    job = _job(simulated_probes, wanted, scratch, str(path))
    answers = _ask(job, environment, scratch)
    outcome = Outcome([], [], _method(common) | _counting(common))
    told: dict[str, dict[str, object]] = {}
    for settings in wanted:
        kernels = _kernel_rows(settings, answers, path)
        outcome.kernels.extend(kernels)
        for phase in settings.phases:
            mine = answers.probed(len(DEPTHS) * len(simulated_contexts(settings.context)))
            row, facts = _trace_phase(settings, phase, path, mine, kernels)
            outcome.rows.append(row)
            told.setdefault(settings.variant, {})[phase] = facts
    outcome.method["variants"] = told
    return outcome


def _job(
    make: Callable[[Settings, bool, Path], tuple[Probe, ...]],
    wanted: Sequence[Settings],
    scratch: Path,
    path: str,
) -> Job:
    probes = [
        probe
        for settings in wanted
        for phase in settings.phases
        for probe in make(settings, phase == NAIVE, scratch)
    ]
    shapes = [
        shape
        for settings in wanted
        for case in kernel_cases(settings)
        for shape in kernel_shapes(settings, case)
    ]
    return Job(tuple(probes), tuple(shapes), path)


class _Answers:
    """A worker's answers, taken in the order of the job."""

    def __init__(self, job: Job, lines: Sequence[str]) -> None:
        answers = [json.loads(line) for line in lines]
        probes = len(answers) - len(job.kernels)
        self._probed = iter([Probed(**answer) for answer in answers[:probes]])
        self._launched = iter([Launched(**answer) for answer in answers[probes:]])

    def probed(self, count: int) -> list[Probed]:
        """Take the next answers of engines."""
        return list(itertools.islice(self._probed, count))

    def launched(self, count: int) -> list[Launched]:
        """Take the next answers of kernels."""
        return list(itertools.islice(self._launched, count))


def _kernel_rows(settings: Settings, answers: _Answers, path: Path | None) -> list[KernelRow]:
    rows = []
    for case in kernel_cases(settings):
        shapes = kernel_shapes(settings, case)
        mine = answers.launched(len(shapes))
        rows.append(kernel_row(settings.geometry, case[1], shapes, mine, path, ASCEND_910C_DIE))
    return rows


def simulated() -> bool:
    """Return whether there is no real NPU, so that a simulated one is counted."""
    if os.environ.get(OPTIONS_VARIABLE):
        return True
    from ascend_plugin.device import detect_device

    return detect_device().kind != "npu"


def _trace_phase(
    settings: Settings, phase: str, path: Path, found: list[Probed], kernels: list[KernelRow]
) -> tuple[CostRow, dict[str, object]]:
    steps = [_steady_step(path, each) for each in found]
    contexts = simulated_contexts(settings.context)
    shallow, deep = steps[: len(contexts)], steps[len(contexts) :]
    layers = [
        trace.per_layer(less, more, _MORE_LAYERS) for less, more in zip(shallow, deep, strict=True)
    ]
    layer = layers[0]
    if len(contexts) > 1:
        near, far = zip(contexts, layers, strict=True)
        layer = trace.at_context(near, far, settings.context)
    flops = settings.geometry.attention_flops(settings.batch, settings.context)
    layer = trace.with_attention(layer, flops)
    bounds = trace.kernel_bounds(path, *found[-1].steps[-1])
    kernel = None
    if any(name.startswith(trace.KERNEL) for name in layer):
        kernel = kernels[0]  # decode, as asked
        assert kernel.bytes is not None
        assert kernel.cycles is not None
        layer = trace.with_kernel(layer, kernel.bytes, kernel.cycles)
    row = traced_row(_case(settings, phase, found[-1]), layer, ASCEND_910C_DIE, kernel)
    outside = _outside(shallow[-1], layer)
    row = with_speculation(row, Speculation(settings.drafts, settings.acceptance), outside)
    return row, _told(layer, outside, found) | {"kernel_bounds": bounds}


def _steady_step(path: Path, found: Probed) -> trace.Works:
    """Return the last step's work; the one before it must have launched the same.

    Raises:
        BenchError: it did not.
    """
    before, last = (trace.read_step(path, *place) for place in found.steps[-2:])
    counts = [{name: work.launches for name, work in step.items()} for step in (before, last)]
    if counts[0] != counts[1]:
        raise BenchError(
            f"two decode steps after each other launched {counts[0]} and {counts[1]}; there is no "
            "number per step. Please report this."
        )
    return last


def _outside(shallow: trace.Works, layer: trace.Works) -> int:
    """Return the launches of a step that belong to no layer."""
    of_layers = DEPTHS[0] * sum(work.launches for work in layer.values())
    return sum(work.launches for work in shallow.values()) - of_layers


def _told(layer: trace.Works, outside: int, found: list[Probed]) -> dict[str, object]:
    """Return what the meta object says about one phase."""
    return {
        "operators_per_layer": {
            name.removeprefix("aclnn"): {
                "launches": work.launches,
                "bytes": round(work.bytes),
                "flops": round(work.flops),
                "cycles": round(work.cycles),
            }
            for name, work in layer.items()
        },
        "launches_outside_of_layers": outside,
        "attention": list(found[-1].attention),
        "implementations": found[-1].implementations,
        "step_us_of_the_simulator": {
            "meaning": "none: events of a simulated device, which this machine's CPU computes",
            "last_steps": [each.step_us[-1] for each in found],
        },
    }


def _case(settings: Settings, phase: str, found: Probed) -> Case:
    asked = "none" if phase == NAIVE else settings.graphs
    note = None
    if found.graphs != asked:
        note = f"{asked} graphs were asked for; this attention is captured as {found.graphs}"
    return Case(
        settings.geometry,
        phase,
        settings.variant,
        found.graphs,
        settings.batch,
        settings.context,
        note,
    )


def _measure(wanted: Sequence[Settings], scratch: Path) -> Outcome:
    """Time a decode step on hardware. Never run there yet."""
    job = _job(timed_probes, wanted, scratch, "")
    answers = _ask(job, dict(os.environ), scratch)
    rows, kernels, device = [], [], ""
    told: dict[str, dict[str, object]] = {}
    for settings in wanted:
        kernels += _kernel_rows(settings, answers, None)
        for phase in settings.phases:
            mine = answers.probed(len(DEPTHS))
            case = replace(_case(settings, phase, mine[-1]), context=job.probes[-1].contexts[-1])
            rows.append(measured_row(case, ASCEND_910C_DIE, layer_time(mine)))
            told.setdefault(settings.variant, {})[phase] = {"attention": list(mine[-1].attention)}
            device = mine[-1].device
    method = _method(wanted[0]) | _timing(job.probes[0], device) | {"variants": told}
    return Outcome(rows, kernels, method)


def layer_time(found: list[Probed]) -> float:
    """Return the microseconds that a layer adds to a decode step, by medians over steps."""
    shallow, deep = (statistics.median(each.step_us) for each in found)
    return (deep - shallow) / _MORE_LAYERS


def _simulated_environment(path: Path, report: Report) -> dict[str, str]:
    """Return the environment of a worker on a simulated NPU, traced into a file."""
    running = sim.SimulatorOptions.from_environment()
    if running is not None:
        options = replace(
            running, trace=str(path), memory=max(_MEMORY, running.memory), products=False
        )
        return dict(os.environ) | {OPTIONS_VARIABLE: options.to_json()}
    built = sim.build(tested_versions()["torch-npu"], report=report)
    options = sim.SimulatorOptions(memory=_MEMORY, trace=str(path), products=False)
    return built.environment(options, 0, os.environ)


def _ask(job: Job, environment: Mapping[str, str], folder: Path) -> _Answers:
    """Run a worker and return its answers: of each context of each probe, and of each kernel.

    Raises:
        BenchError: it failed.
    """
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.run(
            [sys.executable, "-m", "ascend_plugin.bench.npu_cost.worker"],
            input=to_json(job),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**environment, **_VARIABLES},
            check=False,
        )
    lines = process.stdout.splitlines()
    if process.returncode or len(lines) != job.answers():
        tail = "\n".join(
            log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        )
        raise BenchError(
            f"an engine ended with exit code {process.returncode}; its last lines:\n{tail}"
        )
    return _Answers(job, lines)


#: The engine runs in the worker's own process, and without the network.
_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "ascend,ascend_general",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def _method(settings: Settings) -> dict[str, object]:
    """Return what holds on a simulated NPU and on a real one."""
    chip = ASCEND_910C_DIE
    return {
        "estimate": (
            "estimated_us is no measurement: the roofline of all layers of a decode step at "
            "published peak rates, without launches, synchronisation, embedding, head and sampler"
        ),
        "chip": {
            "name": chip.name,
            "memory_bytes_per_s": chip.memory,
            "cube_flops_per_s": chip.cube,
            "vector_bytes_per_s": chip.vector,
            "source": chip.source,
        },
        "geometry": f"{settings.geometry.name}: {settings.geometry.source}",
        "layers_run": list(DEPTHS),
        "naive": (
            "no graphs; norms, rotary embedding and activation in vLLM's torch operators "
            "(custom_ops none, ir_op_priority native); KV write, attention and matrix products as "
            "the plugin's"
        ),
    }


def _counting(settings: Settings) -> dict[str, object]:
    """Return how launches and bytes are counted on a simulated NPU."""
    contexts = simulated_contexts(settings.context)
    return {
        "simulated": True,
        "contexts_run": list(contexts),
        "reduced": (
            "layers, vocabulary, context of the engines; the layers that run have the model's own "
            "shape. Weights are zero and matrix products are not computed"
        ),
        "kernels": (
            "the AscendC kernel of attention is launched on its host model at the asked batch and "
            "context, over pages of zeros: bytes are those that it read, cycles an estimate of "
            "that model, not a measurement"
        ),
        "launches": (
            "operators launched by one decode step of the deeper model less those of the other, "
            "shared by the layers; copies from the host, events and updates of graphs not counted"
        ),
        "accepted": (
            "launches_per_accepted_token is an estimate: launches of a decode step of all layers, "
            "which a verification has too, and for each draft those of one layer and what is "
            "outside of layers, over the tokens that the batch's sequences get if each draft is "
            "accepted with the assumed probability after those before it"
        ),
        "bytes": (
            "the trace's, as if every tensor came from memory; of the rotary table the rows read"
            + ("" if len(contexts) == 1 else "; at the asked context along the line through two")
            + ". Block tables are as wide as the longest context that runs"
        ),
    }


def _timing(probe: Probe, device: str) -> dict[str, object]:
    """Return how a real NPU is timed."""
    return {
        "simulated": False,
        "device": device,
        "contexts_run": list(probe.contexts),
        "measured": (
            f"measured_us: median over {probe.steps} decode steps, by events on the stream, of the "
            "deeper model less that of the other, shared by the layers, times all layers"
        ),
        "bytes": "matrices, keys, values and scales as the shapes tell; no activations",
    }
