"""Windows of tokens: where they lie, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ascend_plugin.kv_eval import KVEvalError
from ascend_plugin.kv_eval.text import calibration_windows, cut_windows, read_texts, text_digest


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


TEMPLATE = "{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}</s>{% endfor %}"


@pytest.fixture
def chatty(model_path):
    """The tiny model's tokenizer, with a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_every_fourth_window_is_a_conversation(chatty):
    text = "\n\n".join(f"Paragraph {i} says something." for i in range(60))
    windows = calibration_windows([text], chatty, context=128, tokens=8 * 128, chat=None)
    prose = calibration_windows([text], chatty, context=128, tokens=8 * 128, chat=False)
    assert windows.ids.shape == prose.ids.shape
    assert (windows.conversations, prose.conversations) == (2, 0)
    assert windows.digest != prose.digest
    for i, (row, plain) in enumerate(zip(windows.ids, prose.ids, strict=True)):
        if i % 4:
            assert torch.equal(row, plain)
            continue
        said = chatty.decode(row)
        assert said.startswith("[user]Paragraph")
        assert "</s>[assistant]Paragraph" in said
        assert 1 in row.tolist()  # the template's own token


def test_one_long_paragraph_is_said_by_both(chatty):
    text = "word " * 400
    windows = calibration_windows([text], chatty, context=64, tokens=64, chat=True)
    assert "</s>[assistant]word" in chatty.decode(windows.ids[0])


def test_without_a_template_there_is_only_prose(chatty):
    chatty.chat_template = None
    text = "word " * 100
    assert calibration_windows([text], chatty, 64, 64, chat=None).conversations == 0
    with pytest.raises(KVEvalError, match=r"no chat template.*--no-chat"):
        calibration_windows([text], chatty, 64, 64, chat=True)


def test_a_template_that_refuses(chatty):
    chatty.chat_template = "{{ raise_exception('system turn first') }}"
    with pytest.raises(KVEvalError, match=r"refuses.*system turn first.*--no-chat"):
        calibration_windows(["word " * 100], chatty, 64, 64, chat=None)
