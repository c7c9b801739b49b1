"""vLLM's engine in one process: ``python -m ascend_plugin.bench.serve.worker``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ascend_plugin.bench.serve import messages
from ascend_plugin.bench.serve.answering import answer_commands

if TYPE_CHECKING:
    from ascend_plugin.worker.cpu_steps import RecordedSteps


class Engine:
    """vLLM's engine, stepped by hand in this process."""

    def __init__(self, command: messages.Load) -> None:
        """Load the model and allocate the cache."""
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                model=command.model,
                load_format=command.load_format,
                dtype=command.dtype,
                enforce_eager=command.execution == "eager",
                compilation_config=_compilation(command.execution),
                max_model_len=command.max_model_len,
                max_num_seqs=command.max_num_seqs,
                max_num_batched_tokens=command.max_num_batched_tokens,
                kv_cache_memory_bytes=command.kv_cache_bytes,
                kv_cache_dtype=command.kv_cache_dtype,
                additional_config=command.additional_config,
                # Every round must do the same work.
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
                disable_log_stats=True,
                seed=0,
            )
        )
        self._tokens: dict[str, list[int]] = {}
        self._batches = 0

    def describe(self, seconds: float) -> messages.Loaded:
        """Return what runs."""
        import torch
        from vllm.platforms import current_platform

        kind = type(current_platform)
        worker = self._worker()
        backends = {
            f"{group.backend.__module__}.{group.backend.__qualname__}"
            for groups in worker.model_runner.attn_groups
            for group in groups
        }
        load = getattr(worker, "load_report", None)  # stock vLLM has none
        return messages.Loaded(
            platform=f"{kind.__module__}.{kind.__qualname__}",
            attention=sorted(backends),
            execution=self._execution(),
            kernels=_native_isa() if kind.__module__.startswith("ascend_plugin.") else None,
            threads=torch.get_num_threads(),
            seconds=round(seconds, 1),
            load_seconds=None if load is None else round(load.seconds, 1),
            resident_bytes=None if load is None else load.resident_bytes,
            checkpoint_bytes=None if load is None else load.checkpoint_bytes,
        )

    def _worker(self) -> Any:
        return self._engine.model_executor.driver_worker.worker

    def _execution(self) -> str:
        from vllm.config import CompilationMode

        compilation = self._engine.vllm_config.compilation_config
        if compilation.mode != CompilationMode.NONE:
            return f"torch.compile ({compilation.mode.name}, {compilation.backend})"
        return "recorded steps" if self._recorded_steps() else "eager"

    def _recorded_steps(self) -> list[RecordedSteps]:
        """Return what records decode steps; empty in stock vLLM, or if nothing does."""
        return getattr(self._worker(), "recorded_steps", [])

    def prefill(self, command: messages.Prefill) -> messages.Prefilled:
        """Submit prompts and step until each has a token."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._batches += 1
        # An engine may keep an aborted name until its next step: names are never used twice.
        names = [f"{self._batches}-{i}" for i in range(len(command.prompts))]
        self._tokens = {name: [] for name in names}
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=command.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        start = time.perf_counter()
        for name, prompt in zip(names, command.prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        first: dict[str, float] = {}
        while len(first) < len(names):
            for name in self._step():
                first.setdefault(name, time.perf_counter() - start)
        return messages.Prefilled([first[name] for name in names])

    def decode(self, command: messages.Decode) -> messages.Decoded:
        """Run full steps.

        Raises:
            RuntimeError: a step did not serve every request: the numbers would mean nothing.
        """
        start = time.perf_counter()
        for _ in range(command.steps):
            served = len(self._step())
            if served != len(self._tokens):
                raise RuntimeError(
                    f"a step served {served} of {len(self._tokens)} requests: the cache is too "
                    "small or a request has ended"
                )
        return messages.Decoded(time.perf_counter() - start)

    def finish(self) -> messages.Finished:
        """End all requests and free their blocks."""
        tokens = list(self._tokens.values())
        # Requests are found by their internal names: those given here carry a suffix inside.
        self._engine.abort_request(list(self._tokens))
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._tokens = {}
        reasons = [steps.given_up for steps in self._recorded_steps() if steps.given_up]
        note = f"steps were not recorded: {'; '.join(reasons)}" if reasons else None
        return messages.Finished(tokens, note)

    def _step(self) -> list[str]:
        """Run one step; return the requests that got a token."""
        served = []
        for output in self._engine.step():
            new = list(output.outputs[0].token_ids)
            if new and output.request_id in self._tokens:
                self._tokens[output.request_id] += new
                served.append(output.request_id)
        return served


def _compilation(execution: messages.Execution) -> dict[str, Any]:
    """Return vLLM's ``compilation_config``; empty: its own, or the plugin's, default."""
    from vllm.config import CompilationMode

    return {"mode": CompilationMode.VLLM_COMPILE} if execution == "compile" else {}


def _native_isa() -> str | None:
    """Return the instruction set of the kernels that the plugin's operators run on."""
    from ascend_plugin.ops import dispatch
    from ascend_plugin.ops.native import loader

    if dispatch.policy() == "reference":
        return None
    try:
        return loader.load().isa
    except loader.NativeLibraryError:
        return None


class Worker:
    """Runs commands in order."""

    def __init__(self) -> None:
        """Wait for ``Load``."""
        self._engine: Engine | None = None

    def run(self, command: messages.Command) -> messages.Answer:
        """Return the answer to one command."""
        if isinstance(command, messages.Load):
            start = time.perf_counter()
            self._engine = Engine(command)
            return self._engine.describe(time.perf_counter() - start)
        assert self._engine is not None, "the first command must be Load"
        if isinstance(command, messages.Prefill):
            return self._engine.prefill(command)
        if isinstance(command, messages.Decode):
            return self._engine.decode(command)
        assert isinstance(command, messages.Finish), f"{command} is not for vLLM"
        return self._engine.finish()


if __name__ == "__main__":
    answer_commands(Worker().run)
