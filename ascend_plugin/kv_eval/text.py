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

#: One window of so many becomes a conversation.
_CONVERSATION_EVERY = 4


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Windows of tokens, spread evenly over the texts.

    Attributes:
        ids: int64 ``[windows, context + 1]``: what the model reads, and the token after it.
        conversations: how many of them are in the form of the chat template.
    """

    ids: torch.Tensor
    conversations: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of ``ids``: of text, tokenizer and choice at once."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()

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
    return Windows(torch.tensor(chosen, dtype=torch.int64))


def calibration_windows(
    texts: Sequence[str], tokenizer: Any, context: int, tokens: int, chat: bool | None
) -> Windows:
    """Cut windows, some of them as conversations.

    Args:
        texts, tokenizer, context, tokens: as in ``cut_windows``; all there is if that is less.
        chat: whether there are conversations; None: if the tokenizer has a chat template.

    Raises:
        KVEvalError: the texts are too short, or there is no template although ``chat`` asks.
    """
    windows = cut_windows(texts, tokenizer, context, tokens, all_if_fewer=True)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise KVEvalError(
            "--chat: the tokenizer has no chat template. Put one into the checkpoint "
            "(chat_template.jinja), or use --no-chat."
        )
    wanted = has_template if chat is None else chat
    return with_conversations(windows, tokenizer) if wanted else windows


def with_conversations(windows: Windows, tokenizer: Any) -> Windows:
    """Put every fourth window into the form in which a chat server gets its prompts.

    A template's own tokens have keys and values that no prose has, and often the largest of all:
    static scales that never saw them saturate in every chat.

    Args:
        windows: of prose.
        tokenizer: of transformers, with a chat template.

    Returns:
        The same windows; in every fourth, the first included, the prose is what user and assistant
        say in turn, paragraph by paragraph, cut to the same length.

    Raises:
        KVEvalError: the template does not take such a conversation.
    """
    ids = windows.ids.clone()
    length = ids.shape[1]
    for row in ids[::_CONVERSATION_EVERY]:
        dressed = _conversation(tokenizer.decode(row, skip_special_tokens=True), tokenizer)
        # The template's tokens come on top, so there is no lack; but a tokenizer may read its own
        # output in fewer tokens, and then the last ones of the prose stay.
        kept = dressed[:length]
        row[: len(kept)] = row.new_tensor(kept)
    return Windows(ids, conversations=len(ids[::_CONVERSATION_EVERY]))


def _conversation(text: str, tokenizer: Any) -> list[int]:
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) < 2:
        words = text.split()
        middle = len(words) // 2
        paragraphs = [" ".join(words[:middle]), " ".join(words[middle:])]
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(paragraphs)
    ]
    try:
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    except Exception as error:  # templates are programs: they raise what they like
        raise KVEvalError(
            f"the chat template of the tokenizer refuses a conversation of user and assistant "
            f"({type(error).__name__}: {error}). Calibrate on prose alone: --no-chat."
        ) from error
    return list(ids)


def _prefix(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before a text by itself."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    for i in range(len(dressed) - len(plain) + 1):
        if dressed[i : i + len(plain)] == plain:
            return list(dressed[:i])
    return []
