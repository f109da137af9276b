"""No input ends in anything but an answer or an error in words: no crash, no hang, nothing written elsewhere.

``pytest tests/fuzz -s`` gives the same inputs on every machine and prints how many there were. To look for new ones::

    pytest tests/fuzz -s --minutes 10 [-k rows]
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from finetui.planner.errors import FinetuiError

from .targets import Target, targets
from .watch import watched

# Imported before anything is watched: torch opens libraries.
for name in ("engine.models.load", "engine.models.weights", "engine.planning", "engine.data.preview",
             "engine.data.template", "tui.watch", "tui.history"):  # fmt: skip
    pytest.importorskip(f"finetui.{name}")
for name in ("pyarrow.parquet", "transformers.utils.chat_template_utils", "jinja2"):
    pytest.importorskip(name)

_TARGETS = targets()
#: Inputs between two looks at the clock when there is a number of minutes.
_BATCH = 200


def explore(target: Target, folder: Path, minutes: float) -> Counter[str]:
    """Give a target its inputs; the counts are of those that were read and those that were refused in words."""
    seen: Counter[str] = Counter()

    def once(case: Any) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            try:
                with watched(Path(own)):
                    target.read(case, Path(own))
                seen["read"] += 1
            except FinetuiError:
                seen["refused"] += 1

    quiet = list(HealthCheck)
    if not minutes:
        given(target.inputs)(settings(max_examples=target.examples, suppress_health_check=quiet)(once))()
        return seen
    new = settings(
        max_examples=_BATCH, derandomize=False, database=None, suppress_health_check=quiet,
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        seed(random.getrandbits(64))(given(target.inputs)(new(lambda case: once(case))))()
    return seen


@pytest.mark.parametrize("target", _TARGETS, ids=lambda target: target.name)
def test_fuzz(target: Target, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One target."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = explore(target, tmp_path, request.config.getoption("--minutes") / len(_TARGETS))
    print(f"\n{target.name}: {seen.total():,} inputs, {seen['read']:,} read, {seen['refused']:,} refused in words")
    assert seen.total() > 0
