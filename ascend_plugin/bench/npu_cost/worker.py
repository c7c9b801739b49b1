"""Runs a job on an NPU, real or simulated: ``python -m ascend_plugin.bench.npu_cost.worker``.

The job comes from stdin; one answer per context of a probe, then one per kernel, goes to what was
stdout at start, and everything that vLLM prints there to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from ascend_plugin.bench.npu_cost import kernel
from ascend_plugin.bench.npu_cost.messages import Job, Probe, Probed, to_json
from ascend_plugin.bench.npu_cost.models import VOCABULARY
from ascend_plugin.bench.npu_cost.settings import SCALES, ZEROS
from ascend_plugin.bench.npu_cost.trace import trace_size


class Engine:
    """vLLM's engine with a random model, stepped by hand in this process."""

    def __init__(self, probe: Probe) -> None:
        """Load the model and capture its graphs."""
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.probe = probe
        write_scales(Path(probe.folder))
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                model=probe.folder,
                dtype="bfloat16",
                max_model_len=probe.positions,
                max_num_seqs=probe.batch,
                max_num_batched_tokens=probe.step_tokens,
                enable_prefix_caching=probe.warm,
                # A step's launches must belong to that step.
                async_scheduling=False,
                skip_tokenizer_init=True,
                disable_log_stats=True,
                seed=0,
                **probe.engine,
            )
        )

    def run(self, context: int, trace: str) -> Probed:
        """Prefill, then decode step by step up to a context."""
        probe = self.probe
        length = context - probe.steps
        draw = random.Random(context)
        prompts = [_prompt(draw, length) for _ in range(1 if probe.share else probe.batch)]
        if probe.warm:
            for i, prompt in enumerate(prompts):
                self._add(f"warm-{context}-{i}", prompt, 1)
                self._finish()
        prompts *= probe.batch if probe.share else 1
        for i, prompt in enumerate(prompts):
            self._add(f"{context}-{i}", prompt, probe.steps + 2)
        if len(self._step()) != probe.batch:
            raise RuntimeError(f"{probe.batch} prompts of {length} tokens took several steps")
        measured = [self._measured_step(trace) for _ in range(probe.steps)]
        self._finish()
        return self._describe(measured)

    def _finish(self) -> None:
        """Run what was added to its end."""
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _add(self, name: str, prompt: list[int], tokens: int) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, parameters)

    def _step(self) -> set[str]:
        """Run one step; return the requests that have a token."""
        outputs = self._engine.step()
        return {output.request_id for output in outputs if output.outputs[0].token_ids}

    def _measured_step(self, trace: str) -> tuple[tuple[int, int], float]:
        """Run one decode step; return its place in the trace, and its time by the device."""
        from ascend_plugin.ops.npu.device import npu

        npu.synchronize()
        begin = trace_size(trace)
        start, end = (npu.Event(enable_timing=True) for _ in range(2))
        start.record()
        served = self._step()
        end.record()
        npu.synchronize()
        if len(served) != self.probe.batch:
            raise RuntimeError(
                f"a step served {len(served)} of {self.probe.batch} requests: the cache is too "
                "small"
            )
        return (begin, trace_size(trace)), 1000 * float(start.elapsed_time(end))

    def _describe(self, measured: list[tuple[tuple[int, int], float]]) -> Probed:
        from ascend_plugin.ops.npu.device import npu

        runner = self._engine.model_executor.driver_worker.worker.model_runner
        groups = [group for groups in runner.attn_groups for group in groups]
        mode = runner.compilation_config.cudagraph_mode.decode_mode()
        return Probed(
            steps=tuple(place for place, _ in measured),
            step_us=tuple(round(us, 1) for _, us in measured),
            graphs=str(mode.name).lower(),
            attention=tuple(sorted({group.backend.__name__ for group in groups})),
            implementations=_implementations(),
            device=str(npu.get_device_name(0)),
        )

    def close(self) -> None:
        """Drop the engine and everything that belongs to it."""
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform

        self._engine.engine_core.shutdown()
        self._engine = None
        gc.collect()
        cleanup_dist_env_and_memory()
        # The pool of graphs is gone with its last graph; vLLM would capture into it again.
        type(current_platform)._global_graph_pool = None


def register_zeros() -> None:
    """Tell vLLM the format of weights :data:`ZEROS`."""
    import torch
    from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

    @register_model_loader(ZEROS)
    class ZeroLoader(BaseModelLoader):
        """Leaves every weight zero: drawing billions of values takes longer than the steps."""

        def download_model(self, model_config: Any) -> None:
            """There is nothing to fetch."""

        @torch.no_grad()
        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            """Fill the weights."""
            for weight in model.state_dict().values():
                weight.zero_()


def write_scales(folder: Path) -> None:
    """Write static scales for a random model: all values are as good as others."""
    import torch

    from ascend_plugin.kv_cache.scales import LayerScales, save_kv_scales

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    one = torch.full((config["num_key_value_heads"], config["head_dim"]), 0.03125)
    layers = {i: LayerScales(one, one) for i in range(config["num_hidden_layers"])}
    save_kv_scales(folder / SCALES, layers, {"model": "random"})


def _prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(2, VOCABULARY) for _ in range(length)]


def _implementations() -> dict[str, list[str]]:
    """Return which implementations have served calls of this process, by operator."""
    from ascend_plugin.ops.npu import attention, write

    return {
        name: sorted({choice.implementation.name for choice in operator._choices.values()})
        for name, operator in (
            ("paged_attention", attention.operator),
            ("kv_cache_write", write.operator),
        )
    }


def main() -> None:
    """Answer every probe of the job on stdin."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = Job.from_json(sys.stdin.read())
    register_zeros()
    for probe in job.probes:
        engine = Engine(probe)
        for context in probe.contexts:
            answers.write(to_json(engine.run(context, job.trace)) + "\n")
            answers.flush()
        engine.close()
    for shape in job.kernels:
        answers.write(to_json(kernel.launch(shape, job.trace)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
