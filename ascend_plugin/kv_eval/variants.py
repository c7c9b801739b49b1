"""The variants of a KV cache that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.kv_eval.errors import KVEvalError
from ascend_plugin.ops.page_layout import PatchCode, Quantisation

#: Tokens in a block of the pages: what the plugin serves with unless told otherwise.
BLOCK_SIZE = 128


@dataclass(frozen=True, slots=True)
class Variant:
    """How K and V are stored.

    Attributes:
        name: as given to ``--variants``.
        quantisation: what elements of the pages mean.
        patch_code: how C8P codes residuals.
        dtype: element type of the pages.
    """

    name: str
    quantisation: Quantisation = Quantisation.NONE
    patch_code: PatchCode = PatchCode.INT4
    dtype: torch.dtype = torch.int8

    def page_format(self, kv_heads: int, head_dim: int) -> PageFormat:
        """Return the format of its pages."""
        return PageFormat(
            self.dtype, BLOCK_SIZE, kv_heads, head_dim, self.quantisation, self.patch_code
        )


#: What all others are compared with.
BASELINE = Variant("bf16", dtype=torch.bfloat16)

#: Holds keys and values exactly: part of the measurement, and what bf16 itself costs.
EXACT = Variant("fp32", dtype=torch.float32)

VARIANTS = {
    variant.name: variant
    for variant in (
        BASELINE,
        EXACT,
        Variant("c8d", Quantisation.C8D),
        Variant("c8s", Quantisation.C8S),
        Variant("c8p-int4", Quantisation.C8P, PatchCode.INT4),
        Variant("c8p-e3m0", Quantisation.C8P, PatchCode.E3M0),
    )
}


def choose_variants(names: Sequence[str], *, with_scales: bool) -> tuple[Variant, ...]:
    """Return variants by their names, the baseline first, without fp32 unless it is named.

    Args:
        names: names, or several in one, with commas between; none: all that can run.
        with_scales: whether static scales are given.

    Raises:
        KVEvalError: a name is unknown, or its variant needs scales that are not given.
    """
    wanted = [name.strip() for part in names for name in part.split(",") if name.strip()]
    if not wanted:
        wanted = [
            v.name
            for v in VARIANTS.values()
            if v is not EXACT and (with_scales or not v.quantisation.static)
        ]
    # c8p alone means the code that a page has unless told otherwise.
    default = PageFormat(torch.int8, BLOCK_SIZE, 1, 16, Quantisation.C8P).patch_code
    wanted = [f"c8p-{default.name.lower()}" if name == "c8p" else name for name in wanted]
    for name in wanted:
        if name not in VARIANTS:
            raise KVEvalError(
                f"--variants {name} is unknown; use {', '.join(VARIANTS)}, or c8p for the default "
                "patch code."
            )
        if VARIANTS[name].quantisation.static and not with_scales:
            raise KVEvalError(
                f"--variants {name} needs --scales FILE. Make it with 'ascend-plugin calibrate kv "
                "MODEL --text FILE -o kv_scales.safetensors'."
            )
    others = dict.fromkeys(VARIANTS[name] for name in wanted if name != BASELINE.name)
    return (BASELINE, *others)
