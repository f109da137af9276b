"""Optimisers and schedules: each does what its paper says, trains, continues exactly, and stores what is planned."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from finetui.engine.events import read_events  # noqa: E402
from finetui.engine.run import Run  # noqa: E402
from finetui.engine.trainers.adopt import Adopt, Came  # noqa: E402
from finetui.engine.trainers.optimizers import Lion, LowRankAdamW, ScheduleFree, averaged, inner_matrices  # noqa: E402
from finetui.engine.worker import attempt  # noqa: E402
from finetui.planner.architecture import Architecture  # noqa: E402
from finetui.planner.options import OptimizerOptions  # noqa: E402
from finetui.planner.storage import low_rank_bytes, optimizer_bytes  # noqa: E402

MakeRun = Callable[..., Run]
PowerCut = Callable[..., AbstractContextManager[None]]
#: Optimiser, what is tuned, and a rate at which a tiny model learns in six steps.
RUNS = {
    "sgd": ("full", 0.5, {"momentum": 0.5}),
    "lion": ("lora", 3e-3, {}),
    "muon": ("full", 1e-2, {}),
    "muon on adapters": ("lora", 5e-2, {}),
    "galore": ("full", 2e-2, {"projection_rank": 8, "projection_every": 2}),
    "apollo": ("full", 1e-2, {"projection_rank": 8, "projection_every": 2}),
    "apollo-mini": ("full", 1e-3, {}),
    "schedule-free": ("lora", 1e-2, {}),
    "adafactor": ("full", 1e-3, {}),
    "adopt": ("lora", 1e-2, {}),
    "came": ("full", 1e-3, {}),
}


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in read_events(run.events_path) if event.type == kind]


def losses(run: Run) -> dict[int, float]:
    return {step["step"]: step["loss"] for step in events(run, "step")}


@pytest.mark.parametrize("name", RUNS)
def test_trains_and_continues_exactly(training_run: MakeRun, name: str, power_cut: PowerCut) -> None:
    tuning, rate, options = RUNS[name]
    knobs = {"tuning": tuning, "optimizer": name.split()[0], "learning_rate": rate, "optimizer_options": options}
    whole, cut = training_run(**knobs), training_run(**knobs)
    assert attempt(whole) == 0, events(whole, "failure")
    with power_cut():
        assert attempt(cut) == 1
    assert attempt(cut) == 0, events(cut, "failure")
    assert losses(cut) == losses(whole)
    held_out = [told["loss"] for told in events(whole, "eval")]
    assert held_out[-1] < held_out[0] - 0.05


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("cosine", {"min_rate": 0.5}, lambda done: 0.5 + 0.25 * (1 + math.cos(math.pi * done))),
        ("linear", {"min_rate": 0.5}, lambda done: 1 - 0.5 * done),
        ("cosine-restarts", {"cycles": 2}, lambda done: 0.5 * (1 + math.cos(math.pi * ((2 * done) % 1)))),
        ("inverse-sqrt", {}, None),
        ("wsd", {"decay_ratio": 0.5}, lambda done: min(1.0, 1 - math.sqrt(max(0.0, 2 * done - 1)))),
        ("constant", {}, lambda done: 1.0),
    ],
)
def test_the_rate_moves_as_the_schedule_says(
    training_run: MakeRun, schedule: str, options: dict[str, Any], expected: Callable[[float], float] | None
) -> None:
    run = training_run(schedule=schedule, optimizer_options=options, learning_rate=1e-3, warmup_steps=0, steps=4)
    assert attempt(run) == 0
    rates = [step["learning_rate"] for step in events(run, "step")]
    if expected is None:
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < rates[0] <= 1e-3
    else:
        assert rates == pytest.approx([1e-3 * expected(step / 4) for step in range(4)], rel=1e-4)


def test_lora_plus_gives_b_its_own_rate(training_run: MakeRun) -> None:
    from finetui.engine.trainers.optimizers import with_faster_b

    pair = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2), "lora_B": torch.nn.Linear(2, 2)})
    one = {"params": list(pair.parameters()), "weight_decay": 0.1}
    groups = with_faster_b(pair.named_parameters(), [one], 1e-3, 16.0)
    assert [g.get("lr") for g in groups] == [None, 1.6e-2]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in pair["lora_B"].parameters()}


def test_noise_on_embeddings_changes_training_and_not_evaluation(training_run: MakeRun) -> None:
    plain, noisy = training_run(), training_run(neftune_alpha=5.0)
    assert attempt(plain) == attempt(noisy) == 0
    assert losses(plain) != losses(noisy)
    assert events(plain, "eval")[0]["loss"] == events(noisy, "eval")[0]["loss"]


def test_lion_takes_steps_of_one_size() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    lion = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    p.grad = torch.tensor([4.0, -1e-6, 0.0])
    lion.step()
    assert p.tolist() == pytest.approx([0.95 - 0.1, -1.9 + 0.1, 2.85])
    p.grad = torch.tensor([-0.02, 0.0, 0.0])  # a tenth of this is less than nine tenths of the mean, 0.04
    lion.step()
    assert p.tolist()[0] == pytest.approx(0.85 * 0.95 - 0.1)


def test_schedule_free_follows_the_paper() -> None:
    """Algorithm 1 of arXiv:2405.15682 in float64, with a constant rate: all weights are equal, c = 1 / t."""
    gradients = [[0.5, -1.0], [0.25, 2.0], [-1.0, 0.5], [0.125, -0.25]]
    rate, (b1, b2), eps = 0.1, (0.9, 0.95), 1e-8
    p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    ours = ScheduleFree([p], lr=rate, betas=(b1, b2), eps=eps)
    z, x = [1.0, -1.0], [1.0, -1.0]
    square = [0.0, 0.0]
    for t, gradient in enumerate(gradients, 1):
        y = [(1 - b1) * zi + b1 * xi for zi, xi in zip(z, x, strict=True)]
        assert p.tolist() == pytest.approx(y, rel=1e-5)
        p.grad = torch.tensor(gradient)
        ours.step()
        square = [b2 * s + (1 - b2) * g * g for s, g in zip(square, gradient, strict=True)]
        root = [math.sqrt(s / (1 - b2**t)) + eps for s in square]
        z = [zi - rate * g / r for zi, g, r in zip(z, gradient, root, strict=True)]
        x = [(1 - 1 / t) * xi + zi / t for xi, zi in zip(x, z, strict=True)]
    with averaged(SimpleNamespace(optimizer=ours)):
        assert p.tolist() == pytest.approx(x, rel=1e-5)
    assert ours.training


def test_adopt_follows_the_paper() -> None:
    """Algorithm 2 of arXiv:2411.02853 in float64: the first gradient moves nothing, and bounds grow with the step."""
    gradients = [[0.5, -1.0], [0.25, 2.0], [-3.0, 0.0], [0.125, -0.25]]
    rate, (b1, b2), decay = 0.1, (0.9, 0.99), 0.5
    p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    ours = Adopt([p], lr=rate, betas=(b1, b2), weight_decay=decay)
    expected, mean, square = [1.0, -1.0], [0.0, 0.0], [0.25, 1.0]
    for t, gradient in enumerate(gradients):
        p.grad = torch.tensor(gradient)
        ours.step()
        if t:
            bound = t**0.25
            updates = [max(-bound, min(bound, g / math.sqrt(v))) for g, v in zip(gradient, square, strict=True)]
            mean = [b1 * m + (1 - b1) * u for m, u in zip(mean, updates, strict=True)]
            expected = [x * (1 - rate * decay) - rate * m for x, m in zip(expected, mean, strict=True)]
            square = [b2 * v + (1 - b2) * g * g for v, g in zip(square, gradient, strict=True)]
        assert p.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(3,), (4, 5), (2, 4, 5)])
def test_came_follows_the_paper(shape: tuple[int, ...]) -> None:
    """Algorithm 2 of arXiv:2307.02047 in float64, matrix by matrix; a vector keeps its whole second moment."""
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(4)]
    rate, (b1, b2), b3, decay = 0.1, (0.9, 0.99), 0.9999, 0.5
    p = torch.nn.Parameter(torch.ones(shape))
    ours = Came([p], lr=rate, betas=(b1, b2), weight_decay=decay)
    expected = torch.ones(shape, dtype=torch.float64)
    mean, whole = torch.zeros_like(expected), torch.zeros_like(expected)
    sums = {name: torch.zeros_like(expected) for name in ("square", "residual")}

    def stands_for(running: Any) -> Any:  # rows times columns over their common mean, of a running mean over all of it
        rows, columns = running.mean(-1, keepdim=True), running.mean(-2, keepdim=True)
        return rows * columns / rows.mean(-2, keepdim=True)

    for gradient in gradients:
        p.grad = gradient.float()
        ours.step()
        if len(shape) == 1:
            whole = b2 * whole + (1 - b2) * gradient**2
            update = gradient / whole.sqrt()
        else:
            sums["square"] = b2 * sums["square"] + (1 - b2) * gradient**2
            update = gradient / stands_for(sums["square"]).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        mean = b1 * mean + (1 - b1) * update
        expected = expected * (1 - rate * decay)
        if len(shape) == 1:
            expected = expected - rate * mean
        else:
            sums["residual"] = b3 * sums["residual"] + (1 - b3) * (update - mean) ** 2
            expected = expected - rate * mean / stands_for(sums["residual"]).sqrt()
        assert torch.allclose(p.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("adopt", Adopt), ("came", Came)])
def test_states_are_as_large_as_the_planner_says(name: str, kind: Any) -> None:
    p = torch.nn.Parameter(torch.randn(512, 1024, dtype=torch.bfloat16))
    optimizer = kind([p], lr=1e-3, betas=(0.9, 0.999))
    p.grad = torch.randn_like(p)
    optimizer.step()

    def size(tree: Any) -> int:
        return sum(map(size, tree.values())) if isinstance(tree, dict) else getattr(tree, "nbytes", 0)

    assert size(dict(optimizer.state[p])) / p.numel() == pytest.approx(optimizer_bytes(name, 2)[0], rel=0.01)


@pytest.mark.parametrize("name", ["galore", "apollo", "apollo-mini"])
def test_low_rank_states_are_as_large_as_the_planner_says(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 12,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
    rank = 1 if name == "apollo-mini" else 4
    optimizer = LowRankAdamW(
        [{"params": list(model.parameters())}], lr=1e-3, matrices=inner_matrices(model), method=name, rank=rank,
        every=10, scale=1.0, betas=(0.9, 0.999), eps=1e-8, seed=0,
    )  # fmt: skip
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    held = sum(
        t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values()
        if torch.is_tensor(t) and t.dim() > 0
    )  # fmt: skip
    architecture = Architecture.from_config({"model_type": "llama", **shape})
    counted = low_rank_bytes(architecture, name, OptimizerOptions(projection_rank=4))
    assert held == round(counted * architecture.parameters)


def test_apollo_learns_how_large_from_adam_and_where_from_the_gradient() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 6))
    apollo = LowRankAdamW(
        [{"params": [p]}], lr=1.0, matrices={id(p)}, method="apollo", rank=4, every=5, scale=1.0, betas=(0.9, 0.999),
        eps=1e-8, seed=0,
    )  # fmt: skip
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    apollo.step()
    cosine = torch.nn.functional.cosine_similarity(p.detach(), -p.grad, dim=0)
    assert torch.allclose(cosine, torch.ones(6), atol=1e-5)
