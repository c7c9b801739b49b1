"""The operators mean what vLLM's own CPU attention means, option by option."""

from __future__ import annotations

import pytest
import torch
import vllm._C  # noqa: F401  registers torch.ops._C
from attention_cases import Batch, Case, make_batch

SEQUENCES = ((1, 1), (1, 33), (1, 170), (5, 64), (16, 90), (40, 40), (30, 101))
OPTIONS = {
    "plain": {},
    "window 1": {"window": 1},
    "window 16": {"window": 16},
    "window 50": {"window": 50},
    "soft cap": {"soft_cap": 0.8},
    "alibi": {"alibi": True},
    "alibi and soft cap": {"alibi": True, "soft_cap": 0.8},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 20},
    "not causal": {"causal": False},
}


def _stock(batch: Batch) -> torch.Tensor:
    """Run vLLM's kernel on the same keys, values and block ids."""
    case, options = batch.case, batch.options
    ops, isa = torch.ops._C, "vec" if case.head_dim % 32 == 0 else "vec16"
    shape = (batch.pages.shape[0], case.kv_heads, 2 * case.block_size, case.head_dim)
    key_cache, value_cache = torch.zeros(shape, dtype=case.dtype).chunk(2, dim=2)
    for i, (_, length) in enumerate(case.sequences):
        tokens = torch.arange(case.first_token(*case.sequences[i]), length)
        blocks = batch.block_table[i, tokens // case.block_size].long()
        slots = blocks * case.block_size + tokens % case.block_size
        key, value = batch.keys[i][tokens], batch.values[i][tokens]
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
    lengths, starts = batch.seq_lens, batch.query_start_loc
    window = case.window or -1
    metadata = ops.get_scheduler_metadata(
        len(case.sequences), case.heads, case.kv_heads, case.head_dim, lengths, case.dtype, starts,
        case.causal, window, isa, True, None,
    )  # fmt: skip
    out = torch.zeros_like(batch.query)
    ops.cpu_attention_with_kv_cache(
        batch.query, key_cache, value_cache, out, starts, lengths, options["scale"], case.causal,
        options["alibi_slopes"], window, batch.block_table.clamp(min=0), case.soft_cap, metadata,
        options["sinks"], None,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", OPTIONS)
def test_stock_parity(implementation: str, name: str, head_dim: int) -> None:
    case = Case(SEQUENCES, heads=8, head_dim=head_dim, block_size=32, **OPTIONS[name])
    batch = make_batch(case)
    torch.testing.assert_close(batch.run(), _stock(batch), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stock_parity_of_narrow_types(implementation: str, dtype: torch.dtype) -> None:
    batch = make_batch(Case(SEQUENCES, heads=8, block_size=32, dtype=dtype, sinks=True))
    torch.testing.assert_close(batch.run(), _stock(batch), atol=1.6e-2, rtol=1.6e-2)
