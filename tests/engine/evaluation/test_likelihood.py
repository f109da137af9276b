"""Loss row by row: equal to the definition in float64, for heads of every kind, whole or in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from finetui.engine.evaluation import likelihood
from finetui.engine.evaluation.batches import Batches
from finetui.engine.evaluation.likelihood import Head, Learned, row_losses
from finetui.engine.evaluation.voices import Voice
from finetui.engine.models.load import Numerics

ROWS = [
    Learned([1, 9, 30, 31, 32], [-100, -100, 30, 31, 32]),
    Learned([1, 7], [1, 7]),
    Learned(list(range(5, 60)), [-100] * 40 + list(range(45, 60))),
    Learned([4, 5, 6], [-100, -100, -100]),
]


@pytest.fixture
def voice(model_folder: Callable[[str], Path]) -> Callable[..., Voice]:
    def make(family: str, change: Callable[[Any], Any] = lambda model: model) -> Voice:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = change(AutoModelForCausalLM.from_pretrained(model_folder(family)).eval())
        tokenizer = AutoTokenizer.from_pretrained(model_folder(family))
        return Voice(family, False, model, tokenizer, torch.device("cpu"), Numerics(torch.float32, None))

    return make


def measured(voice: Voice, size: int = 4) -> list[tuple[float, int, int]]:
    made = row_losses(voice, ROWS, Batches(size, pytest.fail), "", lambda *_: None)
    return [(one.loss, one.tokens, one.right) for one in made]


def defined(model: Any) -> list[tuple[float, int, int]]:
    found = []
    for row in ROWS:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        pairs = [(t, y) for t, y in enumerate(row.labels) if t and y != -100]
        loss = sum(float(-logits[t - 1].log_softmax(0)[y]) for t, y in pairs)
        found.append((loss, len(pairs), sum(int(logits[t - 1].argmax()) == y for t, y in pairs)))
    return found


def _lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def _prompt(model: Any) -> Any:
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()


def _biased(model: Any) -> Any:
    class Shifted(torch.nn.Module):
        def __init__(self, head: Any) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Any) -> Any:
            return self.head(hidden) + torch.arange(320) / 100

    model.lm_head = Shifted(model.lm_head)
    return model


@pytest.mark.parametrize("change", [lambda model: model, _lora, _biased], ids=["plain", "lora on the head", "any head"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_every_row_is_the_definition(
    voice: Callable[..., Voice], monkeypatch: pytest.MonkeyPatch, family: str, change: Callable[[Any], Any]
) -> None:
    asked = voice(family, change)
    expected = defined(asked.model)
    assert Head.of(asked) is not None
    for size in (1, 4):
        for row, truth in zip(measured(asked, size), expected, strict=True):
            assert row == (pytest.approx(truth[0], rel=2e-6), *truth[1:])
    monkeypatch.setattr(likelihood, "_POSITIONS", 2)  # so that a batch takes several turns through the head
    assert [row[0] for row in measured(asked)] == pytest.approx([row[0] for row in expected], rel=2e-6)


def test_a_model_that_is_more_than_its_layers_is_called_as_a_whole(voice: Callable[..., Voice]) -> None:
    asked = voice("llama", _prompt)
    assert Head.of(asked) is None
    plain = defined(voice("llama").model)
    with torch.no_grad():
        virtual = asked.model(input_ids=torch.tensor([ROWS[0].input_ids])).logits[0, 3:].double()
    truth = sum(float(-virtual[t - 1].log_softmax(0)[ROWS[0].labels[t]]) for t in (2, 3, 4))
    found = measured(asked)
    assert found[0][0] == pytest.approx(truth, rel=2e-6)
    assert found[0][0] != pytest.approx(plain[0][0], rel=1e-3)
    assert found[3] == (0.0, 0, 0)


def test_a_head_that_does_more_than_it_says_is_found_out(voice: Callable[..., Voice]) -> None:
    asked = voice("llama")
    stock = asked.model.forward
    asked.model.forward = lambda *a, **k: _doubled(stock(*a, **k))
    assert Head.of(asked) is None
    assert measured(asked)[0][0] == pytest.approx(defined(asked.model)[0][0], rel=2e-6)


def _doubled(out: Any) -> Any:
    out.logits = out.logits * 2
    return out
