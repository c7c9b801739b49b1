"""The order in which a draft head keeps tokens, counted in text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ascend_plugin.kv_eval.text import text_digest
from ascend_plugin.mtp.base import read_config
from ascend_plugin.mtp.errors import MTPError
from ascend_plugin.spec_decode.token_order import TokenOrder, save_order

#: Sizes of heads whose share of the text is told.
_TOLD = (4096, 8192, 16384)


def write_head(model: Path, texts: Sequence[str], output: Path) -> dict[int, float]:
    """Write the order of a model's tokens by how often texts have them.

    Tokens that the tokenizer adds to its vocabulary (turns of a chat, ends of a text) come first:
    a text hardly ever has them.

    Args:
        model: folder of a checkpoint.
        texts: like what will be generated.
        output: file to write.

    Returns:
        For sizes of a head the share of the texts' tokens that it has.

    Raises:
        MTPError: the model has no tokenizer, or the file would be taken for weights.
    """
    if output.suffix != ".safetensors" or (output.parent / "config.json").exists():
        raise MTPError(
            f"--output {output} is not possible: it must end in .safetensors and lie outside of a "
            "checkpoint's folder, where it would be taken for weights."
        )
    size = _vocabulary(model)
    tokenizer = _tokenizer(model)
    ids = [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in texts]
    counts = torch.zeros(size)
    for part in ids:
        counts += torch.bincount(torch.tensor(part, dtype=torch.int64), minlength=size)[:size]
    seen = counts.clone()
    added = [token for token in tokenizer.get_added_vocab().values() if token < size]
    counts[added] = torch.inf
    ranked = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    about = {"format": "pt", "model": model.resolve().name, "text_sha256": text_digest(texts)}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_order(output, TokenOrder(ranked.int(), size), about)
    shares = seen[ranked].cumsum(0) / seen.sum()
    told = sorted({min(count, len(ranked)) for count in _TOLD})
    return {count: round(float(shares[count - 1]), 4) for count in told}


def _vocabulary(model: Path) -> int:
    config = read_config(model)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not size:
        raise MTPError(f"{model}/config.json has no vocab_size.")
    return int(size)


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MTPError(f"the tokenizer of {model} cannot be loaded: {reason}") from error
