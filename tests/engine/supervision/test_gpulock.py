"""One run per GPU: who holds one, what a dead holder leaves, and who may share."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine import launcher, preflight
from finetui.engine.run import Run
from finetui.engine.supervision.gpulock import folder, held, holders
from finetui.planner.errors import RunError
from finetui.planner.recipe import Recipe

FAKE = str(Path(__file__).parents[1] / "fake_rank.py")

#: Holds GPUs 0 and 1 until it is told to end, or killed.
HOLDER = """
import sys
from finetui.engine.supervision.gpulock import held
from finetui.engine.run import Run
with held([0, 1], Run(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(run: Run) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_run_is_refused_until_the_first_one_ends(make_run: Callable[..., Run]) -> None:
    first, second = make_run(name="first"), make_run(name="second")
    process = hold(first)
    with pytest.raises(RunError) as caught, held([1, 2], second):
        pass
    assert "GPU 1 is in use by the run first" in caught.value.what
    assert str(process.pid) in caught.value.what
    assert "hardware.shared" in caught.value.do
    assert [holder.gpu for holder in holders([0, 1, 2])] == [0, 1]
    with held([2, 3], second):
        assert [holder.run for holder in holders([2])] == ["second"]
    with held([1], second, shared=True):
        assert {holder.run for holder in holders([1])} == {"first", "second"}
    process.communicate(b"")
    with held([1], second):
        assert [holder.run for holder in holders([1])] == ["second"]
    assert not list(folder().iterdir())


def test_what_a_killed_run_leaves_is_stale(make_run: Callable[..., Run]) -> None:
    process = hold(make_run(name="first"))
    process.kill()
    process.communicate()
    assert len(list(folder().glob("gpu0.*.json"))) == 1
    assert holders([0]) == []
    with held([0], make_run(name="second")):
        assert len(list(folder().glob("gpu0.*.json"))) == 1  # swept


def test_a_pid_that_was_given_out_again_holds_nothing(make_run: Callable[..., Run]) -> None:
    with held([0], make_run(name="first")):
        (path,) = folder().glob("gpu0.*.json")
        tree = json.loads(path.read_text())
        path.write_text(json.dumps({**tree, "ticks": tree["ticks"] - 1}))
        assert holders([0]) == []
        path.write_text(json.dumps({**tree, "boot": "another"}))
        assert holders([0]) == []
        path.write_text(json.dumps(tree))
        assert len(holders([0])) == 1


def test_another_users_file_counts_and_can_be_read(make_run: Callable[..., Run]) -> None:
    process = hold(make_run(name="first"))
    (path,) = folder().glob("gpu0.*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(folder().stat().st_mode) == 0o1777
    path.rename(path.with_name(f"gpu0.{os.geteuid() + 1}.{process.pid}.json"))
    with pytest.raises(RunError, match="GPU 0 is in use"), held([0], make_run(name="second")):
        pass
    process.kill()
    process.communicate()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x"}', "\x00"])
def test_a_damaged_file_holds_nothing(make_run: Callable[..., Run], content: str) -> None:
    with held([0], make_run(name="first")):
        pass
    (folder() / "gpu0.77.1.json").write_text(content)
    with held([0], make_run(name="second")):
        assert [holder.run for holder in holders([0])] == ["second"]


def test_a_folder_that_can_t_be_used_locks_nothing_and_says_so(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUI_GPU_LOCKS", str(tmp_path / "file"))
    with held([0], make_run()):
        pass
    assert "GPUs are not locked" in capsys.readouterr().err


def test_on_the_cpu_nothing_is_held(make_run: Callable[..., Run]) -> None:
    with held([], make_run()):
        assert not folder().exists()


def test_a_run_on_a_gpu_in_use_does_not_start(make_run: Callable[..., Run]) -> None:
    first = make_run(name="first", gpus=[3], device="cuda")
    second = make_run(name="second", gpus=[3], device="cuda")
    launcher.start(first, worker=(FAKE, "endless"))
    try:
        with pytest.raises(RunError, match="GPU 3 is in use by the run first"):
            launcher.start(second, worker=(FAKE, "endless"))
        assert second.recorded.attempt == 0
        found = preflight._locked(second.recipe, second.plan)
        assert [(check.name, check.status) for check in found] == [("gpu 3", "fail")]
        shared = Recipe.build({"model": "tiny", "hardware": {"shared": True}})
        assert [check.status for check in preflight._locked(shared, second.plan)] == ["warn"]
    finally:
        launcher.kill(first)
    assert preflight._locked(second.recipe, second.plan) == []
