"""What replaces the Triton kernels of vLLM's runner and sampler, against loops."""

from __future__ import annotations

import pytest
import torch

from ascend_plugin.worker import npu_kernels


def _ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", [[1, 1, 1], [5, 1, 30], [7]], ids=str)
def test_slots_of_tokens(counts: list[int], device: torch.device) -> None:
    block, columns, tokens = 16, 8, sum(counts)
    table = torch.randperm(4 * columns).to(torch.int32).view(4, columns)
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), _ends(counts)))
    # vLLM's buffers are longer than the batch and repeat the last end.
    starts = torch.cat((starts, starts[-1:], starts[-1:]))
    first = [20, 0, 40]
    positions = torch.cat(
        [torch.arange(count) + start for count, start in zip(counts, first, strict=False)]
    )
    slots = torch.full((64,), 99, device=device)
    npu_kernels.compute_slots(
        tokens,
        64,
        starts.to(device),
        positions.to(device),
        table.to(device).view(-1)[: table.numel()].view(4, columns),
        columns,
        slots,
        block,
    )
    want = [
        int(table[i, (start + j) // block]) * block + (start + j) % block
        for i, (count, start) in enumerate(zip(counts, first, strict=False))
        for j in range(count)
    ]
    assert slots.cpu().tolist() == want + [-1] * (64 - tokens)


def test_context_parallelism_is_refused() -> None:
    empty = torch.empty(0)
    with pytest.raises(ValueError, match="context parallelism over 2 NPUs is not served"):
        npu_kernels.compute_slots(1, 1, empty, empty, empty, 1, empty, 16, TOTAL_CP_WORLD_SIZE=2)


COUNTS = [[3, 0, 2, 3], [0, 0], [1]]


def _draw(counts: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(counts))
    total, vocabulary = sum(counts), 5
    return {
        "drafts": torch.randint(0, 2, (total,), dtype=torch.int32),
        "argmax": torch.randint(0, 2, (total,)),
        "bonus": torch.randint(100, 200, (len(counts), 1), dtype=torch.int32),
        "recovered": torch.randint(50, 60, (total,), dtype=torch.int32),
        "target": torch.rand(total, vocabulary).softmax(-1),
        "draft_probs": torch.rand(total, vocabulary).softmax(-1),
        "uniform": torch.rand(total, dtype=torch.float64),
        "inverse": torch.rand(len(counts), vocabulary),
        "greedy": torch.arange(len(counts)) % 2 == 0,
    }


def _verify(counts: list[int], accepted: list[bool], written: list[int], bonus: list[int]) -> list:
    """Return what each sequence gets, -1 where nothing is written."""
    width, start, rows = max([*counts, 1]), 0, []
    for i, count in enumerate(counts):
        row = [-1] * (width + 1)
        for j in range(count):
            row[j] = written[start + j]
            if not accepted[start + j]:
                break
        else:
            row[count] = bonus[i]
        rows.append(row)
        start += count
    return rows


@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_greedy_rejection(counts: list[int], everyone: bool, device: torch.device) -> None:
    told = _draw(counts)
    width = max([*counts, 1])
    out = torch.full((len(counts), width + 1), -1, dtype=torch.int32, device=device)
    greedy = None if everyone else told["greedy"].to(device)
    npu_kernels.reject_greedily(
        out,
        _ends(counts).to(device),
        told["drafts"].to(device),
        told["argmax"].to(device),
        told["bonus"].to(device),
        greedy,
        width,
    )
    accepted = (told["drafts"] == told["argmax"]).tolist()
    want = _verify(counts, accepted, told["argmax"].tolist(), told["bonus"].flatten().tolist())
    for i, row in enumerate(out.cpu().tolist()):
        mine = everyone or bool(told["greedy"][i])
        assert row == (want[i] if mine else [-1] * (width + 1))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_random_rejection(counts: list[int], known: bool, device: torch.device) -> None:
    """``known``: the proposer says how likely its drafts were; an n-gram proposer does not."""
    told = _draw(counts)
    width = max([*counts, 1])
    out = torch.full((len(counts), width + 1), -1, dtype=torch.int32, device=device)
    npu_kernels.reject_randomly(
        out,
        _ends(counts).to(device),
        told["drafts"].to(device),
        told["draft_probs"].to(device) if known else None,
        told["target"].to(device),
        told["bonus"].to(device),
        told["recovered"].to(device),
        told["uniform"].to(device),
        told["greedy"].to(device),
        width,
        5,
        NO_DRAFT_PROBS=not known,
    )
    accepted, written = [], []
    for i, draft in enumerate(told["drafts"].tolist()):
        before = float(told["draft_probs"][i, draft]) if known else 1.0
        taken = float(told["target"][i, draft]) / before >= float(told["uniform"][i])
        accepted.append(taken)
        written.append(draft if taken else int(told["recovered"][i]))
    want = _verify(counts, accepted, written, told["bonus"].flatten().tolist())
    for i, row in enumerate(out.cpu().tolist()):
        assert row == ([-1] * (width + 1) if bool(told["greedy"][i]) else want[i])


@pytest.mark.parametrize("known", [True, False])
def test_recovered_tokens(known: bool, device: torch.device) -> None:
    counts = [3, 0, 2]
    told = _draw(counts)
    out = torch.empty(5, dtype=torch.int32, device=device)
    npu_kernels.sample_recovered(
        out,
        _ends(counts).to(device),
        told["drafts"].to(device),
        told["draft_probs"].to(device) if known else None,
        told["target"].to(device),
        told["inverse"].to(device),
        5,
        NO_DRAFT_PROBS=not known,
    )
    for i, owner in enumerate([0, 0, 0, 2, 2]):
        probs = told["target"][i].clone()
        if known:
            probs = (probs - told["draft_probs"][i]).clamp(min=0)
        else:
            probs[told["drafts"][i]] = 0
        assert int(out[i]) == int((probs * told["inverse"][owner]).argmax())


def test_values_of_sequences_are_given_to_their_tokens(device: torch.device) -> None:
    out = torch.zeros(5, device=device)
    values = torch.tensor([1.0, 2.0, 3.0], device=device)
    npu_kernels.expand(out, values, _ends([3, 0, 2]).to(device), 3.0, 9.0)
    assert out.cpu().tolist() == [1.0, 1.0, 1.0, 9.0, 9.0]


def test_drafts_advance(device: torch.device) -> None:
    """One position, slot and length further; the last sequence is at the end of the model."""
    block, longest = 16, 64
    table = torch.randperm(12).to(torch.int32).view(3, 4)
    positions = torch.tensor([5, 31, 63])
    lengths = torch.tensor([6, 32, 64, 9], dtype=torch.int32, device=device)
    out = torch.full((3,), 99, device=device)
    slots = torch.full((5,), 99, device=device)
    npu_kernels.advance_drafts(
        positions.to(device), table.to(device), 4, lengths, out, slots, block, longest, 4, -1, 3
    )
    assert out.cpu().tolist() == [6, 32, 0]
    want = [int(table[0, 0]) * block + 6, int(table[1, 2]) * block]
    assert slots.cpu().tolist() == [*want, -1, -1, -1]
    assert lengths.cpu().tolist() == [7, 33, 1, 9]
