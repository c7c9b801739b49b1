"""Keys of a draft layer while no drafts are made: written later, many positions in one pass.

A draft layer attends to keys of its own of every position. vLLM runs it in each step, also where no
draft is wanted, so that none is missing; in a model of 30 layers that is some 5 % of a step, for
nothing. Here a step without drafts only keeps what the layer would read. It reads all of that in
one pass when drafts are wanted again, when a block becomes full (from then on the prefix cache may
hand it to others), or after some steps. Where the layer can be stopped, that pass ends with the
keys: attention and MLP would compute what nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

#: Steps after which the layer catches up: that many passes become one.
_STEPS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What a draft layer would read of one request in one step.

    Attributes:
        start: position of the first row; they follow one another.
        tokens: ``[rows]``, at these positions.
        positions: ``[rows]``.
        hidden: ``[rows, hidden]``, the target's.
        slots: int64 ``[rows]``, where keys go.
        following: ``[1]``, the token after the last row.
    """

    start: int
    tokens: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor
    slots: torch.Tensor
    following: torch.Tensor

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class PlainStep:
    """The same of a step in which every request had one row.

    Attributes:
        names: of the requests.
        starts: positions of their rows.
        tokens, positions, hidden, slots, following: as in :class:`Rows`, a row per request.
    """

    names: list[str]
    starts: list[int]
    tokens: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor
    slots: torch.Tensor
    following: torch.Tensor

    def precedes(self, other: PlainStep) -> bool:
        """Say whether the other is the next step of the same requests."""
        return self.names == other.names and all(
            start + 1 == later for start, later in zip(self.starts, other.starts, strict=True)
        )


def rows_of(steps: Sequence[PlainStep]) -> Iterator[tuple[str, Rows]]:
    """Yield the rows of each request in steps that follow one another."""
    first, last = steps[0], steps[-1]
    tokens, positions, hidden, slots = (
        torch.stack(parts, 1)  # [requests, steps, ...]
        for parts in zip(
            *((step.tokens, step.positions, step.hidden, step.slots) for step in steps), strict=True
        )
    )
    for i, (name, start) in enumerate(zip(first.names, first.starts, strict=True)):
        yield (
            name,
            Rows(start, tokens[i], positions[i], hidden[i], slots[i], last.following[i : i + 1]),
        )


class _KeysWrittenError(Exception):
    """Ends a pass of a draft layer whose keys are in the cache."""


class DeferredKeys:
    """Stands in for ``propose`` of a proposer that is told how many drafts to make."""

    def __init__(self, runner: Any, most: int) -> None:
        """Take its place.

        Args:
            runner: vLLM's model runner; the model of its ``drafter`` is loaded.
            most: drafts of a step at most.
        """
        self._runner, self._drafter, self._most = runner, runner.drafter, most
        self._propose = runner.drafter.propose
        self._attention = _only_attention(runner)
        self._whole_step = runner.propose_draft_token_ids
        if not hasattr(runner.model, "get_mtp_target_hidden_states"):
            runner.propose_draft_token_ids = self._after_step
        self._kept: dict[str, list[Rows]] = {}
        self._plain: list[PlainStep] = []  # after what is kept by request
        self._shares_blocks = bool(runner.vllm_config.cache_config.enable_prefix_caching)
        self._steps = self._rows = 0
        #: Passes that were saved, and passes in which the layer caught up.
        self.saved = self.passes = 0

    def __call__(self, **call: Any) -> torch.Tensor:
        """Propose; arguments and result as of vLLM's ``propose``."""
        batch: Any = call["common_attn_metadata"]
        if call["num_speculative_tokens"] or batch.max_query_len > 1 + self._most:
            self._catch_up(call, self._next_starts())
            drafts: torch.Tensor = self._propose(**call)
            return drafts
        ends = self._keep(call)
        size = self._drafter.block_size
        filled = any(end // size > self._kept[name][-1].start // size for name, end in ends.items())
        if self._is_due(filled):
            self._catch_up(call, ends)
        return self._no_drafts(batch.num_reqs)

    def _is_due(self, filled: bool) -> bool:
        """Count a step without drafts; say whether the layer has to catch up after it."""
        self._steps += 1
        self.saved += 1
        return self._steps >= _STEPS or (filled and self._shares_blocks) or self._crowded()

    def _no_drafts(self, requests: int) -> torch.Tensor:
        self._drafter._last_draft_probs = None
        return torch.empty(requests, 0, dtype=torch.int64, device=self._drafter.device)

    def _after_step(self, *step: Any) -> Any:
        """Stand in for the runner's ``propose_draft_token_ids``; arguments as there.

        After a step without drafts before and behind it, in which all requests decoded, there is
        nothing to find out: every request has one row, and the token that was sampled follows it.
        """
        scheduled, sampled, sampling, hidden, _, aux_hidden, _, common, _ = step
        runner, count = self._runner, common.num_reqs
        plain = (
            not scheduled.num_spec_tokens_to_schedule
            and common.max_query_len == 1
            and isinstance(sampled, torch.Tensor)
            and aux_hidden is None
            and runner.valid_sampled_token_count_event is None  # else the device waits for it
            and not runner.discard_request_mask.np[:count].any()
        )
        if not plain:
            return self._whole_step(*step)
        starts = runner.input_batch.num_computed_tokens_cpu[:count]
        rows = PlainStep(
            runner.input_batch.req_ids[:count],
            starts.tolist(),
            # These outlive vLLM's buffers, which the next step overwrites.
            runner.input_ids.gpu[:count].clone(),
            runner._get_positions(count).clone(),
            hidden[:count].clone(),
            common.slot_mapping[:count].clone(),
            sampled[:, 0].clone(),
        )
        self._plain.append(rows)
        self._rows += count
        if self._is_due(bool(((starts + 1) % self._drafter.block_size == 0).any())):
            call = {"common_attn_metadata": common, "sampling_metadata": sampling}
            ends = {name: start + 1 for name, start in zip(rows.names, rows.starts, strict=True)}
            self._catch_up(call, ends)
        return self._no_drafts(count)

    def _next_starts(self) -> dict[str, int]:
        """Return the position of the first row of each request in this step."""
        batch = self._runner.input_batch
        return {
            name: int(batch.num_computed_tokens_cpu[i])
            for i, name in enumerate(batch.req_ids[: batch.num_reqs])
        }

    def _keep(self, call: dict[str, Any]) -> dict[str, int]:
        """Keep the rows of a step; return the position after the last one of each request."""
        self._take_apart()
        common, last = call["common_attn_metadata"], call["token_indices_to_sample"]
        bounds = common.query_start_loc_cpu.tolist()
        lasts = [end - 1 for end in bounds[1:]] if last is None else last.tolist()
        # Kept rows must outlive vLLM's buffers, which the next step overwrites.
        tokens = call["target_token_ids"].clone()
        positions = call["target_positions"].clone()
        hidden = call["target_hidden_states"].clone()
        slots = common.slot_mapping.clone()
        following = call["next_token_ids"].clone()
        ends: dict[str, int] = {}
        for i, (name, start) in enumerate(self._next_starts().items()):
            part = slice(bounds[i], lasts[i] + 1)
            rows = Rows(
                start,
                tokens[part],
                positions[part],
                hidden[part],
                slots[part],
                following[i : i + 1],
            )
            self._add(name, rows)
            ends[name] = rows.end
            self._rows += len(rows.tokens)
        return ends

    def _add(self, name: str, rows: Rows) -> None:
        earlier = self._kept.setdefault(name, [])
        if earlier and earlier[-1].end != rows.start:  # it was preempted: its pages are others
            earlier.clear()
        earlier.append(rows)

    def _take_apart(self) -> None:
        """Give the rows of plain steps to their requests."""
        together: list[PlainStep] = []
        for step in [*self._plain, None]:
            if together and (step is None or not together[-1].precedes(step)):
                for name, rows in rows_of(together):
                    self._add(name, rows)
                together = []
            if step is not None:
                together.append(step)
        self._plain.clear()

    def _crowded(self) -> bool:
        """Say whether another step might not fit into the proposer's buffers."""
        latest = len(self._plain[-1].names) if self._plain else 0
        requests = max(len(self._kept), latest)
        return bool(self._rows + requests * (1 + self._most) > self._drafter.max_num_tokens)

    def _catch_up(self, call: dict[str, Any], ends: dict[str, int]) -> None:
        """Let the layer read what was kept of the requests of this step.

        Args:
            call: of ``propose`` in this step.
            ends: for each request of the step, in the order of the batch, where kept rows must end;
                others are of pages that it has no more.
        """
        self._take_apart()
        wanted: list[tuple[int, list[Rows]]] = []
        for i, (name, end) in enumerate(ends.items()):
            rows = self._kept.pop(name, [])
            if rows and rows[-1].end == end:
                wanted.append((i, rows))
        self._kept = {n: rows for n, rows in self._kept.items() if n in self._runner.requests}
        self._steps = 0
        self._rows = sum(len(part.tokens) for rows in self._kept.values() for part in rows)
        if wanted:
            self.passes += 1
            self._read(self._reading(call, wanted))

    def _read(self, call: dict[str, Any]) -> None:
        """Run the layer for its keys."""
        if self._attention is None:
            self._propose(**call)
            return
        self._attention.forward = _stop  # hides the method of its class
        try:
            with suppress(_KeysWrittenError):
                self._propose(**call)
        finally:
            del self._attention.forward

    def _reading(
        self, call: dict[str, Any], wanted: list[tuple[int, list[Rows]]]
    ) -> dict[str, Any]:
        """Return the arguments of ``propose`` for a pass over kept rows, without a draft."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        common, device = call["common_attn_metadata"], self._drafter.device
        parts = [part for _, rows in wanted for part in rows]
        counts = [sum(len(part.tokens) for part in rows) for _, rows in wanted]
        bounds = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor([rows[-1].end for _, rows in wanted], dtype=torch.int32)
        chosen = torch.tensor([i for i, _ in wanted])
        metadata = CommonAttentionMetadata(
            query_start_loc=bounds.to(device),
            query_start_loc_cpu=bounds,
            seq_lens=lengths.to(device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(wanted),
            num_actual_tokens=int(bounds[-1]),
            max_query_len=max(counts),
            max_seq_len=int(lengths.max()),
            block_table_tensor=common.block_table_tensor[chosen.to(device)],
            slot_mapping=torch.cat([part.slots for part in parts]),
            causal=True,
        )
        return {
            "num_speculative_tokens": 0,
            "target_token_ids": torch.cat([part.tokens for part in parts]),
            "target_positions": torch.cat([part.positions for part in parts]),
            "target_hidden_states": torch.cat([part.hidden for part in parts]),
            "next_token_ids": torch.cat([rows[-1].following for _, rows in wanted]),
            "token_indices_to_sample": None,
            "common_attn_metadata": metadata,
            "sampling_metadata": call["sampling_metadata"],
        }


def _stop(*_: Any, **__: Any) -> None:
    """Stand in for attention: keys are written before it."""
    raise _KeysWrittenError


def _only_attention(runner: Any) -> Any:
    """Return the attention of a draft model that can be stopped there; None: it has to run through.

    It can if there is no other layer behind it, and nothing between Python and it: no graph, no
    compiled code.
    """
    from vllm.config import CompilationMode

    compilation = runner.vllm_config.compilation_config
    names = list(runner.drafter._draft_attn_layer_names)
    if runner.device.type != "cpu" or compilation.mode != CompilationMode.NONE or len(names) != 1:
        return None
    impl = compilation.static_forward_context[names[0]].impl
    return impl if hasattr(impl, "forward") else None


def why_not(vllm_config: Any, drafter: Any) -> str | None:
    """Return why the layer has to read in every step; None: it need not."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    obstacles = {
        "the proposer has a way of its own": type(drafter).propose
        is not SpecDecodeBaseProposer.propose,
        "its input has other rows than the target's": drafter.needs_extra_input_slots,
        "a KV connector takes keys away in every step": vllm_config.kv_transfer_config is not None,
        "positions have several dimensions": drafter.uses_mrope,
        "it reads images": drafter.supports_mm_inputs,
    }
    return next((reason for reason, present in obstacles.items() if present), None)
