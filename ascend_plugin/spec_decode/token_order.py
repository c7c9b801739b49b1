"""Which tokens a draft head keeps: a vocabulary's tokens by how often they occur, in a file.

``ascend-plugin mtp train`` writes the order beside the layer, ``mtp attach`` into the checkpoint,
``mtp head`` makes a file of it from text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from ascend_plugin.config import ConfigError

#: The file of a checkpoint that holds the order. It is in no index of weights, so vLLM skips it.
FILE: Final = "draft_head.safetensors"
#: The order, beside other tensors or alone.
TENSOR: Final = "draft_head.tokens"
#: What a file with an order says beside it.
VOCABULARY: Final = "draft_head.vocabulary"
#: Tokens that are kept where the settings name no number: as many as training looks at, so that
#: none is left out that the layer has learnt to draft.
DEFAULT_TOKENS: Final = 12288

_REMEDY = "Make one with 'ascend-plugin mtp head MODEL --text FILE -o FILE'."


@dataclass(frozen=True, slots=True, eq=False)
class TokenOrder:
    """Tokens of a vocabulary, most frequent first.

    Attributes:
        tokens: int32 ``[count]``, each once.
        vocabulary: how many tokens the model has.

    Raises:
        ConfigError: there are none, too many, some twice, or some that the vocabulary lacks.
    """

    tokens: torch.Tensor
    vocabulary: int

    def __post_init__(self) -> None:
        """Refuse what is no order of a vocabulary's tokens."""
        tokens, size = self.tokens, self.vocabulary
        if tokens.dtype != torch.int32 or tokens.dim() != 1 or not 0 < len(tokens) <= size:
            raise ConfigError(
                f"{TENSOR} is {tokens.dtype} {list(tokens.shape)}; it must be int32 with 1 to "
                f"{size} token ids. {_REMEDY}"
            )
        worst = next((int(t) for t in (tokens.min(), tokens.max()) if not 0 <= t < size), None)
        if worst is not None:
            raise ConfigError(
                f"{TENSOR} has the token id {worst}; the vocabulary has 0 to {size - 1}. {_REMEDY}"
            )
        if len(tokens.unique()) != len(tokens):
            raise ConfigError(f"{TENSOR} names a token twice. {_REMEDY}")

    def kept(self, count: int | None, always: Collection[int]) -> torch.Tensor:
        """Return the tokens of a head, int64 ``[kept]``, ascending: ties fall as in the whole head.

        Args:
            count: how many of the most frequent; None: the default, or all if there are fewer.
            always: kept whatever their place, such as the ends of a text.

        Raises:
            ConfigError: the order has fewer, or one of ``always`` is out of the vocabulary.
        """
        if count is not None and count > len(self.tokens):
            raise ConfigError(
                f"speculation.draft_head.tokens={count} is more than is known: the order has "
                f"{len(self.tokens)} tokens of a vocabulary of {self.vocabulary}. Lower it, or "
                "make the file again from more text."
            )
        outside = [token for token in always if not 0 <= token < self.vocabulary]
        if outside:
            raise ConfigError(
                f"the model ends texts with token {outside[0]}; a draft head of a vocabulary of "
                f"{self.vocabulary} cannot keep it. Is the file of another model? {_REMEDY}"
            )
        first = self.tokens[: DEFAULT_TOKENS if count is None else count].long()
        return torch.cat([first, torch.tensor(sorted(always), dtype=torch.int64)]).unique()

    def check_vocabulary(self, vocabulary: int, path: Path | str) -> None:
        """Refuse an order of another vocabulary.

        Raises:
            ConfigError: the model has more tokens, or fewer.
        """
        if self.vocabulary != vocabulary:
            raise ConfigError(
                f"{path} orders a vocabulary of {self.vocabulary} tokens, and the model has "
                f"{vocabulary}: it is of another model. {_REMEDY}"
            )

    def metadata(self) -> dict[str, str]:
        """Return what a file must say beside the tensor."""
        return {VOCABULARY: str(self.vocabulary)}


def save_order(path: Path, order: TokenOrder, about: Mapping[str, str]) -> None:
    """Write an order alone.

    Args:
        path: of the file.
        order: what to write.
        about: further metadata.
    """
    from safetensors.torch import save_file

    staged = path.with_name(path.name + ".new")
    save_file({TENSOR: order.tokens.contiguous()}, staged, {**about, **order.metadata()})
    staged.replace(path)


def load_order(path: Path) -> TokenOrder:
    """Return the order in a file: one of ``mtp head``, a layer's, or a checkpoint's.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            tokens = file.get_tensor(TENSOR)
        return TokenOrder(tokens, int(about[VOCABULARY]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} cannot be read as an order of tokens for a draft head ({error}). {_REMEDY}"
        ) from error
