"""The same tensors through mergekit, where it is installed (pip install mergekit): equal to rounding.

What differs on purpose: mergekit computes in the format of the models, here it is fp32; slerp there is straight below
1.8 degrees, here it is on the arc at any angle; DELLA there rescales to keep the sum of magnitudes, here each number
by its own chance, as the paper does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .test_methods import made, merge

mergekit = pytest.importorskip("mergekit.merge_methods")
W, D, G = [0.5, 0.3, 0.7], [0.5, 0.3, 0.8], [0.05, 0.02, 0.1]

CASES: list[tuple[str, int, bool, dict[str, Any], dict[str, Any]]] = [
    ("linear", 3, False, {"weight": W}, {"weight": W}),
    ("linear", 3, False, {"weight": W, "normalize": False}, {"weight": W, "normalize": False}),
    ("nuslerp", 2, False, {"weight": W[:2]}, {"weight": W[:2]}),
    ("nuslerp", 2, False, {"weight": W[:2], "per": "row"}, {"weight": W[:2], "nuslerp_flatten": False}),
    ("nuslerp", 2, True, {"weight": W[:2]}, {"weight": W[:2]}),
    ("task_arithmetic", 3, True, {"weight": W, "scale": 0.7}, {"weight": W, "lambda": 0.7}),
    ("ties", 3, True, {"weight": W, "density": D}, {"weight": W, "density": D}),
    ("ties", 3, True, {"weight": W, "density": D, "normalize": False}, {"weight": W, "density": D, "normalize": False}),
    ("breadcrumbs", 3, True, {"weight": W, "density": D, "gamma": G}, {"weight": W, "density": D, "gamma": G}),
    ("breadcrumbs_ties", 3, True, {"weight": W, "density": D}, {"weight": W, "density": D, "gamma": [0.01] * 3}),
    ("model_stock", 3, True, {}, {}),
    ("model_stock", 3, True, {"per": "row"}, {"filter_wise": True}),
    ("nearswap", 1, True, {"t": 0.04}, {"t": 0.04}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "count", "based", "ours", "theirs"), CASES)
def test_equal_to_rounding(method: str, count: int, based: bool, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    base, models = made(count, shape=(40, 64))
    models = [model + 0.05 for model in models]
    got = merge(method, models, base if based else None, **ours)
    inputs, index = ([base, *models], {"base_index": 0}) if based else (models, {})
    wanted = mergekit.merge_tensors(inputs, method, parameters=theirs, **index)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_between_models_that_are_apart(t: float) -> None:
    models = made(2, shape=(40, 64))[1]
    wanted = mergekit.merge_tensors(models, "slerp", parameters={"t": t}, base_index=0)
    torch.testing.assert_close(merge("slerp", models, t=t), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_what_is_drawn_is_alike_in_the_mean(method: str) -> None:
    base, models = torch.zeros(500, 500), [0.1 * m + 0.02 for m in made(2, shape=(500, 500))[1]]
    got = merge(method, models, base, weight=[0.5, 0.7], density=0.4)
    wanted = mergekit.merge_tensors(
        [base, *models], method, parameters={"weight": [0.5, 0.7], "density": [0.4, 0.4]}, base_index=0
    )
    for figure in (torch.mean, torch.std, lambda x: (x == 0).float().mean()):
        assert float(figure(got)) == pytest.approx(float(figure(wanted)), rel=0.03)
