"""Every method against its formula in float64, and against what has to hold whatever the numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetui.engine.merge.methods import METHODS, Group

SHAPE = (12, 20)


def made(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and fine-tunes of it."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw)
    return base, [base + 0.1 * torch.randn(shape, generator=draw) for _ in range(count)]


def merge(
    method: str, models: list[torch.Tensor], base: torch.Tensor | None = None, seed: int = 0, **values: Any
) -> torch.Tensor:
    """A merge; lists are for each model, the rest for all."""
    spec = METHODS[method]
    each = []
    for number in range(len(models)):
        own = {key: value[number] for key, value in values.items() if isinstance(value, list)}
        each.append({key: values.get(key, usual) for key, usual in spec.each.items()} | own)
    whole = {key: values.get(key, usual) for key, usual in spec.whole.items()}
    before = [tensor.clone() for tensor in [*models, *([base] if base is not None else [])]]
    result = spec.merge(Group(iter(models), each, whole, base, seed))
    for tensor, copy in zip([*models, *([base] if base is not None else [])], before, strict=True):
        assert torch.equal(tensor, copy), "what is merged stays as it is"
    return result


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=3e-6, atol=3e-6)


def double(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


def test_linear_is_the_weighted_mean() -> None:
    _, models = made(3)
    a, b, c = double(models)
    near(merge("linear", models, weight=[1.0, 2.0, 5.0]), (a + 2 * b + 5 * c) / 8)
    near(merge("linear", models, weight=[1.0, 2.0, 5.0], normalize=False), a + 2 * b + 5 * c)


def the_arc(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.2])
def test_slerp_is_on_the_arc(t: float) -> None:
    near(merge("slerp", (pair := made(2)[1]), t=t), the_arc(*double(pair), t))


def test_slerp_ends_at_the_models_and_keeps_lengths() -> None:
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert torch.equal(merge("slerp", [a, b], t=0.0), a)
    torch.testing.assert_close(merge("slerp", [a, b], t=1.0), b)
    assert merge("slerp", [a, b], t=0.5).norm() == pytest.approx(3.0)


@pytest.mark.parametrize("other", [2.0, -1.0, 0.0])
def test_slerp_goes_straight_where_there_is_no_arc(other: float) -> None:
    (a,) = made(1)[1]
    near(merge("slerp", [a, a * other], t=0.25), a.double() * (0.75 + 0.25 * other))


def test_slerp_sees_angles_that_an_arc_cosine_loses() -> None:
    base, _ = made(1)
    near_by = base + 1e-5 * made(1, seed=3)[0]
    # At so small an angle arc and chord are the same to fp32; an arc cosine of fp32 would be 0, or off by half.
    near(merge("slerp", [base, near_by], t=0.5), (base.double() + near_by.double()) / 2)


def test_nuslerp_is_slerp_by_weights_rows_columns_or_task_vectors() -> None:
    base, models = made(2)
    a, b = double(models)
    near(merge("nuslerp", models, weight=[1.0, 3.0]), the_arc(a, b, 0.75))
    rows = torch.stack([the_arc(x, y, 0.75) for x, y in zip(a, b, strict=True)])
    near(merge("nuslerp", models, weight=[1.0, 3.0], per="row"), rows)
    columns = torch.stack([the_arc(x, y, 0.75) for x, y in zip(a.T, b.T, strict=True)]).T
    near(merge("nuslerp", models, weight=[1.0, 3.0], per="column"), columns)
    o = base.double()
    near(merge("nuslerp", models, base, weight=[1.0, 3.0]), o + the_arc(a - o, b - o, 0.75))


def test_task_arithmetic_adds_task_vectors() -> None:
    base, models = made(2)
    o, (a, b) = base.double(), double(models)
    near(merge("task_arithmetic", models, base, weight=[0.5, 2.0], scale=0.7), o + 0.7 * (0.5 * (a - o) + 2 * (b - o)))
    near(merge("task_arithmetic", models, base, weight=[1.0, 3.0], normalize=True), o + (a - o + 3 * (b - o)) / 4)


def plain_ties(
    base: torch.Tensor, models: list[torch.Tensor], weights: list[float], density: float, normalize: bool
) -> torch.Tensor:
    """The three steps of TIES, number by number."""
    flat = [(model - base).flatten().tolist() for model in models]
    kept = []
    for delta in flat:
        largest = sorted(range(len(delta)), key=lambda i: -abs(delta[i]))[: int(density * len(delta))]
        kept.append([value if i in set(largest) else 0.0 for i, value in enumerate(delta)])
    out = []
    for place in range(len(flat[0])):
        weighted = [w * delta[place] for w, delta in zip(weights, kept, strict=True)]
        sign = math.copysign(1.0, sum(weighted)) if sum(weighted) else 0.0
        with_it = [(value, w) for value, w in zip(weighted, weights, strict=True) if value * sign > 0]
        total, share = sum(value for value, _ in with_it), sum(w for _, w in with_it)
        out.append(total / share if normalize and share else total)
    return base + torch.tensor(out, dtype=torch.float64).reshape(base.shape)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_trims_elects_and_merges(normalize: bool) -> None:
    base, models = made(3)
    weights = [0.5, 1.0, 2.0]
    got = merge("ties", models, base, weight=weights, density=0.3, normalize=normalize)
    near(got, plain_ties(base.double(), double(models), weights, 0.3, normalize))


def test_ties_of_one_whole_task_vector_is_task_arithmetic() -> None:
    base, models = made(1)
    ties = merge("ties", models, base, density=1.0, weight=0.4, normalize=False)
    assert torch.equal(ties, merge("task_arithmetic", models, base, weight=0.4))


@pytest.mark.parametrize(
    ("method", "like", "values"),
    [
        ("dare_linear", "task_arithmetic", {}),
        ("dare_ties", "ties", {"normalize": True}),
        ("della_linear", "task_arithmetic", {"epsilon": 0.0}),
        ("della", "ties", {"epsilon": 0.0, "normalize": True}),
        ("breadcrumbs", "task_arithmetic", {}),
        ("breadcrumbs_ties", "ties", {"normalize": True}),
    ],
)
def test_where_nothing_is_dropped_pruning_changes_nothing(method: str, like: str, values: dict[str, Any]) -> None:
    base, models = made(3)
    assert torch.equal(merge(method, models, base, density=1.0, **values), merge(like, models, base, density=1.0))


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_what_is_drawn_is_right_in_the_mean_and_the_same_for_a_seed(method: str) -> None:
    base, models = made(1, shape=(200, 300))
    model = base + 0.5
    first = merge(method, [model], base, density=0.4, epsilon=0.1, seed=1)
    assert torch.equal(first, merge(method, [model], base, density=0.4, epsilon=0.1, seed=1))
    assert not torch.equal(first, merge(method, [model], base, density=0.4, epsilon=0.1, seed=2))
    assert float((first - base).mean()) == pytest.approx(0.5, rel=0.03)
    assert float((first == base).float().mean()) == pytest.approx(0.6, abs=0.02)
    without = merge(method, models, base, density=0.4, epsilon=0.1)
    assert not torch.equal(without, models[0])


def test_each_model_draws_numbers_of_its_own() -> None:
    base = torch.zeros(50, 50)
    both = merge("dare_linear", [base + 1, base + 1], base, density=0.5)
    assert set(both.unique().tolist()) == {0.0, 2.0, 4.0}


def plain_stock(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    deltas = [(model - base).flatten() for model in models]
    pairs = [float(x @ y / (x.norm() * y.norm())) for x, y in itertools.combinations(deltas, 2)]
    count, cosine = len(models), sum(pairs) / len(pairs)
    t = count * cosine / (1 + (count - 1) * cosine)
    mean = torch.stack(models).mean(0)
    return t * mean + (1 - t) * base


def test_model_stock_goes_from_the_base_towards_the_mean() -> None:
    base, models = made(3)
    models = [model + 0.1 for model in models]  # a common direction
    near(merge("model_stock", models, base), plain_stock(base.double(), double(models)))
    rows = [plain_stock(base[i].double(), [m[i].double() for m in models]) for i in range(SHAPE[0])]
    near(merge("model_stock", models, base, per="row"), torch.stack(rows))


def test_model_stock_of_equal_models_is_that_model_and_of_the_base_the_base() -> None:
    base, (model,) = made(1)
    near(merge("model_stock", [model, model], base), model.double())
    assert torch.equal(merge("model_stock", [base, base.clone()], base), base)


def test_nearswap_takes_what_is_near() -> None:
    base = torch.tensor([1.0, 1.0, 1.0])
    got = merge("nearswap", [torch.tensor([1.05, 3.0, 0.0])], base, t=0.1)
    torch.testing.assert_close(got, torch.tensor([1.05, 1.1, 0.9]))


def test_passthrough_is_the_tensor() -> None:
    (model,) = made(1)[1]
    assert torch.equal(merge("passthrough", [model]), model)
    assert torch.equal(merge("passthrough", [model], weight=0.5), model * 0.5)


_WITH_ITSELF: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda x, o: merge("linear", [x, x], weight=[0.3, 0.7]),
    "slerp": lambda x, o: merge("slerp", [x, x], t=0.3),
    "nuslerp": lambda x, o: merge("nuslerp", [x, x], o),
    "task_arithmetic": lambda x, o: merge("task_arithmetic", [x, x], o, weight=0.5),
    "ties": lambda x, o: merge("ties", [x, x, x], o, density=1.0),
    "breadcrumbs_ties": lambda x, o: merge("breadcrumbs_ties", [x, x], o, density=1.0, gamma=0.0, normalize=True),
}


@pytest.mark.parametrize("method", _WITH_ITSELF)
def test_a_model_merged_with_itself_is_that_model(method: str) -> None:
    base, models = made(1)
    model = models[0].bfloat16()
    got = _WITH_ITSELF[method](model.float(), base.bfloat16().float())
    assert torch.equal(got.bfloat16(), model)
