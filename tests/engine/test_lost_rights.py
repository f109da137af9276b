"""A run whose folder can no longer be written: it ends, keeps what it has, and is found lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.supervision.failure import classify

FAKE = Path(__file__).with_name("fake_rank.py")
SUPERVISOR = """
import sys
from finetui.engine.run import Run
from finetui.engine.supervisor import supervise
outcome = supervise(Run(sys.argv[1]), worker=(sys.argv[2], sys.argv[3]))
print("outcome", outcome.state, outcome.cause)
"""
#: Root may write anywhere; without these two rights it is a user like any other.
MORTAL = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]


def as_a_user() -> list[str]:
    """What must stand before a command so that modes count for it."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None or subprocess.run([*MORTAL, "true"], capture_output=True).returncode:
        pytest.skip("root can't give up its rights here")
    return MORTAL


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_folder_that_loses_its_rights_ends_the_run_which_is_then_found_lost(make_run: Callable[..., Run]) -> None:
    run = make_run()
    process = subprocess.Popen(
        [*as_a_user(), sys.executable, "-P", "-c", SUPERVISOR, str(run.path), str(FAKE), "endless"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until(lambda: any(event.type == "step" for event in read_events(run.events_path)))
        run.path.chmod(0o500)
        run.request("stop")
        told, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        run.path.chmod(0o700)
    assert "This can't be written down" in told
    assert "outcome" in told
    assert run.recorded.state == "running"
    assert run.status.state == "lost"
    assert "resume" in run.status.do


@pytest.mark.parametrize("number", [13, 30])
def test_a_folder_without_rights_is_told_from_a_mistake(number: int) -> None:
    try:
        raise OSError(number, os.strerror(number), "/runs/a/checkpoints")
    except OSError as error:
        failure = classify(error, 0, None)
    assert failure.cause == "disk"
    assert failure.message.startswith("/runs/a/checkpoints can't be used")
    assert "resume" in failure.do
