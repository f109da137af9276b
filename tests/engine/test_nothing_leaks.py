"""A real run of two ranks, with secrets around it: who can read it, who can reach it, where the secrets turn up."""

from __future__ import annotations

import contextlib
import functools
import stat
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("torch")
pytest.importorskip("aiohttp")

from finetui.engine.launcher import start
from finetui.engine.run import Run
from finetui.engine.status import LIVE_STATES

#: What stands in the environment; no byte of it may stand anywhere else.
SECRETS = {
    "HF_TOKEN": "hf_DontWriteThisDownAnywhere01",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYsecretKEY",
    "DATA_SESAME": "open-sesame/9f8e7d6c5b",
}


class Rows(BaseHTTPRequestHandler):
    """Serves one file to whoever knows the word."""

    rows = b""

    def do_GET(self) -> None:
        if "sesame=open-sesame/9f8e7d6c5b" not in self.path.replace("%2F", "/"):
            self.send_error(403)
            return
        begin, end = 0, len(self.rows)
        if ranges := self.headers.get("Range"):
            first, _, last = ranges.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(end, int(last) + 1 if last else end)
        self.send_response(206 if ranges else 200)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(self.rows)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.rows[begin:end])

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def address(rows_file: Path) -> Iterator[str]:
    """Where the rows are, with the name of the secret that it takes to get them."""
    handler = type("Handler", (Rows,), {"rows": rows_file.read_bytes()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/rows.jsonl?sesame=${{DATA_SESAME}}"
        server.shutdown()


def look(seen: dict[str, set[str]], supervisor: psutil.Process) -> None:
    """Note what the processes of a run listen on and were called with."""
    with contextlib.suppress(psutil.Error):
        for process in [supervisor, *supervisor.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                seen["called"].add(" ".join(process.cmdline()))
                for one in process.net_connections(kind="inet"):
                    if one.status == psutil.CONN_LISTEN:
                        seen["listens"].add(one.laddr.ip)


def holding(folder: Path, secret: bytes) -> list[str]:
    """Files of a folder that hold some bytes."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["a good run", "a failing one"])
def test_nothing_leaks(
    training_run: Callable[..., Run], address: str, broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    if broken:  # refused by the server, whose address the exception quotes
        monkeypatch.setenv("DATA_SESAME", "close-sesame/9f8e7d6c5b")
    recipe = {"data": address, "track": ["tensorboard"]}
    ranks = {"gpus": [0]} if broken else {"gpus": [0, 1], "strategy": "ddp"}
    run = training_run(steps=2, micro_batch=2, accumulation=2, recipe=recipe, **ranks)
    seen: dict[str, set[str]] = {"called": set(), "listens": set()}
    supervisor = psutil.Process(start(run))
    until = time.monotonic() + 300
    while run.status.state in LIVE_STATES and time.monotonic() < until:
        look(seen, supervisor)
        time.sleep(0.05)
    log = run.log_path(0).read_text() if run.log_path(0).exists() else ""
    assert run.status.state == ("failed" if broken else "finished"), run.status.message + log[-3000:]

    assert len(seen["called"]) >= 2
    assert seen["listens"] <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    for secret in (*SECRETS.values(), "close-sesame/9f8e7d6c5b", "9f8e7d6c5b"):
        assert not holding(tmp_path, secret.encode())
        assert not [line for line in seen["called"] if secret in line]
    assert holding(run.path, b"${DATA_SESAME}")

    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (run.path, *run.path.rglob("*"))}
    assert {str(path): oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_a_recipe_refuses_secrets(training_run: Callable[..., Run]) -> None:
    from finetui.planner.errors import RecipeError
    from finetui.planner.recipe import Recipe

    build = functools.partial(Recipe.build, source="recipe.yaml")
    for path in (
        "https://user:password@host/a.jsonl", "https://host/a.jsonl?token=abcdef", "s3://KEY:SECRET@bucket/a.jsonl",
        "https://bucket.s3.amazonaws.com/a.jsonl?X-Amz-Signature=abc", "https://hf_abcdefghijklmnopqrstuvwx@hf.co/a",
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=r"recipe\.yaml: data\.0\.path holds .*\$\{DATA_TOKEN\}"):
            build({"model": "m", "data": [{"path": path}]})
    build({"model": "m", "data": ["https://host/a.jsonl?token=${DATA_TOKEN}", "https://${USER}:${PW}@host/a.jsonl"]})
