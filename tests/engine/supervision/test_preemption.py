"""Notices of clouds that a machine will be taken away, against servers that answer as the clouds' do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.supervision import preemption
from finetui.engine.supervision.preemption import Aws, Notices, azure, cloud_of, google, sources
from finetui.engine.supervisor import supervise
from finetui.planner.errors import RecipeError
from finetui.planner.limits import Limits
from finetui.planner.recipe import Recipe

FAKE = str(Path(__file__).parents[1] / "fake_rank.py")


class Cloud:
    """A metadata service: what it answers by method and path, and what it requires of a question."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.asked: list[str] = []
        self.requires: Callable[[str, Any], int] = lambda what, headers: 200
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                what = f"{self.command} {self.path}"
                cloud.asked.append(what)
                code = cloud.requires(what, self.headers)
                body = cloud.answers.get(what)
                self.send_response(code if code != 200 else 404 if body is None else 200)
                self.end_headers()
                if code == 200 and body is not None:
                    self.wfile.write(body.encode())

            do_PUT = do_GET

            def log_message(self, *_: object) -> None:
                """Silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    for name in ("http_proxy", "HTTP_PROXY"):  # a proxy would answer for another machine
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    made = Cloud()
    yield made
    made.server.shutdown()
    made.server.server_close()


def in_(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_aws_tells_behind_a_session_token(cloud: Cloud) -> None:
    def requires(what: str, headers: Any) -> int:
        if what.startswith("PUT"):
            return 200 if headers["X-aws-ec2-metadata-token-ttl-seconds"] == "21600" else 400
        return 200 if headers["X-aws-ec2-metadata-token"] == "secret" else 401

    cloud.requires = requires
    cloud.answers["PUT /latest/api/token"] = "secret"
    service = Aws(cloud.base)
    assert service.ask() is None
    at = in_(100).strftime("%Y-%m-%dT%H:%M:%SZ")
    cloud.answers["GET /latest/meta-data/spot/instance-action"] = json.dumps({"action": "terminate", "time": at})
    left = service.ask()
    assert left is not None
    assert 60 < left <= 100
    assert cloud.asked.count("PUT /latest/api/token") == 1
    cloud.answers["GET /latest/meta-data/spot/instance-action"] = '{"time": "2017-09-18T08:22:00Z"}'
    assert service.ask() == 120.0  # one of the two clocks is wrong: the usual notice


def test_google_tells_of_preemption_and_of_maintenance(cloud: Cloud) -> None:
    cloud.requires = lambda what, headers: 200 if headers["Metadata-Flavor"] == "Google" else 403
    instance = "GET /computeMetadata/v1/instance"
    cloud.answers = {f"{instance}/preempted": "FALSE\n", f"{instance}/maintenance-event": "NONE"}
    assert google(cloud.base) is None
    cloud.answers[f"{instance}/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert google(cloud.base) == 60.0
    cloud.answers[f"{instance}/preempted"] = "TRUE"
    assert google(cloud.base) == 30.0


def test_azure_tells_of_scheduled_events(cloud: Cloud) -> None:
    cloud.requires = lambda what, headers: 200 if headers["Metadata"] == "true" else 400
    path = "GET /metadata/scheduledevents?api-version=2020-07-01"
    cloud.answers[path] = '{"DocumentIncarnation": 1, "Events": []}'
    assert azure(cloud.base) is None
    freeze = {"EventType": "Freeze", "NotBefore": format_datetime(in_(10), usegmt=True)}
    preempt = {"EventType": "Preempt", "NotBefore": format_datetime(in_(25), usegmt=True)}
    cloud.answers[path] = json.dumps({"Events": [freeze]})
    assert azure(cloud.base) is None
    cloud.answers[path] = json.dumps({"Events": [freeze, preempt]})
    left = azure(cloud.base)
    assert left is not None
    assert 5 < left <= 25
    cloud.answers[path] = json.dumps({"Events": [{**preempt, "NotBefore": "", "EventStatus": "Started"}]})
    assert azure(cloud.base) == 0.0


@pytest.mark.parametrize("answer", ["<html>", "[]", '{"time": 5}', '{"time": "soon"}'])
def test_nonsense_and_silence_are_no_notice(
    cloud: Cloud, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, answer: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", cloud.base)
    cloud.answers = {"PUT /latest/api/token": "t", "GET /latest/meta-data/spot/instance-action": answer}
    told: list[str] = []
    with Notices(Limits(), make_run(), lambda who, left: told.append(who), every_s=0.05):
        until = time.monotonic() + 10
        while sum("instance-action" in what for what in cloud.asked) < 3 and time.monotonic() < until:
            time.sleep(0.02)
    assert not told
    assert sum("instance-action" in what for what in cloud.asked) >= 3  # it is asked on
    assert capsys.readouterr().err.count("can't be asked") == 1


def test_only_the_cloud_that_the_firmware_names_is_asked(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert cloud_of(tmp_path) is None
    assert set(sources(Limits(), run, tmp_path)) == {"control/preempted"}
    for name, cloud in (("Amazon EC2", "AWS"), ("Google", "Google Cloud")):
        (tmp_path / "sys_vendor").write_text(name + "\n")
        assert cloud in sources(Limits(), run, tmp_path)
        assert cloud not in sources(Limits(preemption="off"), run, tmp_path)
    (tmp_path / "sys_vendor").write_text("Microsoft Corporation\n")
    assert cloud_of(tmp_path) is None  # Hyper-V on anybody's machine
    (tmp_path / "chassis_asset_tag").write_text("7783-7084-3265-9085-8269-3286-77\n")
    assert cloud_of(tmp_path) == "Azure"


def test_a_file_and_a_command_are_heard(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run()
    asks = sources(Limits(grace_s=40.0, preemption_command=f"test -e {tmp_path}/taken"), run)
    assert [ask() for ask in asks.values()] == [None, None]
    (tmp_path / "taken").touch()
    (run.path / "control" / preemption.FILE).write_text("12.5")
    assert [ask() for ask in asks.values()] == [12.5, 40.0]
    assert asks["control/preempted"]() is None  # said once: a run that resumes is not taken away again
    (run.path / "control" / preemption.FILE).write_text("soon")
    assert asks["control/preempted"]() == 40.0


def test_it_is_told_once_and_the_thread_ends(make_run: Callable[..., Run]) -> None:
    run = make_run()
    (run.path / "control" / preemption.FILE).touch()
    told: list[tuple[str, float]] = []
    with Notices(Limits(), run, lambda who, left: told.append((who, left)), every_s=0.01) as notices:
        notices._thread.join(10)
    assert told == [("control/preempted", 30.0)]


def test_a_command_that_is_never_asked_is_refused() -> None:
    with pytest.raises(RecipeError, match="preemption_command has no effect"):
        Recipe.build({"model": "m", "limits": {"preemption": "off", "preemption_command": "true"}})


def test_a_spot_notice_ends_a_run_with_a_checkpoint(
    cloud: Cloud, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", cloud.base)
    cloud.answers["PUT /latest/api/token"] = "secret"
    run = make_run()

    def take_away() -> None:
        while run.recorded.state != "running":
            time.sleep(0.02)
        notice = {"action": "stop", "time": in_(120).strftime("%Y-%m-%dT%H:%M:%SZ")}
        cloud.answers["GET /latest/meta-data/spot/instance-action"] = json.dumps(notice)

    threading.Thread(target=take_away, daemon=True).start()
    outcome = supervise(run, worker=(FAKE, "endless"))
    assert (outcome.state, outcome.cause) == ("failed", "preempted")
    assert "a checkpoint was written" in outcome.message
    told = [event.data["what"] for event in read_events(run.events_path) if event.type == "warning"]
    assert told[0].startswith("AWS will take this machine away in 1")
