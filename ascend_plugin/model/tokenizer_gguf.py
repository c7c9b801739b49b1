"""The tokenizer of a GGUF as Hugging Face files.

GGUF names its pre-tokenizer (``tokenizer.ggml.pre``) and leaves the meaning to the reader.
``smollm`` splits off every digit before the byte-level step; transformers' own GGUF import
drops that and so tokenizes numbers differently from the original model.

SmolLM2's vocabulary has no token for six control characters (0x04, 0x06, 0x13, 0x14, 0x16,
0x1d) and for the bytes 0xf1 and 0xf2, and no unknown token: text loses these, as with the
original tokenizer.
"""

from __future__ import annotations

import json
from typing import Any

from ascend_plugin.model.errors import ModelSourceError
from ascend_plugin.model.llama_gguf import GgufFile

_NORMAL, _CONTROL = 1, 3  # gguf.TokenType


def tokenizer_files(gguf: GgufFile) -> dict[str, str]:
    """Returns the text of the tokenizer files by file name.

    Raises:
        ModelSourceError: If the tokenizer is not a byte-level BPE of the kind ``smollm``.
    """
    for key, supported in (("model", "gpt2"), ("pre", "smollm")):
        found = gguf.value(f"tokenizer.ggml.{key}")
        if found != supported:
            raise ModelSourceError(
                f"{gguf.path} has the tokenizer.ggml.{key} {found!r}, supported is "
                f"{supported!r}: give another GGUF."
            )
    tokens = gguf.value("tokenizer.ggml.tokens")
    vocabulary = gguf.value("llama.vocab_size")
    if len(tokens) != vocabulary:
        raise ModelSourceError(
            f"{gguf.path} has {len(tokens)} tokens for a vocabulary of {vocabulary}: "
            "give another GGUF."
        )
    return {
        "tokenizer.json": _tokenizer_json(gguf, tokens),
        "tokenizer_config.json": json.dumps(_tokenizer_config(gguf, tokens), indent=2) + "\n",
        "chat_template.jinja": gguf.value("tokenizer.chat_template"),
    }


def _tokenizer_json(gguf: GgufFile, tokens: list[str]) -> str:
    """Builds the byte-level BPE and returns its serialised form."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in gguf.value("tokenizer.ggml.merges")]
    try:
        bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    except Exception as err:  # The Rust library raises plain Exception.
        raise ModelSourceError(
            f"{gguf.path} has a damaged tokenizer ({err}): get the file again."
        ) from err
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, _token_kinds(gguf, len(tokens)), strict=True)
        if kind == _CONTROL
    ]
    tokenizer.add_special_tokens(special)
    return str(tokenizer.to_str(pretty=True))


def _token_kinds(gguf: GgufFile, count: int) -> list[int]:
    """Returns the kind of each token, all of them normal or control."""
    kinds: list[int] = gguf.value("tokenizer.ggml.token_type")
    if len(kinds) != count or not set(kinds) <= {_NORMAL, _CONTROL}:
        raise ModelSourceError(
            f"{gguf.path} has {len(kinds)} token types for {count} tokens, of the kinds "
            f"{sorted(set(kinds))}, supported are {_NORMAL} and {_CONTROL}: give another GGUF."
        )
    return kinds


def _tokenizer_config(gguf: GgufFile, tokens: list[str]) -> dict[str, Any]:
    def token(name: str) -> str:
        index: int = gguf.value(f"tokenizer.ggml.{name}_token_id")
        return tokens[index]

    return {
        # The general class takes tokenizer.json as it is; the class of a model family would
        # rebuild the pre-tokenizer in its own way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.value("llama.context_length"),
    }
