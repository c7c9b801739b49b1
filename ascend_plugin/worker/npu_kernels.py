"""Kernels of vLLM's model runner and sampler that exist in Triton only, in operators of torch.

They run on the device and wait for nothing. Names of arguments are vLLM's.
Source: ``vllm/v1/worker/block_table.py``, ``vllm/v1/sample/rejection_sampler.py`` and
``vllm/v1/spec_decode/utils.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ascend_plugin.worker.torch_kernels import expand, owner_of


@functools.cache
def register() -> None:
    """Tell vLLM's dispatcher of the replacements. Idempotent."""
    from vllm.triton_utils.dispatcher import register_kernels

    sampler = "vllm.v1.sample.rejection_sampler"
    register_kernels(
        {
            "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slots,
            f"{sampler}.rejection_greedy_sample_kernel": reject_greedily,
            f"{sampler}.rejection_random_sample_kernel": reject_randomly,
            f"{sampler}.expand_kernel": expand,
            f"{sampler}.sample_recovered_tokens_kernel": sample_recovered,
            "vllm.v1.spec_decode.utils.eagle_step_slot_mapping_metadata_kernel": advance_drafts,
        }
    )


def compute_slots(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: Tensor,
    positions_ptr: Tensor,
    block_table_ptr: Tensor,
    block_table_stride: int,
    slot_mapping_ptr: Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int = 1,
    TOTAL_CP_RANK: int = 0,
    CP_KV_CACHE_INTERLEAVE_SIZE: int = 1,
    PAD_ID: int = -1,
    BLOCK_SIZE: int = 1024,
) -> None:
    """Write the slot of each token, ``block * block size + offset``; the rest is padding.

    Raises:
        ValueError: context parallelism, which spreads a sequence over devices.
    """
    if TOTAL_CP_WORLD_SIZE != 1:
        raise ValueError(
            f"context parallelism over {TOTAL_CP_WORLD_SIZE} NPUs is not served; leave it out."
        )
    slot_mapping_ptr[num_tokens:max_num_tokens].fill_(PAD_ID)
    if num_tokens == 0:
        return
    request = owner_of(query_start_loc_ptr[1:], num_tokens)  # [num_tokens]
    request = request.clamp(max=block_table_ptr.shape[0] - 1)
    positions = positions_ptr[:num_tokens]
    column = torch.div(positions, KV_CACHE_BLOCK_SIZE, rounding_mode="floor")
    entry = request * block_table_stride + column
    blocks = block_table_ptr.view(-1).index_select(0, entry)
    offset = positions - column * KV_CACHE_BLOCK_SIZE
    slot_mapping_ptr[:num_tokens].copy_(blocks * KV_CACHE_BLOCK_SIZE + offset)


def _drafts(ends: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return where a sequence's drafts lie, and how many it has.

    Args:
        ends: ``[sequences]``, drafts up to the end of each sequence.
        width: most drafts of a sequence.

    Returns:
        Indices ``[sequences, width]`` (those beyond its drafts are another's), and their number
        ``[sequences, 1]``.
    """
    starts = torch.cat((torch.zeros_like(ends[:1]), ends[:-1]))
    places = torch.arange(width, device=ends.device, dtype=ends.dtype)
    return starts[:, None] + places, (ends - starts)[:, None]


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Return ``values[index]``, and anything for indices behind the end."""
    flat = index.clamp(max=values.shape[0] - 1).flatten()
    return values.index_select(0, flat).view(index.shape)


def _settle(
    out: Tensor, accepted: Tensor, tokens: Tensor, bonus: Tensor, count: Tensor, mine: Tensor | None
) -> None:
    """Write the tokens up to the first rejected draft, and the bonus token behind the last.

    Args:
        out: ``[sequences, width + 1]``.
        accepted: bool ``[sequences, width]``, false beyond a sequence's drafts.
        tokens: ``[sequences, width]``, what is written for a draft that is reached.
        bonus: ``[sequences]``.
        count: drafts of each sequence, ``[sequences, 1]``.
        mine: bool ``[sequences]``, which sequences to write; None: all.
    """
    sequences, width = accepted.shape
    places = torch.arange(width + 1, device=out.device, dtype=count.dtype)
    rejected = torch.logical_not(accepted).to(torch.int32).cumsum(1)
    # A place is reached if nothing before it was rejected.
    before = torch.cat((torch.zeros_like(count, dtype=rejected.dtype), rejected), 1)
    write = (before == 0) & (places[None, :] <= count)
    if mine is not None:
        write = write & mine.view(-1, 1)
    padded = torch.cat((tokens, tokens.new_zeros((sequences, 1))), 1)
    bonus = bonus.reshape(sequences, 1).to(padded.dtype)
    found = torch.where(places[None, :] == count, bonus, padded)
    out.copy_(torch.where(write, found.to(out.dtype), out))


def _settle_without_drafts(
    out: Tensor, index: Tensor, bonus: Tensor, count: Tensor, mine: Tensor | None
) -> None:
    accepted = torch.zeros_like(index, dtype=torch.bool)
    _settle(out, accepted, torch.zeros_like(index), bonus, count, mine)


def reject_greedily(
    output_token_ids_ptr: Tensor,
    cu_num_draft_tokens_ptr: Tensor,
    draft_token_ids_ptr: Tensor,
    target_argmax_ptr: Tensor,
    bonus_token_ids_ptr: Tensor,
    is_greedy_ptr: Tensor | None,
    max_spec_len: int,
    uniform_probs_ptr: Tensor | None = None,
    synthetic_conditional_rates_ptr: Tensor | None = None,
    SYNTHETIC_MODE: bool = False,
) -> None:
    """Accept drafts that are the model's own choice."""
    _refuse_synthetic(SYNTHETIC_MODE)
    index, count = _drafts(cu_num_draft_tokens_ptr, output_token_ids_ptr.shape[1] - 1)
    if draft_token_ids_ptr.shape[0] == 0:
        out, bonus = output_token_ids_ptr, bonus_token_ids_ptr
        _settle_without_drafts(out, index, bonus, count, is_greedy_ptr)
        return
    target = _pick(target_argmax_ptr, index)
    inside = index < (index[:, :1] + count)
    accepted = (_pick(draft_token_ids_ptr, index) == target) & inside
    bonus = bonus_token_ids_ptr
    _settle(output_token_ids_ptr, accepted, target, bonus, count, is_greedy_ptr)


def reject_randomly(
    output_token_ids_ptr: Tensor,
    cu_num_draft_tokens_ptr: Tensor,
    draft_token_ids_ptr: Tensor,
    draft_probs_ptr: Tensor | None,
    target_probs_ptr: Tensor,
    bonus_token_ids_ptr: Tensor,
    recovered_token_ids_ptr: Tensor,
    uniform_probs_ptr: Tensor,
    is_greedy_ptr: Tensor,
    max_spec_len: int,
    vocab_size: int,
    synthetic_conditional_rates_ptr: Tensor | None = None,
    NO_DRAFT_PROBS: bool = False,
    SYNTHETIC_MODE: bool = False,
) -> None:
    """Accept a draft with probability ``target / draft``; else take the recovered token."""
    _refuse_synthetic(SYNTHETIC_MODE)
    index, count = _drafts(cu_num_draft_tokens_ptr, output_token_ids_ptr.shape[1] - 1)
    mine = torch.logical_not(is_greedy_ptr)
    if draft_token_ids_ptr.shape[0] == 0:
        _settle_without_drafts(output_token_ids_ptr, index, bonus_token_ids_ptr, count, mine)
        return
    drafts = draft_token_ids_ptr.to(torch.int64)
    column = drafts.clamp(min=0)[:, None]
    target = target_probs_ptr.gather(1, column)[:, 0]
    wanted = uniform_probs_ptr.to(target.dtype)
    if not NO_DRAFT_PROBS and draft_probs_ptr is not None:
        draft = draft_probs_ptr.gather(1, column)[:, 0]
        taken = (draft > 0) & (target >= wanted * draft)
    else:
        taken = target >= wanted
    taken = taken & (drafts >= 0)
    tokens = torch.where(taken, drafts, recovered_token_ids_ptr.to(torch.int64))
    accepted = _pick(taken, index) & (index < (index[:, :1] + count))
    _settle(
        output_token_ids_ptr,
        accepted,
        _pick(tokens, index),
        bonus_token_ids_ptr,
        count,
        mine,
    )


def _refuse_synthetic(synthetic: bool) -> None:
    if synthetic:
        raise ValueError("synthetic acceptance rates of drafts are not served on an NPU.")


def sample_recovered(
    output_token_ids_ptr: Tensor,
    cu_num_draft_tokens_ptr: Tensor,
    draft_token_ids_ptr: Tensor,
    draft_probs_ptr: Tensor | None,
    target_probs_ptr: Tensor,
    inv_q_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int = 0,
    NO_DRAFT_PROBS: bool = False,
    USE_FP64_GUMBEL: bool = False,
) -> None:
    """Sample, for each draft, the token that replaces it if it is rejected."""
    tokens = output_token_ids_ptr.shape[0]
    if tokens == 0:
        return
    if NO_DRAFT_PROBS or draft_probs_ptr is None:
        column = draft_token_ids_ptr.to(torch.int64).clamp(min=0)[:, None]
        probs = target_probs_ptr.scatter(1, column, 0.0)
    else:
        probs = (target_probs_ptr - draft_probs_ptr).clamp(min=0.0)
    owner = owner_of(cu_num_draft_tokens_ptr, tokens).clamp(max=inv_q_ptr.shape[0] - 1)
    scores = probs * inv_q_ptr.index_select(0, owner)
    output_token_ids_ptr.copy_(scores.argmax(1))


def advance_drafts(
    positions: Tensor,
    block_table: Tensor,
    block_table_stride: int,
    seq_lens: Tensor,
    out_clamped_positions: Tensor,
    out_slot_mapping: Tensor,
    block_size: int,
    max_model_len: int,
    n_blocks_per_req: int,
    PAD_ID: int,
    batch_size: int | None = None,
) -> None:
    """Move every sequence on by one draft: its position, its slot and its length.

    A position behind the end of what the model takes becomes 0, with a slot of padding and length
    1: such a draft is never verified.
    """
    sequences = positions.shape[0]
    position = positions + 1
    beyond = position >= max_model_len
    position = torch.where(beyond, 0, position)
    column = torch.div(position, block_size, rounding_mode="floor").clamp(max=n_blocks_per_req - 1)
    rows = torch.arange(sequences, device=positions.device, dtype=column.dtype)
    entry = (rows * block_table_stride + column).to(torch.int64)
    width = block_table.shape[0] * block_table_stride
    blocks = block_table.as_strided((width,), (1,)).index_select(0, entry)
    slots = blocks * block_size + (position - column * block_size)
    slots = torch.where(beyond, PAD_ID, slots)
    lengths = torch.where(beyond, 1, seq_lens[:sequences] + 1).clamp(max=max_model_len)
    out_clamped_positions.copy_(position)
    out_slot_mapping[:sequences].copy_(slots)
    out_slot_mapping[sequences:].fill_(PAD_ID)
    seq_lens[:sequences].copy_(lengths)
