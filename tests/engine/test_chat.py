"""A conversation with what a run made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

from finetui.engine.chat import ChatSession, Generation
from finetui.engine.run import Run
from finetui.engine.worker import attempt
from finetui.planner.errors import RunError

MakeRun = Callable[..., Run]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_learned_answers_come_in_pieces_and_the_base_knows_them_not(training_run: MakeRun, tuning: str) -> None:
    knobs: dict[str, Any] = {"steps": 40, "learning_rate": 5e-3 if tuning == "full" else 2e-2, "rank": 32}
    run = training_run(tuning=tuning, recipe={"checkpoint": {"every": 40}, "evaluation": {"every": 40}}, **knobs)
    assert attempt(run) == 0
    session = ChatSession(run, base=True, generation=Generation(24))
    assert session.voices == ("tuned", "base")
    pieces = list(session.stream("what is colour 8?"))
    answer = "".join(pieces)
    if tuning == "full":  # the output head of a random base, frozen under adapters, can hardly name a word
        assert len([piece for piece in pieces if piece]) > 1
        assert any(word in answer for word in ("rose", "sky", "grass", "snow"))
    base = "".join(session.stream("what is colour 8?", "base"))
    assert base != answer
    assert "".join(session.stream("what is colour 8?", "base")) != answer
    assert [turn["role"] for turn in session.history["tuned"]] == ["user", "assistant"]
    assert [turn["role"] for turn in session.history["base"]] == ["user", "assistant"] * 2
    session.clear()
    assert "".join(session.stream("what is colour 8?")) == answer


def test_leaving_early_ends_the_answer_and_long_histories_are_cut(training_run: MakeRun) -> None:
    run = training_run(steps=1)
    assert attempt(run) == 0
    session = ChatSession(run, generation=Generation(100, temperature=1.0))
    stream = session.stream("colour? " * 5)
    next(stream)
    stream.close()
    for number in range(8):
        stream = session.stream(f"and colour {number}, please?")
        next(stream)
        stream.close()
    assert len(session.history["tuned"]) < 18
    assert session.history["tuned"][-1]["role"] == "assistant"


def test_a_run_without_a_model_says_so(training_run: MakeRun) -> None:
    with pytest.raises(RunError, match="has not written a model yet"):
        ChatSession(training_run())
