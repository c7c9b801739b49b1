"""Which tokens a draft head keeps: files, defaults and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ascend_plugin.config import ConfigError
from ascend_plugin.spec_decode.token_order import (
    DEFAULT_TOKENS,
    TENSOR,
    VOCABULARY,
    TokenOrder,
    load_order,
    save_order,
)


def order(*tokens: int, vocabulary: int = 10) -> TokenOrder:
    return TokenOrder(torch.tensor(tokens, dtype=torch.int32), vocabulary)


def test_a_file_keeps_the_order(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_order(path, order(7, 2, 5), {"model": "small"})
    found = load_order(path)
    assert (found.tokens.tolist(), found.vocabulary) == ([7, 2, 5], 10)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("count", "always", "kept"),
    [
        (2, (), [2, 7]),
        (2, (9,), [2, 7, 9]),
        (2, (7,), [2, 7]),
        (None, (), [2, 5, 7]),
        (3, {0}, [0, 2, 5, 7]),
    ],
)
def test_the_most_frequent_are_kept_and_what_ends_a_text(count, always, kept) -> None:
    assert order(7, 2, 5).kept(count, always).tolist() == kept


def test_by_default_the_first_thousands() -> None:
    many = TokenOrder(torch.arange(20_000, dtype=torch.int32).flip(0), 20_000)
    kept = many.kept(None, {0})
    assert len(kept) == DEFAULT_TOKENS + 1
    assert kept[0] == 0
    assert kept[1] == 20_000 - DEFAULT_TOKENS


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "message"),
    [
        ([3, 10], 10, r"has the token id 10; the vocabulary has 0 to 9\. Make one with"),
        ([-1, 3], 10, r"has the token id -1"),
        ([3, 3], 10, "names a token twice"),
        ([], 10, "must be int32 with 1 to 10 token ids"),
        ([0, 1, 2], 2, r"\[3\]; it must be int32 with 1 to 2 token ids"),
    ],
)
def test_what_is_no_order_is_refused(tokens, vocabulary, message) -> None:
    with pytest.raises(ConfigError, match=message):
        order(*tokens, vocabulary=vocabulary)
    with pytest.raises(ConfigError, match="must be int32"):
        TokenOrder(torch.tensor([1.0]), 10)


def test_more_than_is_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens=4 is more than is known: the order has 3 tokens"):
        order(7, 2, 5).kept(4, ())
    with pytest.raises(ConfigError, match="ends texts with token 10"):
        order(7, 2, 5).kept(2, (10,))
    with pytest.raises(
        ConfigError, match="f orders a vocabulary of 10 tokens, and the model has 9"
    ):
        order(7).check_vocabulary(9, "f")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    tokens = {TENSOR: torch.tensor([1], dtype=torch.int32)}
    for tensors, about in (
        ({"x": torch.ones(1)}, {VOCABULARY: "3"}),
        (tokens, {}),
        (tokens, {VOCABULARY: "x"}),
    ):
        save_file(tensors, path, about or None)
        with pytest.raises(ConfigError, match=r"cannot be read as an order of tokens .*mtp head"):
            load_order(path)
    path.write_bytes(b"x" * 40)
    with pytest.raises(ConfigError, match="cannot be read as an order of tokens"):
        load_order(path)
    with pytest.raises(ConfigError, match="cannot be read as an order of tokens"):
        load_order(tmp_path / "missing")
    save_file(tokens, path, {VOCABULARY: "1"})
    with pytest.raises(ConfigError, match="has the token id 1; the vocabulary has 0 to 0"):
        load_order(path)
