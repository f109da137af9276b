"""Processes that wait for a run: they become its own, and nothing of them is left where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch")

import finetui
from finetui.engine import launcher, standby
from finetui.engine.run import Run
from finetui.engine.supervision.ranks import launcher as rank_launcher
from finetui.planner.errors import RunError

LAZY = {"CUDA_MODULE_LOADING": "LAZY"}
#: Stand-ins for a rank's module: they wait like one, and tell what they were given.
WAITS = """
import json, os, sys
line = sys.stdin.readline()
if line:
    order = json.loads(line)
    with open(order["run"] + "/seen", "w") as file:
        json.dump([os.getpid(), order["environment"]["RANK"], order["environment"].get("OWN")], file)
    sys.exit(CODE)
"""


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def waiting() -> Iterator[psutil.Process]:
    """The upper one of two processes that wait, once both are there."""
    with standby.standing_by():
        assert standby._one is not None
        upper = psutil.Process(standby._one.process.pid)
        until(upper.children)
        yield upper


def test_a_run_is_given_to_what_waited(waiting: psutil.Process, make_run: Callable[..., Run]) -> None:
    rank = waiting.children()[0]
    run = make_run({"model": "/nowhere/at/all"})
    assert launcher.start(run) == waiting.pid == run.recorded.pid
    assert standby.take() is None
    until(lambda: not run.live)
    assert "there is no such folder" in run.status.message
    assert run.recorded.attempt == 1
    assert run.log_path(0).read_text().splitlines()[0].endswith(f"process {rank.pid}")
    until(lambda: gone(waiting) and gone(rank))
    assert (run.path / "log" / "supervisor.log").read_text() == ""


@pytest.mark.slow
def test_a_run_is_carried_out_by_what_waited(waiting: psutil.Process, training_run: Callable[..., Run]) -> None:
    rank = waiting.children()[0]
    run = training_run(steps=2, gpus=[])
    assert launcher.start(run) == waiting.pid
    until(lambda: not run.live, 300.0)
    assert run.status.state == "finished", run.log_path(0).read_text()
    assert run.log_path(0).read_text().splitlines()[0].endswith(f"process {rank.pid}")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(run.output_path))


def test_nothing_is_left_of_what_nobody_needed() -> None:
    with contextlib.suppress(ZeroDivisionError), standby.standing_by():
        assert standby._one is not None
        upper = psutil.Process(standby._one.process.pid)
        until(upper.children)
        both = family(upper)
        assert len(both) == 2
        raise ZeroDivisionError
    assert not psutil.pid_exists(both[0].pid)
    until(lambda: gone(both[1]), 10.0)
    assert standby.take() is None


def test_nothing_is_left_when_the_command_is_killed(tmp_path: Path) -> None:
    code = (
        "import time\nfrom finetui.engine import standby\nwith standby.standing_by():\n"
        "    print(standby._one.process.pid, flush=True)\n    time.sleep(60)"
    )
    path = os.pathsep.join([str(Path(finetui.__file__).parent.parent), *sys.path])
    command = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert command.stdout is not None
    upper = psutil.Process(int(command.stdout.readline()))
    until(upper.children)
    both = family(upper)
    command.kill()
    command.wait()
    command.stdout.close()
    until(lambda: all(map(gone, both)), 30.0)


@pytest.mark.parametrize("which", [0, 1], ids=["supervisor", "rank"])
def test_a_run_begins_anew_where_what_waited_is_gone(
    which: int, waiting: psutil.Process, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = family(waiting)[which]
    lost.send_signal(signal.SIGKILL)
    until(lambda: gone(lost))
    run = make_run({"model": "/nowhere/at/all"})
    pid = launcher.start(run)
    assert (pid == waiting.pid) == (which == 1)
    until(lambda: not run.live)
    assert run.status.state == "failed"
    assert "there is no such folder" in run.status.message
    assert f"process {lost.pid}" not in run.log_path(0).read_text()


def test_a_run_of_several_ranks_does_without(waiting: psutil.Process, make_run: Callable[..., Run]) -> None:
    both = family(waiting)
    run = make_run({"model": "/nowhere/at/all"}, gpus=[0, 1], strategy="ddp")
    assert launcher.start(run) != waiting.pid
    until(lambda: all(map(gone, both)), 10.0)
    launcher.kill(run)


def test_a_run_that_can_not_begin_says_why_and_leaves_nothing(
    waiting: psutil.Process, make_run: Callable[..., Run]
) -> None:
    both = family(waiting)
    run = make_run()
    lock = run.claim()
    try:
        with pytest.raises(RunError, match="another process is at work"):
            launcher.start(run)
    finally:
        os.close(lock)
    until(lambda: all(map(gone, both)), 10.0)


def waiting_rank(tmp_path: Path, code: int) -> standby.WaitingRank:
    reading, orders = os.pipe()
    script = tmp_path / "waits.py"
    script.write_text(WAITS.replace("CODE", str(code)))
    process = subprocess.Popen([sys.executable, "-P", str(script)], stdin=reading)
    os.close(reading)
    process.returncode = 0  # the handle has no part in it from here on
    return standby.WaitingRank(process.pid, orders)


@pytest.mark.parametrize(("code", "told"), [(0, {}), (3, {0: 3}), (standby.UNFIT, {0: 9})])
def test_its_exit_is_the_rank_s_unless_it_could_not_import(
    code: int, told: dict[int, int], tmp_path: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN", "of this run")
    other = tmp_path / "other.py"
    other.write_text("import sys; sys.exit(9)")
    run = make_run()
    rank = waiting_rank(tmp_path, code)
    assert rank_launcher(run, 1, ["-P", str(other)], rank)() == told
    assert run.path.joinpath("seen").read_text() == f'[{rank.pid}, "0", "of this run"]'
    rank.dismiss()  # of one that has had its run, nothing


def test_a_rank_that_is_dismissed_is_gone(tmp_path: Path) -> None:
    rank = waiting_rank(tmp_path, 0)
    rank.dismiss()
    assert not psutil.pid_exists(rank.pid)
    with pytest.raises(OSError):
        os.fstat(rank.orders)
    rank.dismiss()


def rank_waits(folder: Path, order: bytes, torch: str) -> int:
    """Exit code of a process that waits as a rank does, with a module in PyTorch's place; it writes what it learns."""
    (folder / "torch.py").write_text(torch)
    code = (
        "import json, os, sys\nfrom finetui.engine import cuda_context, standby\n"
        "cuda_context.begin = lambda index: open('begun', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "told = standby.wait()\n"
        "assert sys.stdin.read() == ''\n"
        "with open('told', 'w') as file:\n    json.dump([told, os.getcwd(), dict(os.environ)], file)\n"
    )
    path = os.pathsep.join([str(folder), str(Path(finetui.__file__).parent.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, input=order, env=environment, cwd=folder, timeout=120, check=False).returncode


def test_a_rank_learns_of_its_run_and_its_environment(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    environment = {"ONLY": "caf\u00e9 \udcff"}
    order = json.dumps({"run": str(run), "environment": environment}).encode() + b"\n"
    assert rank_waits(tmp_path, order, "print('said by torch', flush=True)\n") == 0
    assert json.loads((run / "told").read_text()) == [[str(run), "said by torch\n"], str(run), LAZY | environment]


def test_a_rank_that_nobody_wants_or_that_can_not_import_ends(tmp_path: Path) -> None:
    slow = "import time\ntime.sleep(60)\n"
    assert rank_waits(tmp_path, b'{"run": "cut o', slow) == 0
    assert not (tmp_path / "told").exists()
    order = json.dumps({"run": str(tmp_path), "environment": {}}).encode() + b"\n"
    assert rank_waits(tmp_path, order, "import a_module_that_is_nowhere\n") == standby.UNFIT


@pytest.mark.parametrize("visible", ["3", "", None])
def test_the_gpu_of_a_run_is_made_ready_before_its_imports_end(visible: str | None, tmp_path: Path) -> None:
    """The module in PyTorch's place looks with which devices one was begun."""
    looks = (
        "import os, threading\nfor thread in threading.enumerate():\n    if thread.name == 'orders': thread.join()\n"
        "open('seen', 'w').write(open('begun').read() if os.path.exists('begun') else 'none')\n"
    )
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    order = json.dumps({"run": str(tmp_path), "environment": environment}).encode() + b"\n"
    assert rank_waits(tmp_path, order, looks) == 0
    assert (tmp_path / "seen").read_text() == (visible or "none")
    assert json.loads((tmp_path / "told").read_text())[2] == LAZY | environment


def test_no_name_is_added_to_the_environment_while_others_may_look(tmp_path: Path) -> None:
    looks = (
        "import os, sys\n"
        "def look(event, arguments):\n    if event == 'os.putenv' and arguments[0] not in os.environb:\n"
        "        open('added', 'ab').write(arguments[0])\nsys.addaudithook(look)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0"}
    order = json.dumps({"run": str(tmp_path), "environment": environment}).encode() + b"\n"
    assert rank_waits(tmp_path, order, looks) == 0
    assert json.loads((tmp_path / "told").read_text())[2] == LAZY | environment
    assert not (tmp_path / "added").exists()
