"""Checkpoints that are packed already: read from their config, planned or refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.models import at_hand
from finetui.engine.planning import plan_for
from finetui.planner import hub
from finetui.planner.architecture import Architecture
from finetui.planner.errors import HubError, ModelError
from finetui.planner.fit import fit_table
from finetui.planner.hardware import find_gpu
from finetui.planner.hub import known_models
from finetui.planner.packed import Packed, packed_weights
from finetui.planner.recipe import Recipe

NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "vision_tower"],
}  # fmt: skip
SHAPE = json.loads(known_models()["qwen/qwen3-8b"][1].read_text())


@pytest.mark.parametrize(
    ("told", "packed"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "gptq", "bits": 4}, Packed("gptq", 4)),
        ({"quant_method": "AWQ", "bits": "4"}, Packed("awq")),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Packed("fp8")),
        (NF4, Packed("bitsandbytes", 4, ours=True)),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, Packed("bitsandbytes", 4, why_not="they are FP4, not NF4")),
        (
            {**NF4, "bnb_4bit_use_double_quant": False},
            Packed("bitsandbytes", 4, why_not="their scales are not quantised a second time"),
        ),
        (
            {**NF4, "llm_int8_skip_modules": ["lm_head", "model.layers.3.mlp"]},
            Packed("bitsandbytes", 4, why_not="some of them are not packed (model.layers.3.mlp)"),
        ),
        ({"load_in_8bit": True}, Packed("bitsandbytes", 8)),
        ([1], None),
    ],
)
def test_what_a_config_says(told: Any, packed: Packed | None) -> None:
    assert packed_weights({} if told is None else {"quantization_config": told}) == packed
    assert packed_weights({"text_config": {"quantization_config": told}}) == packed


def folder(path: Path, told: dict[str, Any], name: str = "Acme-8B-Instruct-GPTQ-Int4") -> str:
    made = path / name
    made.mkdir()
    (made / "config.json").write_text(json.dumps({**SHAPE, "quantization_config": told}))
    return str(made)


def plan(model: str, tuning: str, **more: Any) -> Any:
    return plan_for(Recipe.build({"model": model, "tuning": tuning, "hardware": {"gpu": "H200"}}), **more)


@pytest.mark.parametrize(
    ("told", "tuning", "said"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "qlora",
            r"stored as GPTQ \(4 bits\), through which finetui can't train\. Use the model that it was made from "
            r"\(by its name .*Acme-8B-Instruct\), with tuning: qlora",
        ),
        ({"quant_method": "awq", "bits": 4}, "lora", r"stored as AWQ \(4 bits\)"),
        ({"quant_method": "hqq"}, "lora", "stored as HQQ, through"),
        (NF4, "lora", "stored in NF4, which tuning lora can't be put on. Use tuning: qlora"),
        (NF4, "full", "stored in NF4, which tuning full"),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, "qlora", "in 4 bits by bitsandbytes, but they are FP4, not NF4"),
        (
            {"quant_method": "fp8"},
            "qlora",
            "stored as FP8, and can't be packed as NF4 while they are read. Use tuning: lora",
        ),
    ],
)
def test_what_can_not_be_trained_is_refused(tmp_path: Path, told: dict[str, Any], tuning: str, said: str) -> None:
    model = folder(tmp_path, told)
    with pytest.raises(ModelError, match=said):
        plan(model, tuning)
    assert plan(model, tuning, framework="axolotl").fits  # another program's run is another program's business


def test_what_can_be_trained_is_planned_as_it_will_be(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(SHAPE))
    packed, opened = folder(tmp_path, NF4, "nf4"), folder(tmp_path, {"quant_method": "fp8"}, "fp8")
    plain = str(tmp_path / "plain")
    assert plan(packed, "qlora").memory == plan(plain, "qlora").memory
    found = plan(opened, "lora")
    assert found.memory == plan(plain, "lora").memory
    (why,) = [reason.why for reason in found.reasons if reason.setting == "weights"]
    assert why == "the checkpoint's FP8 is opened as it is read, to be trained on"


def test_plain_models_are_as_they_were() -> None:
    assert Architecture.from_config(SHAPE).packed is None


def test_what_fits_leaves_out_what_can_not_be_trained() -> None:
    def tunings(told: dict[str, Any], **more: Any) -> set[str]:
        shape = Architecture.from_config({**SHAPE, "quantization_config": told})
        return {row.tuning for row in fit_table(shape, [find_gpu("H200")], sequence_lengths=[2048], **more)}

    assert tunings({"quant_method": "mxfp4"}) == {"full", "lora"}
    assert tunings(NF4) == {"qlora"}
    assert tunings({"quant_method": "awq"}, framework="trl") == {"full", "lora", "qlora"}
    with pytest.raises(ModelError, match="stored as AWQ"):
        tunings({"quant_method": "awq"})


def test_a_model_known_by_name_is_asked_for_its_own_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that ship are planned without network; how a checkpoint is packed is asked before it is downloaded."""
    monkeypatch.setattr(at_hand, "folder_of", lambda model: None)
    monkeypatch.setattr(hub, "remote_config", lambda model: {**SHAPE, "quantization_config": {"quant_method": "mxfp4"}})
    recipe = Recipe.build({"model": "openai/gpt-oss-20b", "tuning": "qlora"})
    with pytest.raises(ModelError, match=r"openai/gpt-oss-20b: .*stored as MXFP4, and can't be packed as NF4"):
        at_hand.check_stored(recipe)
    assert at_hand.check_stored(recipe.with_overrides(["tuning=lora"])) == []

    def silent(model: str) -> dict[str, Any]:
        raise HubError("the Hub does not answer")

    monkeypatch.setattr(hub, "remote_config", silent)
    assert at_hand.check_stored(recipe) == []
