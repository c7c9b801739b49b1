"""The tiny float model that the committed checkpoints were made from: ``python base.py DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from ascend_plugin.model.tiny import write_tiny_llama

#: With special tokens as many as the model has.
_CHARACTERS = " \nabcdefghijklmnopqrstuvwxyz."


def write_base(folder: Path) -> None:
    """Write model and tokenizer; a token is a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_tiny_llama(
        folder,
        hidden=128,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=64,
        vocab=32,
        intermediate=64,
        max_position=512,
    )
    words = ["<s>", "</s>", "<unk>", *_CHARACTERS]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


if __name__ == "__main__":
    write_base(Path(sys.argv[1]))
