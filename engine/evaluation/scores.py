"""Marks for answers: the plain metrics where an answer is expected, and the rewards of recipes, verifiable or a user's
own, each in its own process as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...planner.errors import RecipeError, TrainingError
from ...planner.recipe import Recipe
from ...planner.rollout import SHIPPED_REWARDS, Reward, absolute_reward, column_of
from ...planner.yaml_text import parse
from ..rewards.judges import Judge, judges
from .answers import Answer
from .metrics import METRICS
from .rows import Question

#: Answers that a reward gets at a time: tests of code take seconds each, and a batch has a limit on its time.
_AT_ONCE = 8


def rewards_of(texts: Sequence[str], where: str = "--score") -> list[Reward]:
    """Rewards as a command line names them: ``numeric``, ``path.py:function``, or ``{function: regex, pattern: …}``.

    Raises:
        RecipeError: there is no such reward, or an option has no effect on it.
    """
    if not texts:
        return []
    asked = [parse(text, where)[0] if text.lstrip().startswith("{") else text for text in texts]
    given = [absolute_reward(one, Path.cwd()) for one in asked]
    try:
        return Recipe.build({"model": "any", "method": "grpo", "rewards": given}, source=where).rewards
    except RecipeError as error:
        raise RecipeError(error.what, where=where, do=error.do) from None


class Marks:
    """The rewards, loaded, for as long as the block lasts.

    Args:
        rewards: who judges besides the plain metrics.
        columns: what the rows hold, if they are known.
        warn: receives a sentence where a reward could not judge.

    Raises:
        RecipeError: a reward can't be loaded, or the column that it compares with is not there.
    """

    def __init__(self, rewards: list[Reward], columns: list[str], warn: Callable[[str], object]) -> None:
        self.rewards, self.columns, self.warn = rewards, columns, warn
        self._judges: list[Judge] = []

    def __enter__(self) -> Marks:
        if self.rewards:
            recipe = Recipe.build({"model": "any", "method": "grpo"}).model_copy(update={"rewards": self.rewards})
            try:
                self._judges = judges(recipe, self.columns, lambda told: self.warn(str(getattr(told, "what", told))))
            except RecipeError as error:
                compared = {column_of(one) for one in self.rewards if one.function in SHIPPED_REWARDS}
                do = error.do
                if compared - set(self.columns):
                    do += " Rows that a run held out keep their answer alone: name the file itself with --data."
                raise RecipeError(error.what, where=error.where, do=do) from None
        return self

    def __exit__(self, *_: object) -> None:
        for judge in self._judges:
            judge.process.close()

    def of(self, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, list[float | None]]:
        """Each mark of each answer, by the name of its figure; None where there is nothing to judge by."""
        told: dict[str, list[float | None]] = {}
        if any(question.expected for question in questions):
            for name, metric in METRICS.items():
                told[name] = [
                    metric(answer.text, question.expected) if question.expected else None
                    for question, answer in zip(questions, answers, strict=True)
                ]
        for judge in self._judges:
            told[f"score/{judge.reward.name}"] = self._judged(judge, questions, answers)
        return told

    def _judged(self, judge: Judge, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        made: list[float | None] = []
        for start in range(0, len(questions), _AT_ONCE):
            asked, said = questions[start : start + _AT_ONCE], answers[start : start + _AT_ONCE]
            columns: Any = {name: [question.columns.get(name) for question in asked] for name in self.columns}
            prompts = [question.prompt for question in asked]
            completions: list[Any] = [
                answer.text if isinstance(question.prompt, str) else [{"role": "assistant", "content": answer.text}]
                for question, answer in zip(asked, said, strict=True)
            ]
            try:
                made += judge(prompts=prompts, completions=completions, **columns)
            except TrainingError as error:  # nothing for several batches in a row, which ends a training
                self.warn(error.what)
                made += [None] * len(asked)
        return made
