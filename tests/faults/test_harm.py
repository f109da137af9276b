"""Files that come to harm between two attempts, and a clock that is set back: the run goes on, says so, and ends as one
that was left in peace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.checkpoints import store
from finetui.engine.run import Run

from .harness import Forge, Result, finish, gone, killed_after, require_orderly, result_of, told, wait_until

MakeRun = Callable[..., Run]


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", ["byte", "missing", "manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_told(
    forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result], harm: str
) -> None:
    run = a_run(40)
    killed_after(forge, run, 4)
    found = store.find(run.path / "checkpoints")
    assert len(found) > 1
    newest, before = found[-1], found[-2]
    weights, manifest = newest.path / "adapter_model.safetensors", newest.path / store.MANIFEST
    match harm:
        case "byte":
            flip(weights)
        case "missing":
            weights.unlink()
        case "manifest":
            manifest.write_bytes(manifest.read_bytes()[:100])
    steps = len(told(run, "step"))
    finish(forge, run)
    assert any(newest.path.name in event.data["what"] for event in told(run, "warning"))
    assert told(run, "step")[steps].data["step"] == before.step + 1
    assert result_of(run) == undisturbed(40)


def test_a_truncated_event_log_goes_on(forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result]) -> None:
    run = a_run(40)
    killed_after(forge, run, 2)
    raw = run.events_path.read_bytes()
    run.events_path.write_bytes(raw[: raw.rindex(b"\n", 0, -1) + 10])  # in the middle of its last line
    finish(forge, run)
    assert result_of(run) == undisturbed(40)


def test_a_clock_that_is_set_back_changes_nothing(
    forge: Forge, a_run: MakeRun, undisturbed: Callable[..., Result]
) -> None:
    run = a_run()
    supervisor = forge.start(run, clock=7200.0)
    wait_until(lambda: gone(supervisor))
    require_orderly(run)
    assert run.recorded.state == "finished"
    events = told(run, "step")
    assert min(event.time for event in events[1:]) < events[0].time - 3600, "the clock was set back"
    assert 0 <= run.recorded.elapsed_s() < 3600
    assert all(event.data["step_s"] > 0 for event in events)
    assert result_of(run) == undisturbed()
