"""What a trainer is told, without a trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")
from transformers import TrainerControl, TrainerState

from finetui.engine.run import Run
from finetui.engine.trainers.callbacks import Reporter
from finetui.engine.trainers.settings import Length


def test_a_checkpoint_that_was_under_way_serves_no_later_request(tmp_path: Path) -> None:
    run = Run(tmp_path)
    length = Length(steps=9, warmup=0, checkpoint_every=9, eval_every=9)
    reporter = Reporter(run, lambda event: None, length, rank=0, track=False)
    trainer: Any = SimpleNamespace(saver=SimpleNamespace(failed=False), late=True, held_out=None)
    reporter.trainer, trainer.agree_on_failed_save = trainer, lambda failed: None
    run.request("checkpoint")
    args: Any = SimpleNamespace()
    reporter.on_step_end(args, TrainerState(global_step=3), control := TrainerControl())
    assert control.should_save
    reporter.saved(1)  # it took until now to be on the disk
    assert run.requested("checkpoint")
    reporter.saved(3)
    assert not run.requested("checkpoint")
