"""A tokenizer for tiny models."""

from __future__ import annotations

from pathlib import Path


def write_tokenizer(path: Path, *, begin: bool = False) -> None:
    """Write a tokenizer with one token per byte; ``begin``: it puts token 0 before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # As many tokens as the model has; two bytes that no text has give way to the special ones.
    words = ["<s>", "</s>", *[c for c in alphabet if c not in "ÿþ"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
