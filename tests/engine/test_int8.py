"""Int8 KV caches generate what an offline model with the same fake-quantised cache says.

The offline model knows no pages, chunks, blocks or drafts: whatever an engine does with its pages,
the logprobs must come out the same. Scales that are stale or missing change them by far more than
the tolerance (``test_the_tests_can_fail``).
"""

from __future__ import annotations

from typing import Any

import pytest
from engines import Answer, EngineProcess
from int8_engines import VARIANTS, Int8Models, median_distance
from offline_llama import TOLERANCE
from prompts import repetitive, tokens

pytestmark = pytest.mark.engine

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 60, 95, 97, 127, 128, 129, 200, 290, 400)
PROMPTS = [tokens(length, seed=i) for i, length in enumerate(LENGTHS)]
RUN = {"prompts": PROMPTS, "max_tokens": 24}

FEW = {"prompts": PROMPTS[7:15:2], "max_tokens": 12}


def _is_int8(answer: Answer, variant: str, implementation: str = "native") -> None:
    title = {"c8d": "", "c8s": "C8S", "c8p": "C8P"}[variant].title()
    assert answer.made_of["backends"] == [f"AscendCPUAttentionBackend{title}"]
    assert answer.made_of["dtypes"] == ["torch.int8"]
    assert set(answer.made_of["implementations"]["paged_attention"]) == {implementation}
    assert list(answer.counters) == [variant]


def test_the_tests_can_fail(int8: Int8Models) -> None:
    """Guards the others: variants, codes, block sizes and scales change the logprobs."""
    model, text = int8("llama"), tokens(400, seed=5)
    different = [
        (model.caches("c8d"), model.caches("c8s")),
        (model.caches("c8s"), model.caches("c8p")),
        (model.caches("c8d"), model.caches("c8p")),
        (model.caches("auto"), model.caches("c8s")),
        (model.caches("c8p"), model.caches("c8p", code="e3m0")),
        (model.caches("c8p"), model.caches("c8p", block_size=16)),
        (model.caches("c8s"), model.caches("c8s")[::-1]),  # scales of another layer
        (model.caches("c8s", "auto"), model.caches("auto", "c8s")),
    ]
    for one, two in different:
        assert median_distance(model, text, one, two) > 3 * TOLERANCE


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunked_prefill_and_decode(
    plugin: EngineProcess, int8: Int8Models, variant: str, block_size: int
) -> None:
    model = int8("llama")
    answer = plugin.run(model.engine(variant, block_size=block_size), RUN)
    _is_int8(answer, variant)
    model.check(answer, PROMPTS, model.caches(variant, block_size=block_size))
    rows, saturated, patched, without_slot = answer.counters[variant]
    written = sum(LENGTHS) + len(LENGTHS) * (RUN["max_tokens"] - 1)
    assert rows == written * 2 * 2 * model.offline.layers  # K and V, 2 kv heads
    assert (saturated > rows // 20) == (variant != "c8d")
    assert (patched > rows // 40) == (without_slot > rows // 100) == (variant == "c8p")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_gives_the_same(
    plugin: EngineProcess, int8: Int8Models, variant: str
) -> None:
    model = int8("llama")
    config = {"ops": {"implementation": "reference"}}
    answer = plugin.run(model.engine(variant, additional_config=config), FEW)
    _is_int8(answer, variant, "reference")
    model.check(answer, FEW["prompts"], model.caches(variant))


def test_the_other_code_of_patches(plugin: EngineProcess, int8: Int8Models) -> None:
    model = int8("llama")
    other = "e3m0"
    answer = plugin.run(model.engine("c8p", {"patch_code": other}, block_size=32), RUN)
    model.check(answer, PROMPTS, model.caches("c8p", block_size=32, code=other))


@pytest.mark.parametrize("variant", ["c8d", "c8p"])
def test_unchunked(plugin: EngineProcess, int8: Int8Models, variant: str) -> None:
    model = int8("llama")
    answer = plugin.run(model.engine(variant, max_num_batched_tokens=4096), RUN)
    model.check(answer, PROMPTS, model.caches(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_products_stay_close(plugin: EngineProcess, int8: Int8Models, variant: str) -> None:
    """Greedy choices of 8-bit products may differ, logprobs only a little."""
    model = int8("llama")
    run = {"prompts": [prompt for prompt in PROMPTS if len(prompt) > 50], "score": True}
    exact = plugin.run(model.engine(variant), run).runs[0]["scores"]
    fast = plugin.run(model.engine(variant, {"precision": "fast"}), run).runs[0]["scores"]
    pairs = [p for both in zip(exact, fast, strict=True) for p in zip(*both, strict=True)]
    error = sum(abs(a - b) for a, b in pairs) / len(pairs)
    assert 0 < error < 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefix_cache_hits(plugin: EngineProcess, int8: Int8Models, variant: str) -> None:
    """On pages that other requests wrote, long ago and in another order."""
    model = int8("llama")
    shared = tokens(330, seed=1)
    first = [shared + tokens(10, seed=2), tokens(200, seed=3)]
    between = [tokens(90 + 10 * i, seed=100 + i) for i in range(6)]
    again = [shared + tokens(n, seed=n) for n in (1, 40, 90)] + [shared[:200] + tokens(9), first[1]]
    runs = [{"prompts": prompts, "max_tokens": 20} for prompts in (first, between, again)]
    engine = model.engine(variant, block_size=16, enable_prefix_caching=True)
    answer = plugin.run(engine, *runs)
    for i, run in enumerate(runs):
        model.check(answer, run["prompts"], model.caches(variant, block_size=16), i)
    assert [output.cached for output in answer.outputs(0)] == [0, 0]
    assert [output.cached for output in answer.outputs(2)] == [320, 320, 320, 192, 192]


@pytest.mark.parametrize(
    ("variant", "caching"), [("c8d", True), ("c8s", True), ("c8p", True), ("c8p", False)]
)
def test_preemption_and_reused_blocks(
    plugin: EngineProcess, int8: Int8Models, variant: str, caching: bool
) -> None:
    """Blocks change hands without being cleared; preempted requests hit what is left of theirs."""
    model = int8("llama")
    prompts = [tokens(60 + 7 * i, seed=i) for i in range(14)]
    runs = [{"prompts": prompts, "max_tokens": 60}, {"prompts": prompts[::-1], "max_tokens": 60}]
    engine = model.engine(
        variant,
        block_size=16,
        max_model_len=1024,
        num_gpu_blocks_override=70,
        enable_prefix_caching=caching,
    )
    answer = plugin.run(engine, *runs)
    assert answer.metrics["vllm:num_preemptions"] > 5
    for i, run in enumerate(runs):
        model.check(answer, run["prompts"], model.caches(variant, block_size=16), i)


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["c8d", "c8p"])
def test_rejected_drafts(plugin: EngineProcess, int8: Int8Models, variant: str) -> None:
    """Drafts write rows, scales and patches that the accepted tokens write again."""
    model = int8("small vocabulary", vocab=24)
    prompts = [
        [2 + token % 22 for token in prompt]
        for prompt in [repetitive(20 + 17 * i, seed=i) for i in range(8)] + PROMPTS[::3]
    ]
    run = {"prompts": prompts, "max_tokens": 50}
    engine = model.engine(variant, block_size=16, speculative_config=NGRAM)
    answer = plugin.run(engine, run)
    model.check(answer, prompts, model.caches(variant, block_size=16))
    drafted = answer.metrics["vllm:spec_decode_num_draft_tokens"]
    accepted = answer.metrics["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < drafted, "nothing accepted, or nothing refused: too little is tested"


@pytest.mark.parametrize("variant", VARIANTS)
def test_sliding_window(plugin: EngineProcess, int8: Int8Models, variant: str) -> None:
    model = int8("window", architecture="mistral", sliding_window=50)
    answer = plugin.run(model.engine(variant, block_size=32), RUN)
    _is_int8(answer, variant)
    model.check(answer, PROMPTS, model.caches(variant, block_size=32))
    without = model.offline.config | {"sliding_window": None}
    kept, model.offline.config = model.offline.config, without
    with pytest.raises(AssertionError, match="off by"):
        model.check(answer, PROMPTS, model.caches(variant, block_size=32))
    model.offline.config = kept


@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_heads(plugin: EngineProcess, int8: Int8Models, variant: str) -> None:
    """A head dimension that int8 pages pad (80 to 96), and one kv head."""
    model = int8("padded", heads=2, kv_heads=1, head_dim=80)
    answer = plugin.run(model.engine(variant, block_size=16), FEW)
    model.check(answer, FEW["prompts"], model.caches(variant, block_size=16))


def test_a_narrow_model(plugin: EngineProcess, int8: Int8Models) -> None:
    """The type of the model is not that of the cache; results are as narrow arithmetic gives."""
    model = int8("llama")
    run = {"prompts": FEW["prompts"], "score": True}
    exact = plugin.run(model.engine("c8d"), run).runs[0]["scores"]
    answer = plugin.run(model.engine("c8d") | {"dtype": "bfloat16"}, run)
    assert answer.made_of["dtypes"] == ["torch.int8"]
    pairs = zip(exact, answer.runs[0]["scores"], strict=True)
    off = [abs(a - b) for both in pairs for a, b in zip(*both, strict=True)]
    assert 0 < sum(off) / len(off) < 0.2


def test_beam_search(plugin: EngineProcess, int8: Int8Models) -> None:
    """Beams fork in the middle of blocks; each is scored as its own sequence."""
    model = int8("llama")
    prompts = [tokens(n, seed=n) for n in (20, 70)]
    run: dict[str, Any] = {"prompts": prompts, "beams": 4, "max_tokens": 12}
    _write_tokenizer(model.path)
    engine = model.engine("c8p", block_size=16) | {"skip_tokenizer_init": False}
    answer = plugin.run(engine, run)
    caches = model.caches("c8p", block_size=16)
    for prompt, beams in zip(prompts, answer.runs[0]["beams"], strict=True):
        assert len({tuple(beam["tokens"]) for beam in beams}) == 4
        for beam in beams:
            ranked = model.offline.logprobs(beam["tokens"], caches)[len(prompt) - 1 : -1]
            new = beam["tokens"][len(prompt) :]
            assert abs(float(ranked[range(len(new)), new].sum()) - beam["logprob"]) < 4 * TOLERANCE


def _write_tokenizer(path: str) -> None:
    """Write one word per id: beam search wants to know the end of a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(
        path
    )


@pytest.mark.slow
def test_compiled(plugin: EngineProcess, int8: Int8Models) -> None:
    model, variant = int8("llama"), "c8p"
    answer = plugin.run(model.engine(variant, compilation_config={"mode": 3}, max_num_seqs=24), RUN)
    assert "DYNAMO_TRACE_ONCE" in answer.log
    _is_int8(answer, variant)
    model.check(answer, PROMPTS, model.caches(variant))
