"""Checks of a ragged batch of queries, shared by the attention operators."""

from __future__ import annotations

import torch

from . import checks


def check_batch(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor
) -> None:
    """Refuse index tensors that do not describe one batch.

    Raises:
        ValueError: a type or a number of sequences differs.
    """
    checks.check_integer("query_start_loc", query_start_loc, torch.int32, 1)
    checks.check_integer("seq_lens", seq_lens, torch.int32, 1)
    checks.check_integer("block_table", block_table, torch.int32, 2)
    sequences = seq_lens.shape[0]
    if query_start_loc.shape[0] != sequences + 1 or block_table.shape[0] != sequences:
        raise ValueError(
            f"{sequences} seq_lens need {sequences + 1} query_start_loc and {sequences} rows of "
            f"block_table, got {query_start_loc.shape[0]} and {block_table.shape[0]}."
        )


def out_differs(query: torch.Tensor, out: torch.Tensor) -> ValueError:
    """Return the error of an output that is not like its query."""
    return ValueError(
        f"out ({list(out.shape)}, {out.dtype}) must have the shape and dtype of query "
        f"({list(query.shape)}, {query.dtype})."
    )


def check_fit(
    query: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> None:
    """Refuse sequences beyond their query rows or blocks: kernels would read foreign memory.

    Raises:
        ValueError: rows or blocks that do not exist.
    """
    tokens = query.shape[0]
    if out.shape[0] != tokens:
        raise out_differs(query, out)
    starts = query_start_loc.tolist()
    if starts[0] != 0 or starts[-1] > tokens or starts != sorted(starts):
        raise ValueError(
            f"query_start_loc must rise from 0 to at most the {tokens} rows of query, got {starts}."
        )
    longest = block_table.shape[1] * block_size
    lengths = seq_lens.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= longest:
        raise ValueError(
            f"seq_lens must lie within 0..{longest}, what {block_table.shape[1]} columns of "
            f"block_table hold in blocks of {block_size}, got {min(lengths)}..{max(lengths)}."
        )
