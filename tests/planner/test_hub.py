"""find_config against a local server that answers as the Hub does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finetui.planner import hub
from finetui.planner.errors import HubError, ModelError
from finetui.tests.local_server import Answering, serving

CONFIG = {"model_type": "llama", "hidden_size": 64}


class _Hub(Answering):
    def do_GET(self) -> None:
        granted = self.headers.get("Authorization") == "Bearer good-token"
        if "/org/gated/" in self.path and not granted:
            self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
        elif "/org/fine/" in self.path or "/org/gated/" in self.path:
            self.answer(200, json.dumps(CONFIG).encode(), ETag='"abc"', X_Repo_Commit="0" * 40)
        elif "/org/gguf/" in self.path:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Error_Message="no such file")
        elif "/org/broken/" in self.path:
            self.answer(418, b"{}")
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="no such model")

    do_HEAD = do_GET


@pytest.fixture
def ask(tmp_path: Path):
    """Runs ``hub.<call>`` in a fresh process, since huggingface_hub reads its environment once; returns its output."""
    package_parent = Path(hub.__file__).parents[2]

    def run(call: str, **environment: str) -> str:
        code = (
            "from finetui.planner import hub\nfrom finetui.planner.errors import UserError\n"
            f"try: print(hub.{call})\nexcept UserError as error: print(type(error).__name__, error)"
        )
        env = {
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": endpoint,
            "PYTHONPATH": str(package_parent),
            "PATH": "/usr/bin:/bin",
            **environment,
        }
        done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert not done.returncode, done.stderr
        return done.stdout.strip()

    with serving(_Hub) as endpoint:
        yield run


def test_a_hub_model_is_fetched_and_then_cached(ask):
    assert ask("find_config('org/fine')") == str(("org/fine", CONFIG, "hub"))
    assert ask("find_config('org/fine')", HF_ENDPOINT="http://127.0.0.1:9") == str(("org/fine", CONFIG, "hub"))
    assert ask("find_config('org/fine')", HF_HUB_OFFLINE="1") == str(("org/fine", CONFIG, "hub"))


@pytest.mark.parametrize(
    ("model", "environment", "words"),
    [
        ("org/gated", {}, ("is gated", "HF_TOKEN")),
        ("org/missing", {}, ("has no model org/missing",)),
        ("org/gguf", {}, ("has no config.json", "GGUF")),
        ("org/broken", {}, ("error 418",)),
        ("org/fine", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ("can't be reached", "HF_ENDPOINT")),
        ("org/fine", {"HF_HUB_OFFLINE": "1"}, ("HF_HUB_OFFLINE is set",)),
        ("Qwen/Qwen3-8b-x", {}, ("Did you mean Qwen/Qwen3-8B",)),
    ],
)
def test_each_refusal_says_what_to_do(ask, model, environment, words):
    answer = ask(f"find_config('{model}')", **environment)
    assert answer.startswith("HubError")
    for word in words:
        assert word in answer


def test_a_token_opens_a_gated_model(ask):
    assert ask("find_config('org/gated')", HF_TOKEN="good-token").startswith("('org/gated'")


def test_folder_file_and_preset_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("asked the network"))
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert hub.find_config(str(folder)) == ("my-model", CONFIG, "folder")
    assert hub.find_config(str(folder / "config.json")) == ("my-model", CONFIG, "file")
    assert hub.find_config("qwen/qwen3-8b")[::2] == ("Qwen/Qwen3-8B", "preset")
    assert hub.find_config("google/gemma-3-4b-it")[::2] == ("google/gemma-3-4b-it", "preset")


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(ModelError, match=r"config\.json:3: this is not valid JSON"):
        hub.find_config(str(tmp_path / "config.json"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        hub.find_config(str(tmp_path.parent))
    with pytest.raises(ModelError, match="Did you mean openai-community/gpt2"):
        hub.find_config("gpt2")
    assert issubclass(HubError, Exception)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"n_layer": 10**400}, "n_layer is 1"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"vocab_size": float("inf")}, "vocab_size is inf"),
        ({"hidden_size": -(10**9)}, "hidden_size is -1000000000"),
        ({"text_config": {"intermediate_size": 10**9}}, "intermediate_size is 1000000000"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anybody_counts_to_them(
    tmp_path: Path, config: dict[str, object], named: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{named}.*, larger than that of any model") as caught:
        hub.read_config(path)
    assert caught.value.where == str(path)


def test_every_model_that_is_shipped_is_believed() -> None:
    assert hub.known_models()
    for _, path in hub.known_models().values():
        hub.read_config(path)
