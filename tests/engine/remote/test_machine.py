"""Runs of another machine: an ssh that runs everything on this one, and run directories in another home folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.events import Eval, EventLog, LogLine, Step, read_events
from finetui.engine.remote.link import Link
from finetui.engine.remote.machine import _ADDRESS, Host, MirroredRun, frames, take
from finetui.engine.run import Run
from finetui.planner.errors import RunError
from finetui.tests.bench.long_run import lines

SSH = (str(Path(__file__).parent / "fake_ssh.sh"),)
STEP = Step(1, 0.1, 2.5, 1e-4, 0.5, 100, 10.0, 1.0, 50)


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of the other machine."""
    home = tmp_path / "home of ada"
    (home / "runs").mkdir(parents=True)
    monkeypatch.setenv("FAKE_SSH_HOME", str(home))
    return home


@pytest.fixture
def host() -> Iterator[Host]:
    machine = Host("ada@box", ssh=SSH)
    yield machine
    for link in list(machine.links.values()):
        assert isinstance(link, Link)
        link.close()
    machine.close()


def make(folder: Path, name: str, **status: Any) -> Run:
    path = folder / name
    (path / "log").mkdir(parents=True)
    tree = {"state": "running", "pid": os.getpid(), "host": socket.gethostname(), "created": 1000.0, **status}
    (path / "run.json").write_text(json.dumps(tree, indent=2), encoding="utf-8")
    (path / "recipe.yaml").write_text("model: a/b\n", encoding="utf-8")
    (path / "plan.json").write_text("{}", encoding="utf-8")
    run = Run(path)
    with EventLog(run.events_path) as log:
        log.append(STEP)
    return run


def listed(host: Host) -> dict[str, MirroredRun]:
    return {run.name: run for run in host.runs() if isinstance(run, MirroredRun)}


def test_runs_are_listed_from_their_folder_and_from_the_index(there: Path, host: Host) -> None:
    make(there / "runs", "first")
    elsewhere = make(there / "else where", "se'cond $(x)", created=2000.0, state="finished")
    index = there / ".local" / "state" / "finetui" / "runs"
    index.parent.mkdir(parents=True)
    index.write_text(f"{elsewhere.path}\n/gone/away\n", encoding="utf-8")
    found = host.runs()
    assert [run.recorded.created for run in found] == [2000.0, 1000.0]
    assert [getattr(run, "remote") for run in found] == [str(elsewhere.path), str(there / "runs" / "first")]  # noqa: B009
    first = listed(host)["first"]
    assert (first.status.state, first.alive) == ("running", True)
    assert read_events(first.events_path)[0].data["loss"] == 2.5
    assert (first.path / "recipe.yaml").read_text(encoding="utf-8") == "model: a/b"
    assert host.open("first") is host.open("fir") is first
    with pytest.raises(RunError, match="no run 'third'"):
        host.open("third")


def test_a_list_that_is_asked_for_again_keeps_what_it_knew(there: Path, host: Host) -> None:
    far = make(there / "runs", "long")
    made, _ = lines(40_000, 2, 1000.0)
    far.events_path.write_text("\n".join(made[:39_000]) + "\n", encoding="utf-8")
    near = listed(host)["long"]
    seldom = [event.seq for event in read_events(near.events_path) if event.type in ("eval", "state", "checkpoint")]
    wanted = [event.seq for event in read_events(far.events_path) if event.type in ("eval", "state", "checkpoint")]
    assert seldom == wanted
    with far.events_path.open("a", encoding="utf-8") as file:
        file.write("\n".join(made[39_000:]) + "\n")
    host.runs()
    events = read_events(near.events_path)
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    assert set(seldom) <= {event.seq for event in events}
    assert events[-1].seq == len(made)


def test_a_run_that_nobody_lists_is_opened_by_its_path(there: Path, host: Host) -> None:
    far = make(there / "else where", "hidden")
    near = host.open(str(far.path))
    Link(near).wait()
    assert near.recorded.state == "running"
    assert read_events(near.events_path) == read_events(far.events_path)
    with pytest.raises(RunError, match="no folder /nowhere"):
        Link(host.open("/nowhere")).wait()


def test_a_process_that_is_gone_is_a_lost_run(there: Path, host: Host) -> None:
    make(there / "runs", "dead", pid=2**22 - 3)
    make(there / "runs", "afar", pid=2**22 - 3, host="a third machine")
    runs = listed(host)
    assert runs["dead"].status.state == "lost"
    assert "ssh ada@box finetui resume dead" in runs["dead"].status.do
    assert (runs["afar"].alive, runs["afar"].status.state) == (None, "running")


def test_what_is_written_there_appears_here(there: Path, host: Host) -> None:
    far = make(there / "runs", "live")
    (far.path / "log" / "rank0.log").write_text("hello\n", encoding="utf-8")
    near = listed(host)["live"]
    Link(near).wait()
    assert [event.seq for event in read_events(near.events_path)] == [1]
    assert near.log_path(0).read_text(encoding="utf-8") == "hello\n"
    with EventLog(far.events_path) as log:
        log.append(Eval(1, 2.25))
        log.append(LogLine(0, "ünïcode \u2028 and a \x1b[31mcolour"))
    far.update(state="finished")
    wait_for(lambda: near.status.state == "finished")
    wait_for(lambda: near.events_path.read_bytes() == far.events_path.read_bytes())
    before = near.events_path.read_bytes()
    host.runs()  # a listing leaves the events of a run that is followed alone
    assert near.events_path.read_bytes() == before


def test_a_connection_that_breaks_is_taken_up_where_it_broke_off(
    there: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = make(there / "runs", "live")
    near = listed(host)["live"]
    link = Link(near, retry_s=0.1)
    link.wait()
    assert link._process is not None
    monkeypatch.setenv("FAKE_SSH_DOWN", "1")
    link._process.kill()
    wait_for(lambda: "no connection to ada@box: ssh: connect to host" in near.status.message)
    assert near.status.state == "running"
    with EventLog(far.events_path) as log:
        log.append(Eval(1, 2.25))
    monkeypatch.delenv("FAKE_SSH_DOWN")
    wait_for(lambda: near.events_path.read_bytes() == far.events_path.read_bytes())
    wait_for(lambda: near.status.message == "")


def test_a_long_past_comes_in_part_and_the_rest_whole(there: Path, host: Host) -> None:
    far = make(there / "runs", "long")
    made, about = lines(20_000, 2, 1000.0)
    far.events_path.write_text("\n".join(made) + "\n", encoding="utf-8")
    size = far.events_path.stat().st_size
    near = listed(host)["long"]
    Link(near, long_bytes=400_000).wait()
    whole, part = read_events(far.events_path), read_events(near.events_path)
    assert near.events_path.stat().st_size < 0.4 * size
    assert [event.seq for event in part] == sorted({event.seq for event in part})
    by_seq = {event.seq: repr(event) for event in whole}
    assert all(by_seq[event.seq] == repr(event) for event in part)
    assert {event.seq for event in whole if event.type in ("eval", "checkpoint", "state")} <= {e.seq for e in part}
    end = [event.seq for event in whole[-300:]]
    assert [event.seq for event in part][-300:] == end
    steps = [event.data["step"] for event in part if event.type == "step"]
    assert all(
        sum(low <= s < low + about.steps // 10 for s in steps) > 20 for low in range(1, about.steps, about.steps // 9)
    )


def test_requests_reach_the_run(there: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    far = make(there / "runs", "live")
    near = listed(host)["live"]
    near.request("stop")
    assert far.requested("stop")
    with pytest.raises(RunError, match="is not its supervisor"):
        host.kill(near)  # its process is this test, which is no supervisor
    with pytest.raises(RunError, match="no finetui on the PATH"):
        host.resume(near)
    shutil.rmtree(far.path)
    with pytest.raises(RunError, match=r"can't cd|No such file"):
        near.request("checkpoint")


def test_a_run_that_is_deleted_there(there: Path, host: Host) -> None:
    far = make(there / "runs", "live")
    link = Link(near := listed(host)["live"])
    link.wait()
    shutil.rmtree(far.path)
    wait_for(lambda: bool(link.gone))
    assert "no run in" in near.status.message or "no folder" in near.status.message
    with pytest.raises(RunError, match=r"no run in|no folder"):
        link.wait()


def test_a_machine_that_is_not_there_says_what_ssh_says(there: Path) -> None:
    machine = Host("nowhere", ssh=SSH)
    with pytest.raises(RunError, match="Could not resolve hostname"):
        machine.runs()
    machine.close()


@pytest.mark.parametrize("address", ["-oProxyCommand=reboot", "", "a b", "box;reboot", "box\n", "$(x)", "-"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(RunError, match="no address"):
        Host(address)


def test_what_another_machine_sends_stays_in_the_mirror(host: Host, tmp_path: Path) -> None:
    run = host.mirror("/far/../../../etc/..")
    assert run.path.parent.parent == Path(host._folder.name)
    stream = tmp_path / "stream"
    stream.write_bytes(
        b"hello\nF 1 ../../evil\nx\nL 1 ../evil\nx\nL 1 log/../evil\nx\nL 1 log/.hidden\nx\nF x y\n"
        b"L 3 log/ok.log\nabc\nE 99999999 5\ncut off"
    )
    before = set(tmp_path.rglob("*"))
    with stream.open("rb") as file:
        kinds = []
        for frame in frames(file):
            kinds.append(frame.kind)
            take(run, frame)
    assert kinds == ["hello", "F", "L", "L", "L", "L"]
    assert {path.name for path in run.path.rglob("*") if path.is_file()} == {"events.jsonl", "ok.log"}
    assert set(tmp_path.rglob("*")) == before
    assert not list(Path(host._folder.name).rglob("evil"))


def test_the_mirrors_go_with_their_host(there: Path) -> None:
    make(there / "runs", "live")
    machine = Host("box", ssh=SSH)
    (run,) = machine.runs()
    folder = Path(machine._folder.name)
    assert run.path.is_relative_to(folder)
    assert folder.stat().st_mode & 0o077 == 0
    machine.close()
    assert not folder.exists()


def test_the_time_is_that_of_the_other_machine(host: Host) -> None:
    host.set_clock(time.time() + 0.5)
    assert abs(host.now() - time.time()) < 0.3  # half a second is the way of the message
    host.set_clock(time.time() - 3600)
    assert abs(host.now() - (time.time() - 3600)) < 5
    assert _ADDRESS.fullmatch("ada@[fe80::1%eth0]")
