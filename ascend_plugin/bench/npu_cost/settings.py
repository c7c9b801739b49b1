"""What ``bench npu-cost`` counts, and the engines that it needs for that. No import of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.npu_cost.messages import KernelShape, Probe
from ascend_plugin.bench.npu_cost.models import Geometry
from ascend_plugin.config import INT8_DTYPE, Variant

GRAPHS: Final = ("none", "piecewise", "full")

#: How a cache is held: as the model computes, or int8.
VARIANTS: Final = ("bf16", *get_args(Variant))

#: Phases of an engine: the plugin's decode step, and vLLM's own chain of operators.
DECODE, NAIVE = "decode", "decode, naive"

#: Layers of the two models whose difference is counted.
DEPTHS = (1, 3)

_BLOCK = 128
_STEPS = 3

#: Longer contexts are told from two short ones: a simulated prefill takes too long.
_MEASURED_AS_ASKED = 64

#: The kernel of attention is launched over so many tokens of context at most, of all sequences;
#: what more take is told from two shorter contexts.
_MOST_TOKENS = 2**18

#: Drafts that the kernel takes: 16 query tokens in all.
MOST_DRAFTS = 15

#: An assumption to compute with, no measurement.
DEFAULT_ACCEPTANCE = 0.7

#: Batches and contexts of a sweep.
SWEEP: Final = ((1, 8), (256, 1024, 4096, 16384))

#: Steps that are timed on hardware, after others that are not.
_TIMED_STEPS = 32

#: Of rows of random models few are patched, as of calibrated ones.
_PATCH_THRESHOLD = 0.05

#: Weights of the deeper model that the simulator takes.
_MOST_WEIGHTS = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Settings:
    """What is counted.

    Attributes:
        geometry: of the model.
        variant: of the KV cache.
        batch: sequences.
        context: tokens of each sequence, the new one included.
        graphs: what is captured.
        drafts: tokens that a verification step checks beside the new one.
        sweep: whether the kernel of attention is launched over :data:`SWEEP` too.
        naive: whether vLLM's own chain of operators is counted too.
        acceptance: how likely a draft is taken to be accepted if those before it were.
    """

    geometry: Geometry
    variant: str = "bf16"
    batch: int = 8
    context: int = 4096
    graphs: str = "full"
    drafts: int = 3
    sweep: bool = False
    naive: bool = True
    acceptance: float = DEFAULT_ACCEPTANCE

    @property
    def phases(self) -> tuple[str, ...]:
        """What is counted."""
        return (DECODE, NAIVE) if self.naive else (DECODE,)

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            BenchError: a value out of its bounds.
        """
        for option, value, low, high in (
            ("--batch", self.batch, 1, 256),
            ("--context", self.context, _STEPS + 1, 2**20),
            ("--drafts", self.drafts, 0, MOST_DRAFTS),
            ("--acceptance", self.acceptance, 0, 1),
        ):
            if not low <= value <= high:
                raise BenchError(f"{option} {value} is not possible; use {low} to {high}.")
        for option, name, known in (
            ("--variant", self.variant, VARIANTS),
            ("--graphs", self.graphs, GRAPHS),
        ):
            if name not in known:
                raise BenchError(f"{option} {name} is unknown; use {', '.join(known)}.")


def simulated_contexts(context: int) -> tuple[int, ...]:
    """Return the contexts that the simulator runs for the asked one.

    Two of them differ by a block, so that what grows by tokens and what grows by blocks both lie
    on the line through them.
    """
    if context <= _MEASURED_AS_ASKED:
        return (context,)
    return tuple(blocks * _BLOCK + 1 + _STEPS for blocks in (1, 2))


def check_size(geometry: Geometry) -> None:
    """Refuse models whose layers the simulator cannot hold.

    Raises:
        BenchError: they are too large.
    """
    weights = DEPTHS[-1] * geometry.layer_weight_bytes()
    if weights > _MOST_WEIGHTS:
        raise BenchError(
            f"--model {geometry.name}: {DEPTHS[-1]} layers have {weights / 2**30:.1f} GiB of "
            f"weights; the simulator takes up to {_MOST_WEIGHTS / 2**30:.0f}. Choose a smaller "
            "model."
        )


def simulated_probes(settings: Settings, naive: bool, scratch: Path) -> tuple[Probe, ...]:
    """Return the engines to trace: each depth."""
    contexts = simulated_contexts(settings.context)
    return tuple(
        _probe(settings, naive, scratch, layers, contexts, _STEPS, share=True) for layers in DEPTHS
    )


def kernel_contexts(batch: int, context: int) -> tuple[int, ...]:
    """Return the contexts at which the kernel of attention is launched for the asked one.

    Beyond :data:`_MOST_TOKENS` two, which are whole blocks: the cores share whole pages evenly, so
    that bytes lie on the line through them, and cycles nearly.
    """
    if batch * context <= _MOST_TOKENS:
        return (context,)
    most = _MOST_TOKENS // batch // _BLOCK * _BLOCK
    return (most // 2, most)


def kernel_cases(settings: Settings) -> tuple[tuple[int, int, int], ...]:
    """Return (batch, context, query tokens) of the launches of the kernel of attention.

    The asked ones come first: decode, then verification.
    """
    if settings.variant not in get_args(Variant):
        return ()
    pairs = [(settings.batch, settings.context)]
    if settings.sweep:
        pairs += [(batch, context) for batch in SWEEP[0] for context in SWEEP[1]]
    rows = sorted({1, 1 + settings.drafts})
    return tuple(dict.fromkeys((*pair, count) for pair in pairs for count in rows))


def kernel_shapes(settings: Settings, case: tuple[int, int, int]) -> tuple[KernelShape, ...]:
    """Return the launches that tell what a case of :func:`kernel_cases` takes."""
    batch, context, query_tokens = case
    geometry = settings.geometry
    heads = (geometry.heads, geometry.kv_heads, geometry.head_dim)
    return tuple(
        KernelShape(settings.variant, *heads, _BLOCK, batch, each, query_tokens)
        for each in kernel_contexts(batch, context)
    )


def timed_probes(settings: Settings, naive: bool, scratch: Path) -> tuple[Probe, ...]:
    """Return the engines to time on hardware: each depth, near the asked context.

    Sequences have prompts of their own there: the chip's cache would hold a common one.
    """
    blocks = max(1, round((settings.context - _TIMED_STEPS - 1) / _BLOCK))
    context = blocks * _BLOCK + 1 + _TIMED_STEPS
    return tuple(
        _probe(settings, naive, scratch, layers, (context,), _TIMED_STEPS, share=False)
        for layers in DEPTHS
    )


def _probe(
    settings: Settings,
    naive: bool,
    scratch: Path,
    layers: int,
    contexts: tuple[int, ...],
    steps: int,
    *,
    share: bool,
) -> Probe:
    geometry, batch, context = settings.geometry, settings.batch, max(contexts)
    blocks = -(-(context + 2) // _BLOCK)
    warm = context > _MEASURED_AS_ASKED
    step_tokens = max(128, batch * (1 if warm else context), 128 if share else 2048)
    folder = scratch / f"{layers}-layers-{blocks}"
    folder.mkdir(parents=True, exist_ok=True)
    config = geometry.config(layers, blocks * _BLOCK)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    token = 4 * geometry.kv_heads * geometry.head_dim
    pages = batch * (blocks + 2) + 4
    engine: dict[str, Any] = {
        "kv_cache_memory_bytes": layers * pages * _BLOCK * token,
        "block_size": _BLOCK,
        "load_format": ZEROS if share else "dummy",
    }
    engine |= _variant_arguments(settings.variant, folder)
    engine |= _naive_arguments() if naive else _graph_arguments(settings.graphs, batch)
    return Probe(
        folder=str(folder),
        batch=batch,
        contexts=contexts,
        steps=steps,
        positions=blocks * _BLOCK,
        warm=warm,
        share=share,
        step_tokens=step_tokens,
        engine=engine,
    )


def _variant_arguments(variant: str, folder: Path) -> dict[str, Any]:
    if variant == "bf16":
        return {}
    told: dict[str, Any] = {"variant": variant}
    if variant in ("c8s", "c8p"):
        told["scales"] = str(folder / SCALES)
    if variant == "c8p":
        told["patch_threshold"] = _PATCH_THRESHOLD
    return {"kv_cache_dtype": INT8_DTYPE, "additional_config": {"kv_cache": told}}


#: The format of weights that a worker knows beside vLLM's: all zero, in no time.
ZEROS = "zeros"

#: The static scales that a worker writes into a model's folder.
SCALES = "kv_scales.safetensors"


def _graph_arguments(graphs: str, batch: int) -> dict[str, Any]:
    if graphs == "none":
        return {"enforce_eager": True}
    told: dict[str, Any] = {"cudagraph_capture_sizes": [batch]}
    if graphs == "full":
        told |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    else:
        told["cudagraph_mode"] = "PIECEWISE"
    return {"compilation_config": told}


def _naive_arguments() -> dict[str, Any]:
    """Return what makes vLLM compute norms, rotation and activation in operators of torch."""
    native = ["native"]
    return {
        "enforce_eager": True,
        "compilation_config": {"custom_ops": ["none"]},
        "ir_op_priority": {"rms_norm": native, "fused_add_rms_norm": native},
    }
