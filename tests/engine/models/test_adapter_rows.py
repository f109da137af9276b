"""Adapters that are whole on each rank and stepped by rows."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from finetui.engine.models import adapter_rows  # noqa: E402
from finetui.engine.models.adapter_rows import AdapterRows, rows_of  # noqa: E402

WORLD, SHAPES = 3, {"a": (2, 5), "b": (7, 3), "scale": (4,)}


def named() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[AdapterRows, dict[str, nn.Parameter]]]:
    """All ranks in one process, whose collectives are made when the last one asks."""
    made = []
    monkeypatch.setattr(adapter_rows.dist, "get_world_size", lambda: WORLD)
    for rank in range(WORLD):
        monkeypatch.setattr(adapter_rows.dist, "get_rank", lambda rank=rank: rank)
        parameters = named()
        made.append((AdapterRows(parameters), parameters))
    return made


def test_rows_are_the_tensors_cut_and_whole_ones_stay_what_they_were(ranks: Any) -> None:
    for name, parameter in named().items():
        mine = [rows.rows[name] for rows, _ in ranks]
        assert torch.equal(torch.cat(mine), parameter)
        cuts = [rows_of(parameter.shape[0], rank, WORLD) for rank in range(WORLD)]
        assert [len(t) for t in mine] == [cut.stop - cut.start for cut in cuts]
        assert all(torch.equal(whole[name], parameter) for _, whole in ranks)
        assert all(t.is_contiguous() for t in mine)


def test_what_rows_became_is_what_computes_next(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [rows._mine for rows, _ in ranks]
    monkeypatch.setattr(adapter_rows, "all_gather", lambda whole, part: whole.copy_(torch.cat(sent)))
    expected = {name: parameter.detach() * 2 for name, parameter in named().items()}
    for rows, _ in ranks:
        for tensor in rows.rows.values():
            tensor.mul_(2)
    for rows, whole in ranks:
        rows.refresh()
        assert torch.equal(whole["b"], named()["b"]), "nothing was let go of"
        rows.let_go()
        rows.refresh()
        assert all(torch.equal(whole[name], expected[name]) for name in whole)


def test_gradients_of_all_micro_batches_are_averaged_once(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def reduce_scatter(got: Any, whole: Any) -> None:
        sent.append(whole.view(WORLD, -1).clone())
        got.zero_()

    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        monkeypatch.setattr(adapter_rows.dist, name, reduce_scatter, raising=False)
    for rank, (rows, whole) in enumerate(ranks):
        assert rows.take_gradients() == {}, "none is on its way"
        rows.begin_micro_batch()
        for _ in range(2):
            ((rank + 1) * (whole["a"].sum() + (whole["b"] * torch.arange(3.0)).sum())).backward()
        taken = rows.take_gradients()
        assert all(p.grad is None for p in whole.values())
        assert {name: t.shape for name, t in taken.items()} == {name: t.shape for name, t in rows.rows.items()}
        assert rows.take_gradients() == {}
    total = torch.stack(sent).sum(0)
    b = torch.arange(3.0).repeat(7, 1) * 12
    for rank, (rows, _) in enumerate(ranks):
        cut = rows_of(7, rank, WORLD)
        start, shape = rows._shapes["b"]
        assert torch.equal(total[rank, start : start + b[cut].numel()].view(shape), b[cut])
        scale, length = rows._shapes["scale"]
        assert not total[rank, scale : scale + length[0]].any(), "what nobody used has no gradient"


def test_gradients_of_few_bits_add_up_in_as_many_as_one_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added to 256 in bf16, ones are rounded away."""
    monkeypatch.setattr(adapter_rows.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(adapter_rows.dist, "get_rank", lambda: 0)
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        monkeypatch.setattr(adapter_rows.dist, name, lambda got, whole: got.copy_(whole), raising=False)
    whole = named()
    rows = AdapterRows(whole, torch.bfloat16)
    for _ in range(2):
        for factor in (256.0, 1.0, 1.0):
            rows.begin_micro_batch()
            (factor * whole["a"].sum()).backward()
            assert whole["a"].grad is not None
            assert whole["a"].grad.dtype == torch.bfloat16
        taken = rows.take_gradients()
        assert taken["a"].dtype == torch.float32
        assert (taken["a"] == 258).all()
        assert not taken["b"].any()
