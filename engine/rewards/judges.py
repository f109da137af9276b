"""The rewards of a recipe, ready to be called by a trainer of TRL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...planner.errors import RecipeError
from ...planner.recipe import Recipe
from ...planner.rollout import SHIPPED_REWARDS, Reward, column_of
from .process import RewardProcess
from .schema import unknown_keyword

#: Memory of the process of a user's function: enough for a small model on the CPU.
FUNCTION_MIB = 16384


class Judge:
    """One reward as TRL calls it: ``judge(prompts, completions, **columns)`` gives a number or None per completion."""

    def __init__(self, reward: Reward, emit: Callable[[Any], object]) -> None:
        self.__name__ = reward.name
        """What TRL calls it in its metrics."""
        self.reward = reward
        keep = tuple(reward.environment)
        self.process = RewardProcess(reward.name, _wanted(reward), timeout_s=reward.timeout_s, emit=emit, keep=keep)

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: Any = None,
        trainer_state: Any = None,
        log_extra: Any = None,
        log_metric: Callable[[str, float], object] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score completions."""
        rewards = self.process.score(prompts, completions, [plain_text(c) for c in completions], columns)
        if log_metric is not None:
            log_metric(f"rewards/{self.reward.name}/unscored", sum(reward is None for reward in rewards) / len(rewards))
        return rewards


def plain_text(completion: Any) -> str:
    """What the model said: TRL gives text, or one message in a list."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def judges(recipe: Recipe, columns: list[str], emit: Callable[[Any], object]) -> list[Judge]:
    """The rewards of a recipe, loaded.

    Args:
        columns: what the rows hold.

    Raises:
        RecipeError: there is none, one can't be loaded, or the column it compares with is not there.
    """
    check_rewards(recipe, columns)
    found = [Judge(reward, emit) for reward in recipe.rewards]
    started: list[Judge] = []
    try:
        for judge in found:
            judge.process.start()
            started.append(judge)
    except BaseException:
        for judge in started:
            judge.process.close()
        raise
    return found


def check_rewards(recipe: Recipe, columns: list[str] | None = None) -> None:
    """What can be known of a recipe's rewards before they are loaded.

    Args:
        columns: of the rows, if they are known.

    Raises:
        RecipeError: there is no reward, no such file, a schema that says more than is checked, or a missing column.
    """
    if not recipe.rewards:
        do = f"Write rewards: [path.py:function], or use {', '.join(SHIPPED_REWARDS)}."
        raise RecipeError(f"method {recipe.method} needs a reward", where="rewards", do=do)
    for reward in recipe.rewards:
        if reward.function not in SHIPPED_REWARDS:
            path = Path(reward.function.rpartition(":")[0]).expanduser()
            if not path.is_file():
                raise RecipeError(f"there is no file {path}", where="rewards", do="Check its path.")
            continue
        if reward.json_schema is not None and (word := unknown_keyword(reward.json_schema)) is not None:
            do = "Leave it out, or check it in a function of your own."
            raise RecipeError(f"the schema's {word} can't be checked", where="rewards: json-schema", do=do)
        needs = reward.function != "regex" and reward.json_schema is None
        if needs and columns is not None and column_of(reward) not in columns:
            what = f"{reward.function} compares with column {column_of(reward)!r}, which the data does not have"
            do = f"Its columns are {', '.join(columns)}: name one with {{function: {reward.function}, column: …}}."
            raise RecipeError(what, where="rewards", do=do)


def _wanted(reward: Reward) -> dict[str, Any]:
    if reward.function not in SHIPPED_REWARDS:
        path, _, name = reward.function.rpartition(":")
        memory = reward.memory_mib if "memory_mib" in reward.model_fields_set else FUNCTION_MIB
        limits = {"memory_mib": memory, "network": reward.network}
        return {"function": f"{Path(path).expanduser()}:{name}", "limits": limits}
    options = {
        "column": column_of(reward),
        "pattern": reward.pattern,
        "schema": reward.json_schema,
        "tolerance": reward.tolerance,
        "seconds": reward.seconds,
        "memory_mib": reward.memory_mib,
    }
    return {"shipped": reward.function, "options": options}
