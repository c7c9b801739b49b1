"""Where the number of drafts is chosen while an engine runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULER = "ascend_plugin.spec_decode.scheduler.AdaptiveScheduler"
#: Methods whose layer can read without drafting.
METHODS = ("mtp", "eagle", "eagle3")


def why_fixed(vllm_config: VllmConfig) -> str | None:
    """Return why an engine must make as many drafts in every step; None: it need not."""
    speculative = vllm_config.speculative_config
    assert speculative is not None
    parallel = vllm_config.parallel_config
    own = speculative.use_gemma4_mtp() or speculative.use_step3p5_mtp()
    if speculative.method not in METHODS or own or speculative.parallel_drafting:
        return (
            f"it serves the methods {', '.join(METHODS)} with one proposal after the other, and "
            f"this is {'a proposer of its own' if own else repr(speculative.method)}"
        )
    if parallel.data_parallel_size > 1:
        return "ranks of data parallelism would choose differently and wait for each other"
    if parallel.pipeline_parallel_size > 1:
        return "with pipeline parallelism steps overlap, and their times say nothing"
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        return f"--scheduler-cls is {vllm_config.scheduler_config.scheduler_cls!r}"
    if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return (
            "graphs of whole steps are captured for one number of drafts; set "
            """--compilation-config '{"cudagraph_mode": "PIECEWISE"}'"""
        )
    return None


def is_adaptive(vllm_config: VllmConfig) -> bool:
    """Say whether the number of drafts is chosen while the engine runs."""
    return vllm_config.scheduler_config.scheduler_cls == SCHEDULER
