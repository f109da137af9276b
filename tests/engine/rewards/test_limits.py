"""A function of the user's gets what its recipe gives it, and no more of this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.rewards.judges import Judge
from finetui.planner.errors import RecipeError
from finetui.planner.recipe import Recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")
FILE = """
import os

def token(completions, **_):
    return [float("hf_verysecret" in os.environ.values() or any("verysecret" in v for v in os.environ.values()))]

def named(completions, **_):
    return [float(os.environ.get("JUDGE_API_KEY") == "key-verysecret")]

def connects(completions, **_):
    import socket, asyncio
    asyncio.run(asyncio.sleep(0))  # which needs a pair of sockets
    socket.socket()
    return [1.0]

def child_connects(completions, **_):
    import subprocess, sys
    return [float(subprocess.call([sys.executable, "-c", "import socket; socket.socket()"]) == 0)]

def eats(completions, **_):
    return [float(len(bytearray(2 * 2**30)) > 0)]

def fills(completions, **_):
    with open("FILL", "wb") as file:
        file.truncate(2 * 2**30)
    return [1.0]
"""


def scored(name: str, tmp_path: Path, **options: Any) -> tuple[list[float | None], list[str]]:
    (tmp_path / "mine.py").write_text(FILE.replace("FILL", str(tmp_path / "big")))
    reward = {"function": f"{tmp_path}/mine.py:{name}", **options}
    recipe = Recipe.build({"model": "m", "method": "grpo", "rewards": [reward]})
    judge = Judge(recipe.rewards[0], lambda _: None)
    try:
        rewards = judge(prompts=["?"], completions=["x"])
        return rewards, list(judge.process.failures)
    finally:
        judge.process.close()


def test_it_gets_only_the_secrets_that_its_recipe_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("JUDGE_API_KEY", "key-verysecret")
    assert scored("token", tmp_path)[0] == [0.0]
    assert scored("named", tmp_path)[0] == [0.0]
    assert scored("named", tmp_path, environment=["JUDGE_API_KEY"])[0] == [1.0]


def test_it_has_no_network_unless_its_recipe_gives_it(tmp_path: Path) -> None:
    assert "PermissionError" in scored("connects", tmp_path)[1][0]
    assert scored("child_connects", tmp_path)[0] == [0.0]
    assert scored("connects", tmp_path, network=True) == ([1.0], [])


def test_its_memory_and_files_are_limited(tmp_path: Path) -> None:
    assert "MemoryError" in scored("eats", tmp_path, memory_mib=1024)[1][0]
    assert scored("eats", tmp_path)[0] == [1.0]
    assert scored("fills", tmp_path)[0] == [None]


def test_shipped_rewards_take_none_of_these_options() -> None:
    for option in ({"network": True}, {"environment": ["A"]}):
        with pytest.raises(RecipeError, match="has no effect on the reward numeric"):
            Recipe.build({"model": "m", "method": "grpo", "rewards": [{"function": "numeric", **option}]})
