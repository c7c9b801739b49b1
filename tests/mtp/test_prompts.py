"""What a base is asked, and how its answers are kept."""

from __future__ import annotations

from ascend_plugin.mtp import prompts
from ascend_plugin.mtp.sampling import LineFile, SamplePlan

PARAGRAPH = " ".join(f"word{i}" for i in range(60))


def test_a_frame_surrounds_the_question(base) -> None:
    assert prompts.chat_frame(base.tokenizer) == ("<user>", "\n<assistant>")


def test_without_a_template_there_is_no_frame(base) -> None:
    class Plain:
        chat_template = None

    assert prompts.chat_frame(Plain()) is None


def test_openings_begin_paragraphs() -> None:
    texts = [f"{i} {PARAGRAPH}\n\ntoo short to go on" for i in range(30)]
    found = prompts.openings(texts, 20, seed=1)
    assert len(set(found)) == 20
    assert all(8 <= len(opening.split()) <= 40 for opening in found)
    assert all(any(text.startswith(opening) for text in texts) for opening in found)
    assert prompts.openings(texts, 20, seed=1) == found
    assert prompts.openings(texts, 20, seed=2) != found
    assert len(prompts.openings(texts, 99, seed=1)) == 30


def test_questions_are_cleaned() -> None:
    frame = ("<user>", "</user>")
    starts = ["<user>What", "<user>", "<user>What", "<user>How"]
    texts = [" is a page?", "ok", " is a page?", " long" * 100]
    assert prompts.questions(frame, starts, texts) == ["What is a page?"]


def test_starts_are_drawn() -> None:
    starts = prompts.question_starts(("<user>", ""), 50, seed=1)
    assert {start.removeprefix("<user>") for start in starts} <= set(prompts.STARTERS)
    assert len(set(starts)) > 10
    assert prompts.question_starts(("<user>", ""), 50, seed=1) == starts


def test_a_plan_shares_out() -> None:
    plan = SamplePlan(answers=10, held_out=4, prose=0.3)
    assert (plan.held_out_of("prose"), plan.held_out_of("chat")) == (1, 3)
    assert (plan.count("prose"), plan.count("chat")) == (4, 10)


def test_a_line_that_was_cut_off_is_dropped(tmp_path) -> None:
    file = LineFile(tmp_path / "lines.jsonl")
    assert file.read() == []
    file.append([{"a": 1}, {"a": 2}])
    with file.path.open("a") as stream:
        stream.write('{"a": 3')
    assert file.read() == [{"a": 1}, {"a": 2}]
    file.repair()
    file.append([{"a": 4}])
    assert file.read() == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_there_is_nothing_to_repair(tmp_path) -> None:
    file = LineFile(tmp_path / "none.jsonl")
    file.repair()
    assert not file.path.exists()
