"""Rewards that throw, hang, die and lie: named, counted, never silent."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.rewards.judges import Judge, check_rewards
from finetui.engine.rewards.process import RewardProcess
from finetui.planner.errors import RecipeError, TrainingError
from finetui.planner.recipe import Recipe
from finetui.planner.rollout import Reward

FILE = """
import asyncio, os, time
from beside import LENGTH

def length(completions):
    print("a reward may print")
    return [len(text) / LENGTH for text in completions]

async def awaited(completions, **columns):
    await asyncio.sleep(0.01)
    return [float(text == right) for text, right in zip(completions, columns["answer"])]

def picky(completions, **_):
    if "bad" in completions:
        raise KeyError("bad")
    return [1.0 for _ in completions]

def hangs(completions, **_):
    while "slow" in completions:
        time.sleep(0.05)
    return [2.0 for _ in completions]

def dies(completions, **_):
    if "deadly" in completions:
        os._exit(3)
    return [3.0 for _ in completions]

def lies(completions, **_):
    return [float("nan"), None, 1]

def short(completions, **_):
    return [1.0]
"""


@pytest.fixture
def reward(tmp_path: Path) -> Any:
    """Makes a reward process of one function of FILE; its warnings are in ``told``."""
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("LENGTH = 10\n")
    made: list[RewardProcess] = []

    def make(name: str, timeout_s: float = 30.0) -> RewardProcess:
        told: list[Any] = []
        process = RewardProcess(name, {"function": f"{tmp_path}/mine.py:{name}"}, timeout_s=timeout_s, emit=told.append)
        process.told = told  # type: ignore[attr-defined]
        made.append(process)
        return process

    yield make
    for process in made:
        process.close()


Make = Callable[..., RewardProcess]


def score(process: RewardProcess, *texts: str, **columns: list[Any]) -> list[float | None]:
    return process.score(["?"] * len(texts), list(texts), list(texts), columns)


def test_functions_get_what_they_ask_for(reward: Make) -> None:
    assert score(reward("length"), "12345", "") == [0.5, 0.0]
    assert score(reward("awaited"), "a", "b", answer=["a", "a"]) == [1.0, 0.0]


def test_one_bad_completion_costs_one_reward(reward: Make) -> None:
    process = reward("picky")
    assert score(process, "good", "bad", "good") == [1.0, None, 1.0]
    assert score(process, "bad", "good") == [None, 1.0]
    (reason,) = process.failures
    assert process.failures[reason] == 2
    assert "KeyError: 'bad'" in reason
    assert "mine.py:" in reason
    assert [warning.what for warning in process.told] == [  # type: ignore[attr-defined]
        f"the reward picky gave no score for one completion: {reason}"
    ]


def test_one_that_hangs_is_stopped_and_goes_on(reward: Make) -> None:
    process = reward("hangs", timeout_s=1.0)
    began = time.monotonic()
    assert score(process, "quick", "slow") == [None, None]
    assert time.monotonic() - began < 20
    assert process.failures == {"it took longer than 1 s": 2}
    assert score(process, "quick") == [2.0]


def test_one_that_dies_is_started_anew(reward: Make) -> None:
    process = reward("dies")
    assert score(process, "deadly") == [None]
    assert process.failures == {"its process died": 1}
    assert score(process, "fine") == [3.0]


def test_what_is_no_number_is_no_score(reward: Make) -> None:
    process = reward("lies")
    assert score(process, "a", "b", "c") == [None, None, 1.0]
    assert process.failures == {"it gave nan": 1}
    assert score(reward("short"), "a", "b") == [1.0, 1.0]  # row by row it has one for each


def test_a_reward_that_scores_nothing_ends_the_run(reward: Make) -> None:
    process = reward("picky")
    assert [score(process, "bad"), score(process, "bad")] == [[None], [None]]
    with pytest.raises(TrainingError, match=r"picky has scored nothing for 3 batches in a row.*KeyError"):
        score(process, "bad")


def test_a_file_that_can_not_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    process = RewardProcess("f", {"function": f"{tmp_path}/broken.py:f"}, timeout_s=5, emit=print)
    with pytest.raises(RecipeError, match="ModuleNotFoundError"):
        process.start()
    (tmp_path / "empty.py").write_text("")
    process = RewardProcess("f", {"function": f"{tmp_path}/empty.py:f"}, timeout_s=5, emit=print)
    with pytest.raises(RecipeError, match="no attribute 'f'"):
        process.start()


def test_an_expression_that_never_ends_is_stopped() -> None:
    judge = Judge(Reward(function="regex", pattern="(a+)+$", timeout_s=1.0), print)
    try:
        assert judge(prompts=["?", "?"], completions=["a" * 64 + "!", "aa"]) == [None, None]
        assert judge(prompts=["?"], completions=[[{"role": "assistant", "content": "aa"}]]) == [1.0]
    finally:
        judge.process.close()


def test_shipped_rewards_compare_with_their_column() -> None:
    noted: dict[str, float] = {}
    judge = Judge(Reward(function="numeric", column="right"), print)
    try:
        told = judge(
            prompts=["?"] * 3,
            completions=["#### 4", "5", "6"],
            right=["4", 4, None],
            log_metric=lambda name, value: noted.__setitem__(name, value),
        )
    finally:
        judge.process.close()
    assert noted == {"rewards/numeric/unscored": pytest.approx(1 / 3)}
    assert told == [1.0, 0.0, None]


@pytest.mark.parametrize(
    ("rewards", "columns", "said"),
    [
        ([], ["answer"], "needs a reward"),
        (["/no/such.py:f"], ["answer"], "there is no file /no/such.py"),
        (["numeric"], ["solution"], "column 'answer', which the data does not have"),
        (["python-tests"], ["answer"], "column 'tests'"),
        ([{"function": "json-schema", "json_schema": {"format": "date"}}], [], "format can't be checked"),
    ],
)
def test_what_can_be_known_before(rewards: list[Any], columns: list[str], said: str) -> None:
    recipe = Recipe.build({"model": "m", "method": "grpo", "rewards": rewards})
    with pytest.raises(RecipeError, match=said):
        check_rewards(recipe, columns)
