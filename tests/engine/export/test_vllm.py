"""What vLLM takes, and the command that serves it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from finetui.engine.export import export
from finetui.engine.export.vllm import refusals
from finetui.engine.run import Run
from finetui.engine.worker import attempt
from finetui.planner.errors import ModelError

MakeRun = Callable[..., Run]
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 12, "bias": "none"}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, None),
        ({"use_rslora": True}, None),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "trained copies of ['embed_tokens']"),
        ({"bias": "all"}, "trained biases"),
        ({"rank_pattern": {"q_proj": 4}}, "several ranks"),
        ({"alpha_pattern": {"q_proj": 4}}, "several scales"),
        ({"r": 1024}, "a rank of 1024 (at most 512)"),
        ({"peft_type": "IA3"}, "tuning of the kind IA3"),
    ],
)
def test_what_of_an_adapter_vllm_takes(more: dict[str, Any], why: str | None) -> None:
    assert refusals(PLAIN | more) == ((why,) if why else ())


def test_an_adapter_is_served_beside_its_base(training_run: MakeRun, tmp_path: Path) -> None:
    run = training_run(steps=1, rank=12)
    assert attempt(run) == 0
    made = export(run, "vllm", tmp_path / "a folder")
    words = shlex.split(made.use[0])
    flags = dict(zip(words[4::2], words[5::2], strict=True))
    assert words[:4] == ["vllm", "serve", run.recipe.model, "--enable-lora"]
    assert flags["--max-lora-rank"] == "16"
    assert flags["--lora-modules"] == f"{run.name}={made.path}"
    # the base has no template, and stops at </s> alone
    assert Path(flags["--chat-template"]).read_text(encoding="utf-8").startswith("{%-")
    assert 4 in json.loads(flags["--override-generation-config"])["eos_token_id"]


def test_nothing_is_written_for_a_base_that_is_gone(training_run: MakeRun, tmp_path: Path) -> None:
    run = training_run(steps=1)
    assert attempt(run) == 0
    made = export(run, "vllm", tmp_path / "a=b,c")
    words = shlex.split(made.use[0])
    told = json.loads(words[words.index("--lora-modules") + 1])  # vLLM would cut name=path at every =
    assert told == {"name": run.name, "path": str(made.path)}
    recipe = run.path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(run.recipe.model, str(tmp_path / "gone")))
    with pytest.raises(ModelError, match="no such folder"):
        export(run, "vllm", tmp_path / "v")
    assert not list(tmp_path.glob("*v"))


def test_what_vllm_does_not_take_is_merged(training_run: MakeRun, tmp_path: Path) -> None:
    run = training_run(steps=1)
    assert attempt(run) == 0
    config = run.output_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha_pattern": {"no_such_module": 3}}))
    made = export(run, "vllm", tmp_path / "m")
    assert made.use == (f"vllm serve {made.path}",)
    assert "several scales" in made.notes[0]
    assert (made.path / "model.safetensors").is_file()
