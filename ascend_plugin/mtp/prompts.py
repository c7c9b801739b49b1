"""What a base model is asked, so that it writes the text that its draft layer learns from.

Chat prompts are the model's own: given the beginning of a user's turn it writes the question
(Magpie, Xu et al. 2024, arXiv:2406.08464). Prose prompts are the beginnings of paragraphs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

#: Beginnings of a user's turn; the empty ones leave the model free.
STARTERS = (
    *("",) * 6,
    *("What", "How", "Write", "Explain", "Describe", "Can you", "Why", "List", "Give me"),
    *("Summarize", "Tell me", "I need", "Who", "Create", "Is it", "Compare", "Translate", "Please"),
    *("Help me", "Suggest", "When", "Which", "Where", "Write a story", "Write a Python", "I want"),
    *("Calculate", "Name", "Provide", "Rewrite", "Classify", "Generate", "Do you", "Should I"),
)

_MARK = "\x00question\x00"
#: Characters of a question: shorter ones say nothing, longer ones run on.
_QUESTION = (12, 400)
#: Words of a paragraph that make a prompt, at least and at most.
_OPENING = (8, 40)
#: A paragraph with fewer words has nothing to continue.
_PARAGRAPH = 30


def chat_frame(tokenizer: Any) -> tuple[str, str] | None:
    """Return what stands before and after a user's words in a chat prompt; None without template.

    Args:
        tokenizer: of transformers.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = text.partition(_MARK)
    return (before, after) if found else None


def question_starts(frame: tuple[str, str], count: int, seed: int) -> list[str]:
    """Return ``count`` beginnings of chat prompts whose user's turn the model completes."""
    draw = random.Random(f"{seed} starts")
    return [frame[0] + draw.choice(STARTERS) for _ in range(count)]


def questions(frame: tuple[str, str], starts: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Join beginnings and completions to questions; drop repeated, short and endless ones.

    Returns:
        Questions in the order of their first appearance.
    """
    found: dict[str, None] = {}
    for start, text in zip(starts, texts, strict=True):
        question = (start.removeprefix(frame[0]) + text).strip()
        if _QUESTION[0] <= len(question) <= _QUESTION[1]:
            found[question] = None
    return list(found)


def openings(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Return beginnings of paragraphs, of several lengths, drawn from all texts.

    Args:
        texts: prose; paragraphs are separated by an empty line.
        count: how many; fewer if there are fewer paragraphs.
        seed: of the choice.
    """
    paragraphs = {
        paragraph.strip()
        for text in texts
        for paragraph in text.split("\n\n")
        if len(paragraph.split()) >= _PARAGRAPH
    }
    draw = random.Random(f"{seed} openings")
    chosen = draw.sample(sorted(paragraphs), min(count, len(paragraphs)))
    return [" ".join(paragraph.split()[: draw.randint(*_OPENING)]) for paragraph in chosen]
