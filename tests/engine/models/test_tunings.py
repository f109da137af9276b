"""Every tuning's whole way: it trains, continues exactly after a power cut, and leaves what others can load."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from finetui.engine.chat import load_tuned  # noqa: E402
from finetui.engine.events import read_events  # noqa: E402
from finetui.engine.export import export_run  # noqa: E402
from finetui.engine.run import Run  # noqa: E402
from finetui.engine.worker import attempt  # noqa: E402
from finetui.planner.errors import RunError  # noqa: E402
from finetui.planner.options import TUNING_KEYS  # noqa: E402
from finetui.planner.tuning import Tuning  # noqa: E402

from ..yardstick import evaluate_run  # noqa: E402

MakeRun = Callable[..., Run]
PowerCut = Callable[..., AbstractContextManager[None]]

TUNINGS: dict[str, Any] = {
    "freeze": {"type": "freeze", "trained_layers": 1},
    "dora": {"type": "dora", "rank": 4},
    "rslora": "rslora",
    "lora+": {"type": "lora+", "rank": 4},
    "pissa": {"type": "pissa", "rank": 4},
    "olora": {"type": "olora", "rank": 4, "rank_stabilized": True},
    "eva": {"type": "eva", "rank": 4},
    "loftq": {"type": "loftq", "rank": 4},
    "adalora": {"type": "adalora", "rank": 4},
    "ia3": "ia3",
    "vera": {"type": "vera", "rank": 32},
    "oft": {"type": "oft", "block_size": 8},
    "qoft": {"type": "qoft", "block_size": 8},
    "loha": {"type": "loha", "rank": 4},
    "lokr": {"type": "lokr", "rank": 4},
    "prompt": {"type": "prompt", "virtual_tokens": 4},
    "prompt of words": {"type": "prompt", "virtual_tokens": 4, "init_text": "red like a rose"},
    "prefix": {"type": "prefix", "virtual_tokens": 4},
    "head beside": {"type": "lora", "rank": 4, "modules_to_save": ["lm_head", "embed_tokens"]},
    "new tokens": {"type": "lora", "rank": 4, "new_tokens": ["<rose>", "<sky>"]},
    "full with new tokens": {"type": "full", "new_tokens": ["<rose>", "<sky>"]},
}
NO_MERGE = {"prompt": "virtual tokens", "prompt of words": "virtual tokens", "prefix": "virtual", "xlora": "mixes"}
#: Rates at which a tiny model learns in six steps; else 0.01.
RATES = {
    "ia3": 0.1, "vera": 0.1, "prefix": 0.1, "adalora": 0.1, "prompt": 0.1, "prompt of words": 0.1,
    "full with new tokens": 1e-3, "freeze": 3e-3,
}  # fmt: skip


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in read_events(run.events_path) if event.type == kind]


def losses(run: Run) -> dict[int, float]:
    return {step["step"]: step["loss"] for step in events(run, "step")}


@pytest.fixture
def tuned_run(training_run: MakeRun) -> MakeRun:
    """Makes a run of a tuning as a recipe writes it."""

    def make(spec: Any, **more: Any) -> Run:
        tuning = Tuning.model_validate({"type": spec} if isinstance(spec, str) else spec)
        used = TUNING_KEYS[tuning.type]
        return training_run(
            recipe={"tuning": tuning.model_dump(exclude_unset=True)},
            tuning=tuning.type,
            rank=tuning.rank if "rank" in used else 0,
            alpha=2.0 * tuning.rank if "alpha" in used else 0.0,
            dropout=tuning.dropout,
            targets=tuning.targets,
            quantization=tuning.stored,
            tuning_options=tuning.options.to_dict(),
            **more,
        )

    return make


@pytest.fixture
def two_adapters(tuned_run: MakeRun) -> list[str]:
    """What two runs made, each with a mind of its own."""
    made = [tuned_run({"type": "lora", "rank": 4}, seed=seed, learning_rate=0.03, steps=2) for seed in (1, 2)]
    assert [attempt(run) for run in made] == [0, 0]
    return [str(run.path) for run in made]


def test_a_mixture_of_adapters_trains_and_continues_exactly(
    tuned_run: MakeRun, two_adapters: list[str], monkeypatch: pytest.MonkeyPatch, power_cut: PowerCut, tmp_path: Path
) -> None:
    spec = {"type": "xlora", "experts": two_adapters}
    trains_continues_exactly_and_loads(tuned_run, "xlora", spec, 0.1, monkeypatch, power_cut, tmp_path, by=0.0)


def test_experts_train_and_continue_exactly(
    tuned_run: MakeRun, monkeypatch: pytest.MonkeyPatch, power_cut: PowerCut, tmp_path: Path
) -> None:
    spec = {"type": "lora", "rank": 4, "targets": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    mixture = functools.partial(tuned_run, family="mixtral")
    trains_continues_exactly_and_loads(mixture, "experts", spec, 1e-2, monkeypatch, power_cut, tmp_path, by=0.02)


@pytest.mark.parametrize("name", TUNINGS)
def test_trains_continues_exactly_and_loads(
    tuned_run: MakeRun, name: str, monkeypatch: pytest.MonkeyPatch, power_cut: PowerCut, tmp_path: Path
) -> None:
    trains_continues_exactly_and_loads(
        tuned_run, name, TUNINGS[name], RATES.get(name, 1e-2), monkeypatch, power_cut, tmp_path, by=0.02
    )


def trains_continues_exactly_and_loads(
    tuned_run: MakeRun,
    name: str,
    spec: Any,
    rate: float,
    monkeypatch: pytest.MonkeyPatch,
    power_cut: PowerCut,
    tmp_path: Path,
    by: float,
) -> None:
    warnings.simplefilter("ignore")
    whole, cut = (tuned_run(spec, learning_rate=rate, steps=4) for _ in range(2))
    assert attempt(whole) == 0, events(whole, "failure")
    with monkeypatch.context() as patched:
        patched.setattr("finetui.engine.samples.held_out_prompts", lambda _: [])  # which takes half of the time
        with power_cut():
            assert attempt(cut) == 1
        assert attempt(cut) == 0, events(cut, "failure")
    assert losses(cut) == losses(whole)
    if "new tokens" not in name:  # which the rows do not have
        assert not events(whole, "warning")

    held_out = [told["loss"] for told in events(whole, "eval")]
    assert held_out[-1] < held_out[0] - by
    assert math.isclose(evaluate_run(whole).loss, held_out[-1], rel_tol=2e-5)
    if name in NO_MERGE:
        with pytest.raises(RunError, match=NO_MERGE[name]):
            export_run(whole, "merged", tmp_path / "merged")
    elif whole.plan.resolved.quantization == "none":
        _merged_says_the_same(whole, tmp_path / "merged")


def test_what_flows_through_a_base_in_16_bits_is_looked_at_in_16_bits(tuned_run: MakeRun) -> None:
    run = tuned_run({"type": "eva", "rank": 4}, precision="bf16", steps=1)
    assert attempt(run) == 0, events(run, "failure")


def test_a_step_that_is_left_out_says_nothing_of_importance(
    tuned_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetui.engine.trainers.sft import TokenMeanTrainer

    step = TokenMeanTrainer.training_step

    def broken(self: Any, *args: Any, **rest: Any) -> Any:
        loss = step(self, *args, **rest)
        if self.state.global_step == 1:
            self.trained_parameters()[0][1].grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(TokenMeanTrainer, "training_step", broken)
    run = tuned_run({"type": "adalora", "rank": 4}, steps=4)
    assert attempt(run) == 0, events(run, "failure")
    assert len(losses(run)) == 4


def _merged_says_the_same(run: Run, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_run(run, "merged", folder)
    words = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=words).logits.float()
        tuned = load_tuned(run).model(input_ids=words).logits.float()
    torch.testing.assert_close(alone, tuned, rtol=1e-3, atol=1e-3)
