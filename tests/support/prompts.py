"""Prompts of token ids and of text, the same in every run."""

from __future__ import annotations

import random


def mixed_prompts(vocabulary: int = 256, longest: int = 3000) -> list[list[int]]:
    """Forty-eight prompts of 1 to ``longest`` tokens, many around multiples of a block."""
    edges = [size + step for size in (16, 32, 48, 64, 96, 128, 256) for step in (-1, 0, 1)]
    lengths = [1, 2, 3, 5, 7, 11, *edges, 80, 95, 97, 100, 150, 191, 193, 200, 222, 288, 300]
    lengths += [350, 383, 400, 511, 513, 600, 777, 1000, 1500, longest]
    return [tokens(length, vocabulary, seed=i) for i, length in enumerate(lengths)]


def tokens(count: int, vocabulary: int = 256, seed: int = 0) -> list[int]:
    """Random ids; the first two of a vocabulary are special."""
    draw = random.Random(seed)
    return [draw.randrange(2, vocabulary) for _ in range(count)]


def repetitive(count: int, seed: int = 0) -> list[int]:
    """A phrase of a few tokens again and again: what an n-gram proposer can continue."""
    phrase = tokens(7, seed=seed)
    return (phrase * (count // 7 + 1))[:count]


_STORY = (
    "A fox saw a crow sitting on a high branch with a piece of cheese in its beak. The fox was "
    "hungry and wanted the cheese for itself, so it began to praise the crow for its feathers. "
)

#: For the real model: questions, lists, code, and contexts of several blocks.
TEXTS = (
    "The capital of France is",
    "1, 2, 3, 4, 5,",
    "Water boils at",
    "def fibonacci(n):\n    ",
    "The three primary colors are",
    "Once upon a time there was a small",
    "Q: What is the largest planet of the solar system?\nA:",
    "To make bread you need flour,",
    _STORY * 2 + "The moral of this story is",
    _STORY * 5 + "Then the crow",
    _STORY * 9 + "Question: What did the fox want? Answer: The fox wanted",
    "The quick brown fox jumps over the lazy dog. " * 12 + "The quick brown",
)
