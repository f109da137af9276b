"""What the model answers to held-out prompts."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from finetui.engine.events import Sample  # noqa: E402
from finetui.engine.samples import Prompt, answer  # noqa: E402


class Own(torch.nn.Module):
    """A model whose own ``generate`` knows what it needs and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(
        self, *, input_ids: Any, attention_mask: Any, do_sample: bool, max_new_tokens: int, max_time: float,
        use_cache: bool,
    ) -> Any:  # fmt: skip
        assert attention_mask.shape == input_ids.shape
        assert not do_sample
        assert use_cache
        assert max_time > 0
        return torch.cat([input_ids, torch.full((1, min(max_new_tokens, 2)), 7)], dim=1)


class Words:
    chat_template = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def test_a_static_cache_compiles_nothing_in_the_middle_of_a_run() -> None:
    asked: dict[str, Any] = {}

    class Static(Own):
        generation_config = SimpleNamespace(cache_implementation="static")

        def generate(self, *, disable_compile: bool, **wishes: Any) -> torch.Tensor:
            asked.update(disable_compile=disable_compile)
            return super().generate(**wishes)

    told: list[Any] = []
    answer(Static(), Words(), [Prompt([1, 2, 3], [4])], 5, told.append, contextlib.nullcontext())
    assert asked == {"disable_compile": True}
    assert len(told) == 1


def test_a_whole_model_is_asked_for_nothing_that_only_a_split_one_needs() -> None:
    model, told = Own(), list[Any]()
    model.train()
    answer(model, Words(), [Prompt([1, 2, 3], [4])], 5, told.append, contextlib.nullcontext())
    assert told == [Sample(5, "1 2 3", "7 7", "4")]
    assert model.training
    with pytest.raises(TypeError, match="synced_gpus"):  # whose ranks have to call it equally often
        answer(model, Words(), [Prompt([1, 2, 3], [4])], 5, told.append, contextlib.nullcontext(), together=True)
