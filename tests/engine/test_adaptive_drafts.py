"""The number of drafts changes from step to step: tokens stay, and no key of the layer is missing.

What the policy decides is in ``tests/spec_decode``; here scripts dictate it.
"""

from __future__ import annotations

import operator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import write_tokenizer
from eagle import write_eagle
from engines import EngineProcess, assert_same, first_differences
from mtp_cases import LONGEST, MIMO, PROMPTS, counted, mtp
from offline_mtp import OfflineMTP
from prompts import tokens
from tiny_engines import TinyModels, settings

pytestmark = pytest.mark.engine

#: Drafts of steps: changes in every direction, and pauses that fill blocks of 16 tokens.
SCRIPTS = [
    (2, 2, 0, 0, 0, 0, 0, 3, 1, 0),
    (0,) * 20 + (3,) * 6,
    (0, 3),
    (3, 2, 1),
]
MOST = 3
TOKENS = 70
#: Each fits into one step of prefill: the script begins with its last token.
SINGLE = [tokens(count, seed=count) for count in (9, 30, 64)]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> str:
    return tiny("mimo", **MIMO)


@pytest.fixture(scope="module")
def offline(model: str) -> OfflineMTP:
    return OfflineMTP(model)


def engine(model: str, **more: Any) -> dict[str, Any]:
    """An engine whose steps may make 0 to 3 drafts."""
    adaptive = {"additional_config": {"speculation": {"adaptive": True}}}
    return settings(model, **{"block_size": 16, **mtp(MOST), **adaptive, **more})


def runs(script: tuple[int, ...], **more: Any) -> list[dict[str, Any]]:
    """One request after the other; the script begins anew with each."""
    return [{"prompts": [p], "max_tokens": TOKENS, "script": script, **more} for p in SINGLE]


@pytest.fixture(scope="module")
def plain(plugin: EngineProcess, model: str) -> Any:
    """What the model says without drafts, some tokens more than are compared."""
    run = {"prompts": SINGLE, "max_tokens": TOKENS + LONGEST + 1}
    return plugin.run(settings(model, block_size=16), run).outputs()


def check(plain: Any, answer: Any, offline: OfflineMTP, script: tuple[int, ...]) -> bool:
    """Compare tokens; return whether every draft is what the layer must draft."""
    right = []
    for i, (prompt, want) in enumerate(zip(SINGLE, plain, strict=True)):
        assert answer.outputs(i)[0].tokens == want.tokens[:TOKENS]
        expected = offline.walk(prompt, [*prompt, *want.tokens], TOKENS, script)
        right.append(counted(answer.runs[i], MOST) == expected)
        assert reduce(operator.add, expected.accepted) > 5, "too little is tested"
    return all(right)


@pytest.mark.parametrize("script", SCRIPTS)
def test_tokens_and_drafts(
    plugin: EngineProcess, model: str, offline: OfflineMTP, plain: Any, script: tuple[int, ...]
) -> None:
    answer = plugin.run(engine(model, enable_prefix_caching=False), *runs(script))
    assert check(plain, answer, offline, script)


def test_missing_keys_would_show(
    plugin: EngineProcess, model: str, offline: OfflineMTP, plain: Any
) -> None:
    """Guards the test above."""
    lost = runs(SCRIPTS[0], fault="lost keys")
    answer = plugin.run(engine(model, enable_prefix_caching=False), *lost)
    assert not check(plain, answer, offline, SCRIPTS[0])


def test_blocks_written_without_drafts_have_keys(
    plugin: EngineProcess, model: str, offline: OfflineMTP
) -> None:
    """A request goes on from another's pages, which were filled while nothing was drafted."""
    prompt, turn = SINGLE[1], 100
    first = {"prompts": [prompt], "max_tokens": turn, "script": (0,)}
    whole = plugin.run(settings(model, block_size=16), first | {"max_tokens": 200}).outputs()[0]
    longer = [*prompt, *whole.tokens[: turn - 10]]
    script = (MOST,)
    again = {"prompts": [longer], "max_tokens": TOKENS, "script": script}
    answer = plugin.run(engine(model, enable_prefix_caching=True), first, again)
    assert answer.outputs(1)[0].cached > len(prompt) + 40
    assert answer.outputs(1)[0].tokens == whole.tokens[turn - 10 :][:TOKENS]
    text = [*prompt, *whole.tokens]
    assert counted(answer.runs[1], MOST) == offline.walk(longer, text, TOKENS, script)


CROWD = [tokens(60 + 7 * i, seed=i) for i in range(14)]


def test_batches_and_preemption(plugin: EngineProcess, model: str) -> None:
    """Requests come, go, lose their pages and share steps with prompts in chunks."""
    given = [{"prompts": prompts, "max_tokens": 50} for prompts in (CROWD, PROMPTS, CROWD)]
    roomy = plugin.run(settings(model, block_size=16, enable_prefix_caching=False), *given)
    tight = engine(
        model, enable_prefix_caching=True, max_model_len=1024, num_gpu_blocks_override=70
    )
    answer = plugin.run(tight, *(run | {"script": SCRIPTS[0]} for run in given))
    assert answer.metrics["vllm:num_preemptions"] > 2
    for i in range(len(given)):
        assert_same(roomy.outputs(i), answer.outputs(i))
        assert answer.runs[i]["drafts"]["accepted_tokens"] > 50


def test_structured_output(plugin: EngineProcess, model: str) -> None:
    write_tokenizer(Path(model))
    grammar = {"structured_outputs": {"regex": "[ -~]{80}"}}
    run = {"prompts": SINGLE, "max_tokens": 40, "sampling": grammar}
    named = {"skip_tokenizer_init": False}
    want = plugin.run(settings(model, block_size=16) | named, run)
    answer = plugin.run(engine(model) | named, run | {"script": SCRIPTS[0]})
    assert answer.runs[0]["drafts"]["accepted_tokens"] > 0
    assert first_differences(want.outputs(), answer.outputs()) == []


def test_eagle(plugin: EngineProcess, model: str, plain: Any, tmp_path: Path) -> None:
    draft = write_eagle(tmp_path / "draft", Path(model))
    eagle = {"method": "eagle", "model": str(draft), "num_speculative_tokens": MOST}
    answer = plugin.run(engine(model, speculative_config=eagle), *runs(SCRIPTS[0]))
    for i, want in enumerate(plain):
        assert answer.outputs(i)[0].tokens == want.tokens[:TOKENS]
    assert sum(run["drafts"]["accepted_tokens"] for run in answer.runs) > 20


def test_the_policy_decides(plugin: EngineProcess, model: str, plain: Any) -> None:
    """Without a script: times decide, so only what holds for every choice can be said."""
    run = {"prompts": SINGLE, "max_tokens": TOKENS}
    answer = plugin.run(engine(model), *[run] * 4)
    for i in range(4):
        for want, output in zip(plain, answer.outputs(i), strict=True):
            assert output.tokens == want.tokens[:TOKENS]
    assert "of 3 drafts (batch" in answer.log
    assert answer.metrics["vllm:spec_decode_num_drafts"] > 0, "drafts were never tried"
