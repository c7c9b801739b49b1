"""Prose with many paragraphs for the training of draft layers."""

from __future__ import annotations

TEXT = "\n\n".join(
    f"Paragraph {i} says that a page holds one block of tokens of one layer, with everything that "
    f"attention over it needs, and that number {i * 7} is {'odd' if i % 2 else 'even'}; it goes on "
    "for a while so that there is something to continue, and then it ends."
    for i in range(40)
)
