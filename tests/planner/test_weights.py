"""Sizes from safetensors headers: of folders, and by range request from a server that answers as the Hub does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetui.planner.errors import ModelError
from finetui.planner.weights import Stored, stored_weights
from finetui.tests.local_server import Answering, serving

COMMIT = "1" * 40


def _file(tensors, padding=0):
    """A safetensors file: its header, and weights that nobody should ask for."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, (dtype, shape) in tensors.items()
    }
    body = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return len(body).to_bytes(8, "little") + body + bytes(padding)


SHARDS = {
    "model-1.safetensors": _file({"a": ("BF16", [4, 8]), "n": ("F32", [8])}, padding=200_000),
    "model-2.safetensors": _file({"b": ("BF16", [3, 8])}, padding=200_000),
}
INDEX = {
    "metadata": {},
    "weight_map": {"a": "model-1.safetensors", "n": "model-1.safetensors", "b": "model-2.safetensors"},
}
FILES = {
    "org/sharded": {**SHARDS, "model.safetensors.index.json": json.dumps(INDEX).encode()},
    "org/single": {"model.safetensors": _file({"w": ("U8", [10, 1]), "s": ("F8_E4M3", [2, 2])})},
    "org/bin": {"pytorch_model.bin": b"x"},
    "org/gated": {"model.safetensors": _file({"w": ("BF16", [2])})},
}  # fmt: skip


class _Hub(Answering):
    asked: list[tuple[str, str]]

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        model = "/".join(parts[2:4] if api else parts[:2])
        span = self.headers.get("Range", "")
        self.asked.append((self.path, span))
        if model == "org/gated" and self.headers.get("Authorization") != "Bearer good-token":
            self._told(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
        elif api and "paths-info" in parts:
            length = int(self.headers.get("Content-Length", 0))
            names = json.loads(self.rfile.read(length) or b"{}").get("paths", [])
            found = [{"type": "file", "path": n, "size": 1, "oid": "e"} for n in names if n in FILES[model]]
            self._told(200, json.dumps(found).encode())
        elif api:
            siblings = [{"rfilename": name} for name in FILES[model]]
            self._told(200, json.dumps({"id": model, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            body = FILES[model].get(parts[-1])
            if body is None:
                self._told(404, b"{}", X_Error_Code="EntryNotFound", X_Error_Message="no such file")
            elif span:
                first, last = (int(n) for n in span.removeprefix("bytes=").split("-"))
                self._told(206, body[first : last + 1])
            else:
                self._told(200, body)

    do_HEAD = do_POST = do_GET

    def _told(self, status, body=b"", **headers):
        self.answer(status, body, **{"X_Repo_Commit": COMMIT, "ETag": '"e"', **headers})


@pytest.fixture
def ask(tmp_path):
    """Runs ``stored_weights`` in a fresh process, since huggingface_hub reads its environment once."""
    _Hub.asked = []

    def run(model, **environment):
        code = (
            "from finetui.planner.weights import stored_weights\nfrom finetui.planner.errors import UserError\n"
            f"try: print(stored_weights({model!r}))\nexcept UserError as error: print(type(error).__name__, error)"
        )
        env = {
            "HF_HOME": str(tmp_path / "hf"), "XDG_STATE_HOME": str(tmp_path / "state"), "PATH": "/usr/bin:/bin",
            "HF_ENDPOINT": endpoint,
            "PYTHONPATH": str(Path(sys.modules[Stored.__module__].__file__).parents[2]), **environment,
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert not done.returncode, done.stderr
        assert not done.stderr
        return done.stdout.strip()

    with serving(_Hub) as endpoint:
        yield run


WHOLE = str(Stored(2 * 56 + 4 * 8, {"BF16": 56, "F32": 8}))


def test_all_shards_count_and_only_their_headers_are_asked_for(ask):
    assert ask("org/sharded") == WHOLE
    spans = [span for path, span in _Hub.asked if path.split("?")[0].endswith(".safetensors") and span]
    assert len(spans) == 2
    assert all(span == "bytes=0-100000" for span in spans)


def test_an_answer_is_kept_for_its_commit_and_serves_without_a_network(ask):
    ask("org/sharded")
    _Hub.asked.clear()
    assert ask("org/sharded") == WHOLE
    assert not [path for path, _ in _Hub.asked if "safetensors" in path]
    assert ask("org/sharded", HF_HUB_OFFLINE="1") == WHOLE
    assert ask("org/sharded", HF_ENDPOINT="http://127.0.0.1:9") == WHOLE


def test_quantised_weights_count_in_their_own_dtype(ask):
    assert ask("org/single") == str(Stored(14, {"U8": 10, "F8_E4M3": 4}))


def test_refusals_say_what_to_do(ask):
    assert ask("org/bin") == "None"
    assert "is gated" in ask("org/gated")
    assert ask("org/gated", HF_TOKEN="good-token") == str(Stored(4, {"BF16": 2}))
    assert "HF_HUB_OFFLINE is set" in ask("org/single", HF_HUB_OFFLINE="1")
    assert "can't be reached" in ask("org/single", HF_ENDPOINT="http://127.0.0.1:9")


def test_a_folder_is_read_without_a_network(tmp_path):
    for name, body in SHARDS.items():
        (tmp_path / name).write_bytes(body)
    assert str(stored_weights(str(tmp_path))) == WHOLE
    assert stored_weights(str(tmp_path)).parameters == 64
    (tmp_path / "model-3.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match=r"model-3\.safetensors.*no safetensors file|can't be read"):
        stored_weights(str(tmp_path))
