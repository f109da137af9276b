"""Which models there are by name, with and without a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetui.planner import hub_search
from finetui.planner.errors import HubError


def test_words_in_any_order_and_beginnings_first() -> None:
    names = ["a/tiny-llama", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B"]
    assert hub_search.matching(names, "llama") == ["meta-llama/Llama-3.1-8B", "a/tiny-llama"]
    assert hub_search.matching(names, "8b LLAMA") == ["meta-llama/Llama-3.1-8B"]
    assert hub_search.matching(names, "") == ["a/tiny-llama", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B"]


def test_folders_that_hold_a_model_come_first(tmp_path: Path) -> None:
    for name in ("b", "a", "c", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    assert hub_search.folders(f"{tmp_path}/") == [f"{tmp_path}/c", f"{tmp_path}/a/", f"{tmp_path}/b/"]
    assert hub_search.folders(f"{tmp_path}/.h") == [f"{tmp_path}/.hidden/"]
    assert hub_search.folders("qwen") == []
    assert hub_search.folders(f"{tmp_path}/nosuch/x") == []


def test_the_cache_names_models_with_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    whole = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "abc"
    whole.mkdir(parents=True)
    (whole / "config.json").write_text("{}")
    (tmp_path / "models--half--done" / "snapshots").mkdir(parents=True)
    assert hub_search.cached() == ["Qwen/Qwen3-8B"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    assert hub_search.cached() == []


def test_the_hub_is_asked_once_and_for_text_models(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    class Api:
        def list_models(self, **named: Any) -> list[Any]:
            asked.append(named)
            return [SimpleNamespace(id="a/b"), SimpleNamespace(id="c/d")]

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub_search, "reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub_search.search("b") == ["a/b", "c/d"]
    assert [(call["search"], call["pipeline_tag"]) for call in asked] == [("b", "text-generation")]


def test_offline_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        hub_search.search("qwen")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub_search, "reachable", lambda: False)
    with pytest.raises(HubError, match="can't be reached"):
        hub_search.search("qwen")
