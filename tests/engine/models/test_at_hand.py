"""What is told about the model of a recipe before a run begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.models.at_hand import check_model
from finetui.tests.local_server import Answering, serving


def test_a_model_folder_that_lacks_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (check,) = check_model(str(tmp_path))
    assert check.status == "fail"
    assert "lacks a tokenizer (tokenizer.json), weights (*.safetensors)" in check.detail


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A Hub with one open model, one gated one, and no other."""

    class Hub(Answering):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/models/")
            if name in {"org/gated/auth-check", "org/gated"} and name.endswith("auth-check"):
                return self.told(403, {"error": "gated"}, X_Error_Code="GatedRepo")
            if name.startswith(("org/open", "org/gated")):
                return self.told(200, {"id": "org/open", "modelId": "org/open", "siblings": []})
            return self.told(404, {"error": "none"}, X_Error_Code="RepoNotFound")

        def told(self, status: int, body: Any, **headers: str) -> None:
            self.answer(status, json.dumps(body).encode(), **headers)

    with serving(Hub) as endpoint:
        point_at(monkeypatch, tmp_path, endpoint)
        yield


def point_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str) -> None:
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hf_api, "constants", constants)


def test_models_of_the_hub(hub: None, tmp_path: Path) -> None:
    assert check_model("org/open")[0].status == "ok"
    gated = check_model("org/gated")[0]
    assert (gated.status, "gated" in gated.detail, "HF_TOKEN" in gated.do) == ("fail", True, True)
    absent = check_model("org/absent")[0]
    assert (absent.status, "no such model on the Hub" in absent.detail) == ("fail", True)
    assert check_model("/no/such/folder")[0].status == "fail"
    snapshot = tmp_path / "cache" / "models--org--absent" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (snapshot / "model.safetensors").touch()
    assert "local cache" in check_model("org/absent")[0].detail


def test_a_hub_that_does_not_answer_or_is_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    point_at(monkeypatch, tmp_path, "http://127.0.0.1:9")
    check = check_model("org/open")[0]
    assert (check.status, "does not answer" in check.detail) == ("fail", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "switched off" in check_model("org/open")[0].detail
