"""What the base says about a text, kept on disk: hidden states and its most likely next tokens.

Computed once; training reads it again and again. About 1.3 KB per token at a hidden size of 576.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ascend_plugin.mtp.base import BaseModel
from ascend_plugin.mtp.sampling import Progress, Sample

#: Most likely tokens kept per position: the rest has little mass, which the objective leaves out.
TOP = 16
#: Tokens of a sequence at most; a longer one is cut.
LONGEST = 512
_SEQUENCES_PER_FILE = 64
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One sequence as the base read it.

    Attributes:
        ids: int64 ``[tokens]``.
        start: index of the first token that the base wrote itself; 0 for a given text.
        hidden: bfloat16 ``[tokens, hidden]``, before the final norm.
        top_ids: int32 ``[tokens, TOP]``, the most likely next tokens, best first.
        top_logprobs: float16 ``[tokens, TOP]``, of these, under the whole vocabulary.
    """

    ids: torch.Tensor
    start: int
    hidden: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def text_samples(texts: Sequence[list[int]], length: int, count: int) -> list[Sample]:
    """Cut tokenised texts into at most ``count`` pieces, evenly spread; the base is only to read.

    Args:
        texts: token ids of each text.
        length: tokens of a piece.
        count: how many.
    """
    pieces = [
        text[start : start + length]
        for text in texts
        for start in range(0, len(text) - length + 1, length)
    ]
    count = min(count, len(pieces))
    chosen = [pieces[i * len(pieces) // count] for i in range(count)]
    return [Sample("prose", False, [], piece) for piece in chosen]


class HiddenCache:
    """Readings in a folder, some sequences to a file; a file is whole or not there."""

    def __init__(self, folder: Path, name: str) -> None:
        """Name the folder and what its files begin with."""
        self._folder, self._name = folder, name
        self._paths: list[Path] = []

    def fill(self, base: BaseModel, samples: Sequence[Sample], report: Progress) -> None:
        """Read what is not yet read.

        Args:
            base: reads.
            samples: all of them, in the same order each time.
            report: told of progress.
        """
        from safetensors.torch import save_file

        self._folder.mkdir(parents=True, exist_ok=True)
        self._paths = []
        for start in range(0, len(samples), _SEQUENCES_PER_FILE):
            part = samples[start : start + _SEQUENCES_PER_FILE]
            path = self._folder / f"{self._name}-{start:06d}-{len(part):02d}.safetensors"
            self._paths.append(path)
            if path.exists():
                continue
            report(f"hidden states: {self._name}", start, len(samples))
            staged = path.with_suffix(".new")
            save_file(_read(base, part), staged)
            staged.replace(path)

    def load(self) -> list[Reading]:
        """Return the readings of the samples that ``fill`` was given."""
        from safetensors import safe_open

        readings = []
        for path in self._paths:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            lengths = tensors["lengths"].tolist()
            columns = [
                tensors[name].split(lengths)
                for name in ("ids", "hidden", "top_ids", "top_logprobs")
            ]
            starts = tensors["starts"].tolist()
            readings += [
                Reading(ids, start, hidden, top_ids, logprobs)
                for start, ids, hidden, top_ids, logprobs in zip(starts, *columns, strict=True)
            ]
        return readings


def _read(base: BaseModel, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Return the tensors of one file: sequences one after the other along dimension 0."""
    sequences = [(sample.prompt + sample.completion)[:LONGEST] for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: len(sequences[i]))
    rows: dict[int, list[torch.Tensor]] = {}
    while order:
        longest = len(sequences[order[-1]])
        count = max(1, min(len(order), _TOKENS_PER_BATCH // longest))
        batch, order = order[-count:], order[:-count]
        ids = torch.zeros(count, longest, dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
        hidden, normed = base.read(ids)
        for row, i in enumerate(batch):
            used = len(sequences[i])
            rows[i] = [ids[row, :used], hidden[row, :used].cpu(), *_top(base, normed[row, :used])]
    columns = [torch.cat(column) for column in zip(*(rows[i] for i in sorted(rows)), strict=True)]
    names = ("ids", "hidden", "top_ids", "top_logprobs")
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    starts = torch.tensor([len(sample.prompt) for sample in samples])
    return dict(zip(names, columns, strict=True)) | {"lengths": lengths, "starts": starts}


@torch.no_grad()
def _top(base: BaseModel, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and logprobs of the most likely next tokens of ``normed`` ``[tokens, hidden]``."""
    logits = (normed @ base.head.T).float()  # [tokens, vocabulary]
    values, ids = logits.topk(TOP, dim=-1)
    logprobs = values - logits.logsumexp(-1, keepdim=True)
    return ids.int().cpu(), logprobs.half().cpu()
