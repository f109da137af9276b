"""A model from the Hub, through the real client, against a local server that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import finetui
from finetui.tests.local_server import Answering, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Locate = Callable[..., str]


@pytest.fixture
def locate(model_folder: Callable[[str], Path], tmp_path: Path) -> Iterator[Locate]:
    """Runs ``engine.models.load.locate`` in a process of its own, since the client reads its environment once."""
    folder = model_folder("llama")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    class Hub(Answering):
        def do_GET(self) -> None:
            path, allowed = self.path.partition("?")[0], self.headers.get("Authorization") == "Bearer good"
            if "/org/locked" in path and not allowed and "/resolve/" in path:
                self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
            elif path.startswith(("/api/models/org/open", "/api/models/org/locked")):
                if "/tree/" in path:
                    tree = [
                        {"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in files.items()
                    ]
                    self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                    return
                listed = {"id": "org/open", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
            elif "/resolve/" in path and path.rpartition("/")[2] in files:
                body = files[path.rpartition("/")[2]]
                self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="no such model")

        do_HEAD = do_GET

    def run(model: str, **environment: str) -> str:
        code = (
            "from finetui.engine.models.load import locate\nfrom finetui.planner.errors import UserError\n"
            f"try: print(*sorted(path.name for path in locate('{model}').iterdir()))\n"
            "except UserError as error: print(type(error).__name__, error)"
        )
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env = {
            **kept,
            "PYTHONPATH": os.pathsep.join([str(Path(finetui.__file__).parents[1]), *sys.path]),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": endpoint,
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    with serving(Hub) as endpoint:
        yield run


@pytest.mark.slow
def test_a_model_is_downloaded_once_and_then_found_without_a_network(locate: Locate) -> None:
    found = locate("org/open")
    assert "config.json" in found
    assert "model.safetensors" in found
    assert "tokenizer.json" in found
    assert locate("org/open", HF_HUB_OFFLINE="1") == found


@pytest.mark.slow
def test_refusals_are_told_in_plain_words(locate: Locate) -> None:
    gated = locate("org/locked")
    assert gated.startswith("HubError org/locked: this model is gated")
    assert "HF_TOKEN" in gated
    assert "config.json" in locate("org/locked", HF_TOKEN="good")
    assert locate("org/none").startswith("HubError org/none: the Hub has no such model")
    assert "not in the cache" in locate("org/never", HF_HUB_OFFLINE="1")
