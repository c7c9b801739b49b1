"""The real SmolLM2 against transformers and against a tokenizer written out in the plain."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_plugin.model.gguf_source import locate_gguf, obtain_gguf
from ascend_plugin.model.smollm2 import SMOLLM2

pytestmark = pytest.mark.model
transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    " ",
    "The capital of France is Paris.",
    "In 1984, 12345 + 67890 = 80235; pi is 3.14159 and 7½ is Ⅷ-ish, ٣ too.",
    "   leading,   inner\t\ttabs\nlines\r\n\r\nand trailing   ",
    "don't we're I'LL they've 'tis it's",
    "naïve café — “quotes” … 漢字かな 한국어 עברית हिन्दी 👩‍👩‍👧‍👦 e\u0301",
    "def f(x):\n    return x**2  # 2nd\n",
    "\x00\x7f\ufeff\u200b\u2028\U0010ffff",
    "a" * 300 + "1" * 40,
]

# SmolLM2's vocabulary has no token for these, nor an unknown token: text loses them. The others
# without a token (C0, C1, F5 to FF) are in no UTF-8 text.
UNKNOWN_BYTES = set(b"\x04\x06\x13\x14\x16\x1d\xf1\xf2")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF: SMOLLM2_GGUF, else an installed one, else downloaded."""
    given = os.environ.get("SMOLLM2_GGUF")
    origin = locate_gguf(SMOLLM2, Path(given) if given else None)
    return obtain_gguf(origin, SMOLLM2, tmp_path_factory.mktemp("gguf"), lambda *_: None)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def plain_encode(gguf: Path) -> Any:
    """Encodes text without special tokens by the definition of the tokenizer, without a library.

    Every numeric character stands alone, the rest is cut by GPT-2's expression, and in each
    piece the neighbours that were merged first in training are merged first. A byte without a
    token (UNKNOWN_BYTES) is left out.
    """
    regex = pytest.importorskip("regex")
    from ascend_plugin.model.llama_gguf import open_gguf

    opened = open_gguf(gguf)
    ids = {token: i for i, token in enumerate(opened.value("tokenizer.ggml.tokens"))}
    merges = opened.value("tokenizer.ggml.merges")
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    pieces = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}

    def merge(parts: list[str]) -> list[str]:
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            at = pairs.index(best)
            parts = [*parts[:at], "".join(best), *parts[at + 2 :]]
        return parts

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for part in regex.findall(r"\p{N}|\P{N}+", text):
            for piece in pieces.findall(part):
                known = [symbols[byte] for byte in piece.encode() if symbols[byte] in ids]
                found += [ids[token] for token in merge(known)]
        return found

    return encode


def test_tensors_equal_those_of_transformers(smollm2: Path, gguf: Path) -> None:
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    ).state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(smollm2).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], tensor), name


def test_configuration(smollm2: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(smollm2)
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (576, 30, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    generation = transformers.GenerationConfig.from_pretrained(smollm2)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_texts_encode_as_defined_and_come_back(
    tokenizer: Any, plain_encode: Any, text: str
) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == plain_encode(text)
    assert tokenizer.decode(ids) == text


@given(text=st.text(max_size=60))
def test_any_text_encodes_as_defined_and_comes_back(
    tokenizer: Any, plain_encode: Any, text: str
) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == plain_encode(text)
    if not UNKNOWN_BYTES & set(text.encode()):
        assert tokenizer.decode(ids) == text


def test_bytes_without_a_token_are_dropped(tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer("ne\x06w")["input_ids"]) == "new"


def test_without_digits_it_equals_the_import_of_transformers(tokenizer: Any, gguf: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    texts = [text for text in TEXTS if not any(character.isnumeric() for character in text)]
    assert tokenizer(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert len(tokenizer) == len(theirs) == 49152


def test_special_tokens(tokenizer: Any) -> None:
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>1<|endoftext|>")["input_ids"]
    assert (ids[0], ids.count(2), ids[-1]) == (1, 1, 0)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>1<|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi1"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>")
    x, y = (tokenizer(letter)["input_ids"] for letter in "xy")
    for i in range(17):
        text = tokenizer.convert_ids_to_tokens(i)
        assert tokenizer(f"x{text}y")["input_ids"] == [*x, i, *y]


def test_chat_template(tokenizer: Any) -> None:
    system = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n"
    )
    user = [{"role": "user", "content": "What is 2+2?"}]
    rendered = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    turn = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == system + turn
    own = [{"role": "system", "content": "Be brief."}, *user]
    assert tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + turn
    )
