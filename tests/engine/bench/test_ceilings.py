"""The ceilings of a CPU, on small shapes: what is measured is what the shapes and times say."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from finetui.engine.bench import ceilings
from finetui.engine.bench.clock import Time
from finetui.planner.hardware import cpu_node


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "PRODUCTS_CPU", ((8, 16, 32), (4, 16, 64)))
    monkeypatch.setattr(ceilings, "GIB", 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "not" / "there"))


def at_speed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(ceilings, "stopwatch", lambda f, *_, **__: (f(), Time(seconds, seconds / 2, 2 * seconds, 5))[1])


def test_rates_follow_from_sizes_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    at_speed(monkeypatch, 1e-3)
    found, figures = ceilings.measure()
    largest = 2 * 8 * 16 * 32 / 1e-3 / 1e12
    products = [figure for figure in figures if "float32" in figure.what]
    assert [figure.value for figure in products] == pytest.approx([largest, largest])
    assert (products[0].low, products[0].high) == pytest.approx((largest / 2, largest * 2))
    assert next(f.value for f in figures if f.what.startswith("copy")) == pytest.approx(2 * 2**17 / 1e9 / 1e-3)
    assert next(f.value for f in figures if f.what.startswith("disk")) == pytest.approx(2**19 / 1e9 / 1e-3)
    assert (found.gpu, found.driver, found.all_reduce_gb_s, found.fp8_tflops) == (cpu_node().gpu.name, "", 0.0, 0.0)
    assert found.copy_gb_s == pytest.approx(2 * 2**17 / 1e9 / 1e-3, abs=1e-3)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    told: list[str] = []
    ceilings.measure(told.append)
    assert len(told) == 6
    assert list(tmp_path.rglob("*")) == []


def test_a_scaled_product_is_the_product() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(16, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    try:
        found = ceilings._scaled_product(x, w)()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no fp8 products here: {error}")
    exact = x.double() @ w.double().t()
    assert float((found.double() - exact).norm() / exact.norm()) < 0.06
