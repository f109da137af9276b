"""An export whose template or end token is not that of training fails, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from finetui.engine.data.template import stop_token_ids
from finetui.engine.export import export
from finetui.engine.export.talk import by_transformers, check_folder, ends_answers, same_prompts, trained
from finetui.engine.run import Run
from finetui.engine.worker import attempt
from finetui.planner.errors import RunError

MakeRun = Callable[..., Run]


def test_training_and_export_write_the_same_tokens(byte_level: Any) -> None:
    tokenizer = byte_level()
    before = trained(tokenizer, "sft")
    assert before is not None
    assert len(before.prompts) == 3
    assert before.end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "3 conversations" in same_prompts(before, by_transformers(tokenizer))
    assert "<|im_end|>" in ends_answers(before, stop_token_ids(tokenizer), tokenizer)


@pytest.mark.parametrize(("old", "new"), [("<|im_end|>' + '\\n", "<|im_end|>"), ("'<|im_start|>assistant\\n'", "''")])
def test_another_template_fails(old: str, new: str, byte_level: Any) -> None:
    tokenizer, other = byte_level(), byte_level()
    other.chat_template = other.chat_template.replace(old, new)
    before = trained(tokenizer, "sft")
    assert before is not None
    if other.chat_template == tokenizer.chat_template:
        pytest.fail("nothing was changed")
    with pytest.raises(RunError, match="other tokens than training saw"):
        same_prompts(before, by_transformers(other))


def test_models_of_text_have_an_end_and_no_prompts(byte_level: Any) -> None:
    tokenizer = byte_level()
    before = trained(tokenizer, "pretrain")
    assert before is not None
    assert (before.prompts, before.end) == ((), tokenizer.eos_token_id)
    assert trained(tokenizer, "reward") is None
    with pytest.raises(RunError, match="does not stop"):
        ends_answers(before, [5], tokenizer)


def test_a_folder_is_held_against_its_run(training_run: MakeRun, tmp_path: Path) -> None:
    run = training_run(tuning="full", steps=1)
    assert attempt(run) == 0
    made = export(run, "merged", tmp_path / "m")
    assert [line.partition(":")[0] for line in made.checked] == ["chat template", "end of answers"]
    told = made.path / "generation_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"eos_token_id": 2}))
    with pytest.raises(RunError, match=r"trained to end with <\|im_end\|>"):
        check_folder(run, run.output_path, made.path)
    template = made.path / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_begin|>"))
    with pytest.raises(RunError, match="from token 0 on"):
        check_folder(run, run.output_path, made.path)
