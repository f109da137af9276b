"""The reward process: loads one reward and scores what comes in, so that a reward may throw, hang or die on its own.

    python -P -m finetui.engine.rewards.host     (a JSON object per line on stdin, one per line back)

The first line names the reward: ``{"function": "path.py:name", "limits": {…}}`` or ``{"shipped": name, "options":
{…}}``. Each further line is one batch, ``{"prompts", "completions", "texts", "columns"}``; its answer is ``{"rewards",
"errors"}``: a number or null per completion, and ``[row, message]`` for each that could not be scored. What a reward
prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import inspect
import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .answers import exact_answer, matches, numeric
from .jail import forbid_network
from .sandbox import python_tests
from .schema import json_schema

Batch = dict[str, Any]
Score = Callable[[Batch], list[Any]]


def shipped(name: str, options: dict[str, Any]) -> Score:
    """A reward of finetui, by the name that recipes have for it."""
    column = options.get("column")

    def right(batch: Batch) -> list[Any]:
        return list(batch["columns"].get(column) or [None] * len(batch["texts"]))

    if name == "exact-answer":
        return lambda batch: exact_answer(batch["texts"], right(batch))
    if name == "numeric":
        return lambda batch: numeric(batch["texts"], right(batch), options["tolerance"])
    if name == "regex":
        return lambda batch: matches(batch["texts"], options["pattern"])
    if name == "json-schema":
        fixed = options.get("schema")
        return lambda batch: json_schema(batch["texts"], [fixed] * len(batch["texts"]) if fixed else right(batch))
    assert name == "python-tests", name
    limits = {"timeout_s": options["seconds"], "memory_mib": options["memory_mib"]}
    return lambda batch: python_tests(batch["texts"], right(batch), **limits)


def from_file(target: str) -> Score:
    """A user's function, called as TRL calls it: ``f(prompts, completions, **columns)`` gives a number per completion.

    It may take fewer of these by name, and may be async.
    """
    path, _, name = target.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"finetui_reward_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))  # it may import what lies beside it
    spec.loader.exec_module(module)
    function = getattr(module, name)
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def score(batch: Batch) -> list[Any]:
        given = {"prompts": batch["prompts"], "completions": batch["completions"], **batch["columns"]}
        if not takes_all:
            given = {key: value for key, value in given.items() if key in parameters}
        told = function(**given)
        if inspect.isawaitable(told):
            told = asyncio.run(_awaited(told))
        return list(told)

    return score


def limit(memory_mib: int, network: bool) -> None:
    """Limit this process, and all that it starts, for good: memory, files of at most a GiB, and the network.

    The function is the user's own, yet it is fed by whatever a model writes. It ends with the trainer.

    Args:
        memory_mib: private memory, without what files are mapped to.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for kind, most in (
        (resource.RLIMIT_DATA, memory_mib * 2**20),
        (resource.RLIMIT_FSIZE, 2**30),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    if network:
        return
    try:
        forbid_network()
    except OSError as error:
        print(f"this system can't keep the reward from the network ({error})", file=sys.stderr)


async def _awaited(told: Any) -> Any:
    return await told


def scored(score: Score, batch: Batch) -> dict[str, Any]:
    """A batch's rewards; where scoring all of it fails, row by row, so that one bad completion costs one reward."""
    count = len(batch["texts"])
    try:
        return _checked(score(batch), count)
    except Exception as error:
        if count == 1:
            return {"rewards": [None], "errors": [[0, _told(error)]]}
    rewards: list[Any] = []
    errors: list[Any] = []
    for row in range(count):
        one = scored(score, _row(batch, row))
        rewards += one["rewards"]
        errors += [[row, message] for _, message in one["errors"]]
    return {"rewards": rewards, "errors": errors}


def _row(batch: Batch, row: int) -> Batch:
    part = {key: batch[key][row : row + 1] for key in ("prompts", "completions", "texts")}
    return {**part, "columns": {key: values[row : row + 1] for key, values in batch["columns"].items()}}


def _checked(rewards: list[Any], count: int) -> dict[str, Any]:
    if len(rewards) != count:
        raise ValueError(f"it gave {len(rewards)} rewards for {count} completions")
    told: list[float | None] = []
    errors = []
    for row, reward in enumerate(rewards):
        value = None if reward is None else float(reward)
        if value is not None and not math.isfinite(value):
            errors.append([row, f"it gave {value}"])
            value = None
        told.append(value)
    return {"rewards": told, "errors": errors}


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"


def main() -> int:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a reward prints must not be taken for an answer

    def answer(told: dict[str, Any]) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    wanted = json.loads(sys.stdin.readline())
    try:
        if "limits" in wanted:
            limit(**wanted["limits"])
        score = from_file(wanted["function"]) if "function" in wanted else shipped(wanted["shipped"], wanted["options"])
    except BaseException as error:  # whatever a user's file does when it is loaded
        traceback.print_exc()
        answer({"failed": f"{type(error).__name__}: {error}"[:300]})
        return 1
    answer({"ready": True})
    for line in sys.stdin:
        answer(scored(score, json.loads(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
