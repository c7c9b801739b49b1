"""Texts: read, tokenised, cut into windows that a model reads one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_plugin.kv_eval.errors import KVEvalError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Windows of tokens, spread evenly over the texts.

    Attributes:
        ids: int64 ``[windows, context + 1]``: what the model reads, and the token after it.
        digest: SHA-256 of ``ids``: of text, tokenizer and choice at once.
    """

    ids: torch.Tensor
    digest: str

    @property
    def context(self) -> int:
        """Tokens that the model reads at once."""
        return self.ids.shape[1] - 1

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return self.ids.shape[0] * self.context


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Read UTF-8 files.

    Raises:
        KVEvalError: one is missing, empty or not text.
    """
    texts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise KVEvalError(
                f"--text {path} cannot be read ({error.strerror}). Give a text file; "
                "tools/prepare_text.py makes two from Debian's books."
            ) from error
        except UnicodeDecodeError as error:
            raise KVEvalError(
                f"--text {path} is not UTF-8 text (byte {error.start}). Convert it, or give "
                "another file."
            ) from error
        if not text.strip():
            raise KVEvalError(f"--text {path} is empty. Give a file with prose.")
        texts.append(text)
    return texts


def text_digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts in their order."""
    state = hashlib.sha256()
    for text in texts:
        content = text.encode()
        state.update(f"{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


def cut_windows(
    texts: Sequence[str], tokenizer: Any, context: int, tokens: int, *, all_if_fewer: bool = False
) -> Windows:
    """Cut texts into windows and choose as many as asked for, evenly over all of them.

    A window lies within one text. It begins as the tokenizer begins a prompt (with the token that
    begins a text, if the tokenizer adds one).

    Args:
        texts: what to cut.
        tokenizer: of transformers.
        context: tokens that the model reads at once.
        tokens: how many to read; rounded up to whole windows.
        all_if_fewer: take all there is if that is less, instead of refusing.

    Raises:
        KVEvalError: the texts are too short.
    """
    import torch

    prefix = _prefix(tokenizer)
    fresh = context + 1 - len(prefix)  # of the text; the last one is only predicted
    windows: list[list[int]] = []
    found = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found += len(ids)
        starts = range(0, len(ids) - fresh + 1, context - len(prefix))
        windows += [prefix + ids[start : start + fresh] for start in starts]
    wanted = -(-tokens // context)
    if not windows:
        raise KVEvalError(
            f"the text has {found} tokens; one window of --context {context} needs {fresh} in one "
            "file. Give more text, or a smaller --context."
        )
    if len(windows) < wanted and not all_if_fewer:
        raise KVEvalError(
            f"the text has {len(windows)} windows of --context {context}; --tokens {tokens} needs "
            f"{wanted}. Give more text, or --tokens {len(windows) * context}."
        )
    count = min(wanted, len(windows))
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    table = torch.tensor(chosen, dtype=torch.int64)
    return Windows(table, hashlib.sha256(table.numpy().tobytes()).hexdigest())


def _prefix(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before a text by itself."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    for i in range(len(dressed) - len(plain) + 1):
        if dressed[i : i + len(plain)] == plain:
            return list(dressed[:i])
    return []
