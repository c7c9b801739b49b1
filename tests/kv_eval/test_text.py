"""Windows of tokens: where they lie, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ascend_plugin.kv_eval import KVEvalError
from ascend_plugin.kv_eval.text import cut_windows, read_texts, text_digest


class Bytes:
    """A tokenizer with one token per byte."""

    def __init__(self, prefix=()):
        self.prefix = list(prefix)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [c + 10 for c in text.encode()]
        return {"input_ids": (self.prefix if add_special_tokens else []) + ids}


def test_windows_are_spread_over_the_text_and_carry_the_next_token():
    text = "".join(chr(33 + i) for i in range(81))
    windows = cut_windows([text], Bytes(), context=8, tokens=40)
    assert windows.ids.shape == (5, 9)
    assert windows.tokens == 40
    assert windows.ids[:, 0].tolist() == [43, 43 + 16, 43 + 32, 43 + 48, 43 + 64]
    assert bool((windows.ids[:, 1:] - windows.ids[:, :-1] == 1).all())


def test_a_window_begins_as_a_prompt_does():
    windows = cut_windows(["x" * 100], Bytes(prefix=[1, 2]), context=8, tokens=16)
    assert windows.ids[:, :2].tolist() == [[1, 2], [1, 2]]
    assert windows.ids.shape == (2, 9)


def test_a_window_lies_in_one_text():
    windows = cut_windows(["a" * 20, "b" * 20], Bytes(), context=8, tokens=32)
    assert all(len(set(row)) == 1 for row in windows.ids.tolist())


def test_tokens_are_rounded_up_to_windows():
    assert cut_windows(["x" * 100], Bytes(), context=8, tokens=9).tokens == 16


def test_the_digest_sees_text_and_choice():
    one = cut_windows(["abc" * 40], Bytes(), context=8, tokens=16)
    same = cut_windows(["abc" * 40], Bytes(), context=8, tokens=16)
    other = cut_windows(["abd" * 40], Bytes(), context=8, tokens=16)
    more = cut_windows(["abc" * 40], Bytes(), context=8, tokens=24)
    assert torch.equal(one.ids, same.ids)
    assert one.digest == same.digest
    assert len({one.digest, other.digest, more.digest}) == 3
    assert text_digest(["a", "bc"]) != text_digest(["ab", "c"])


def test_short_texts_are_refused_or_taken_whole():
    with pytest.raises(KVEvalError, match=r"20 tokens.*--context 32 needs 33"):
        cut_windows(["x" * 20], Bytes(), context=32, tokens=32)
    with pytest.raises(KVEvalError, match=r"3 windows.*--tokens 64 needs 8.*or --tokens 24"):
        cut_windows(["x" * 30], Bytes(), context=8, tokens=64)
    assert cut_windows(["x" * 30], Bytes(), context=8, tokens=64, all_if_fewer=True).tokens == 24


@pytest.mark.parametrize(
    "content, words", [(None, "cannot be read"), (b" \n", "is empty"), (b"\xff\xfe", "UTF-8")]
)
def test_files_that_are_no_text(tmp_path, content, words):
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KVEvalError, match=words):
        read_texts([path])


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(KVEvalError, match="cannot be read"):
        read_texts([tmp_path])
