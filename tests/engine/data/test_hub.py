"""Datasets from the Hub through the real client, against a local server that answers as the Hub does."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

pytest.importorskip("datasets")

import finetui
from finetui.tests.local_server import Answering, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Ask = Callable[..., list[Any]]


def lines(name: str, count: int, size: int = 0) -> bytes:
    return "".join(json.dumps({"text": f"{name} {i}" + "x" * size}) + "\n" for i in range(count)).encode()


CONFIGS = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/train.jsonl}]
- config_name: de
  data_files: [{split: train, path: de/train.jsonl}]
---
"""


@functools.cache
def datasets() -> dict[str, dict[str, bytes]]:
    """What the server has: files of datasets. Of the 40 MB of org/broken it gives 25."""
    large = lines("row", 40_000, 1000)
    return {
        "org/rows": {"data/train.jsonl": lines("train", 30), "data/validation.jsonl": lines("held out", 4)},
        "org/two": {"README.md": CONFIGS.encode(), "en/train.jsonl": lines("en", 3), "de/train.jsonl": lines("de", 3)},
        "org/large": {"train.jsonl": large * 3},
        "org/broken": {"train.jsonl": large},
        "org/locked": {"train.jsonl": lines("locked", 3)},
    }


#: Reads sources in a process of its own, since the client reads its environment once; prints what it finds.
PROGRAM = """
import json, sys, time
time.sleep = lambda _: None  # the client tries again many times, and waits in between
from finetui.engine.data.sources import mark_of, read_rows
from finetui.planner.datasource import DataSource
from finetui.planner.errors import UserError

for options in json.loads(sys.argv[1]):
    found = []
    try:
        source = DataSource(**options)
        for row in read_rows(source):
            found.append([row.values["text"].rstrip("x"), row.where])
        print(json.dumps({"rows": len(found), "first": found[:1], "last": found[-1:], "mark": mark_of(source)}))
    except UserError as error:
        print(json.dumps({"rows": len(found), "error": f"{type(error).__name__} {error}"}))
"""


class Hub(Answering):
    """As much of the Hub as reading a dataset asks for."""

    protocol_version = "HTTP/1.1"
    sent = 0

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        path = self.path.partition("?")[0]
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name == "org/locked" and self.headers.get("Authorization") != "Bearer good":
            self._json({}, 403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        elif name not in datasets():
            self._json({}, 404, X_Error_Code="RepoNotFound", X_Error_Message="no such dataset")
        elif rest[:1] == ["resolve"]:
            self._file(name, "/".join(rest[2:]))
        elif rest[:1] == ["tree"]:
            self._json(self._tree(name, "/".join(rest[2:]), "recursive=true" in self.path.lower()))
        elif rest[:1] == ["paths-info"]:
            text = body.decode()
            wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            self._json([item for item in self._tree(name, "", True) if item["path"] in wanted])
        else:
            siblings = [{"rfilename": file} for file in datasets()[name]]
            self._json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    do_HEAD = do_POST = do_GET

    def _tree(self, name: str, under: str, recursive: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for file, body in datasets()[name].items():
            if under and not file.startswith(f"{under}/"):
                continue
            folders = Path(file).parents
            for folder in [p.as_posix() for p in folders if p.as_posix() != "." and len(p.as_posix()) > len(under)]:
                if recursive or Path(folder).parent.as_posix() == (under or "."):
                    found[folder] = {"type": "directory", "path": folder, "oid": "0"}
            if recursive or Path(file).parent.as_posix() == (under or "."):
                oid = hashlib.sha1(body).hexdigest()
                found[file] = {"type": "file", "path": file, "size": len(body), "oid": oid}
        return list(found.values())

    def _file(self, name: str, file: str) -> None:
        body = datasets()[name].get(file)
        if body is None:
            self._json({}, 404, X_Error_Code="EntryNotFound", X_Error_Message="no such file")
            return
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        start, stop, status = 0, len(body), 200
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), int(last) + 1 if last else len(body), 206
            headers["Content_Range"] = f"bytes {start}-{min(stop, len(body)) - 1}/{len(body)}"
        part = body[start:stop]
        if self.command == "HEAD":
            self.answer(status, part, **headers)
            return
        self.answer(status, b"", **{"Content-Length": str(len(part)), **headers})
        if name == "org/broken":
            part = part[: max(0, 25_000_000 - start)]
            self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client has read enough
            for begin in range(0, len(part), 1 << 16):
                self.wfile.write(part[begin : begin + (1 << 16)])
                Hub.sent += min(1 << 16, len(part) - begin)


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Reads sources from the server and tells what came of each."""
    Hub.sent = 0

    def read(*sources: dict[str, Any], **environment: str) -> list[Any]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        env = {
            **kept,
            "PYTHONPATH": os.pathsep.join([str(Path(finetui.__file__).parents[1]), *sys.path]),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": endpoint,
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM, json.dumps(sources)],
            env=env, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with serving(Hub) as endpoint:
        yield read


@pytest.mark.slow
def test_splits_subsets_and_limits_as_a_recipe_names_them(ask: Ask) -> None:
    told = ask(
        {"path": "org/rows"},
        {"path": "org/rows", "split": "eval"},
        {"path": "org/rows", "hub_split": "validation"},
        {"path": "org/rows", "hub_split": "train[:10%]"},
        {"path": "org/rows", "streaming": True},
        {"path": "org/two", "subset": "de"},
    )
    assert [found["rows"] for found in told] == [30, 4, 4, 3, 30, 3]
    assert told[0]["last"] == [["train 29", "org/rows/train:30"]]
    assert told[1]["first"] == [["held out 0", "org/rows/validation:1"]]
    assert told[4]["last"] == told[0]["last"]
    assert told[4]["mark"] == [COMMIT]  # of what is streamed nothing is stored that could be told apart otherwise
    assert told[0]["mark"] != told[3]["mark"]


@pytest.mark.slow
def test_what_the_hub_does_not_give_is_told_in_plain_words(ask: Ask) -> None:
    cases = {
        "DataError org/rows: the dataset has no split 'nope'. Set hub_split: to one of ['train', 'validation'].": {
            "path": "org/rows", "hub_split": "nope",
        },
        "DataError org/two: a subset of the dataset must be named. Set subset: to one of ['en', 'de'].": {
            "path": "org/two",
        },
        "DataError org/two: the dataset has no subset 'fr'. Set subset: to one of ['en', 'de'].": {
            "path": "org/two", "subset": "fr",
        },
        "HubError org/none: there is neither a file nor a hub dataset called 'org/none'": {"path": "org/none"},
        "HubError org/locked: the dataset is gated. Accept its terms at": {"path": "org/locked"},
    }  # fmt: skip
    for found, words in zip(ask(*cases.values()), cases, strict=True):
        assert found["error"].startswith(words)
    assert ask({"path": "org/locked"}, HF_TOKEN="good")[0]["rows"] == 3


@pytest.mark.slow
def test_data_larger_than_the_disk_is_read_as_far_as_it_is_wanted(ask: Ask, tmp_path: Path) -> None:
    told = ask({"path": "org/large", "limit": 20}, {"path": "org/large", "limit": 20, "streaming": True})
    for found in told:
        assert found["last"] == [["row 19", "org/large/train:20"]]
        assert found["mark"] == [COMMIT]
    assert 0 < Hub.sent < len(datasets()["org/large"]["train.jsonl"])  # of two readings, each a small part
    stored = sum(path.stat().st_size for path in (tmp_path / "hf").rglob("*") if path.is_file())
    assert stored < 1_000_000


@pytest.mark.slow
def test_a_stream_that_breaks_off_is_named_and_counted(ask: Ask) -> None:
    (found,) = ask({"path": "org/broken", "streaming": True})
    words = f"HubError org/broken: the stream broke off after {found['rows']:,} rows: the hub can't be reached"
    assert found["error"].startswith(words)
    assert 0 < found["rows"] < 40_000
