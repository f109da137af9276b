"""A plan's settings as a trainer takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("trl")
from accelerate.utils import set_seed

from finetui.engine.trainers.settings import Length, settings
from finetui.planner.plan import Plan


@pytest.mark.parametrize("seed", [42, 2**32 - 1])
def test_every_rank_can_add_its_number_to_the_seed(seed: int, make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    resolved = make_plan(seed=seed, gpus=[0, 1, 2], device="cpu").resolved
    given = settings(resolved, Length(9, 0, 9, 9), tmp_path, resumed=False, evaluates=False)
    assert given["seed"] == min(seed, 2**32 - 3)
    for rank in range(3):  # as TRL's GRPO and RLOO do
        set_seed(given["seed"] + rank)
