"""A frozen base whose layers take turns in two buffers computes what it did, in whatever order layers are called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from finetui.engine.models.base_shards import BaseShards, LoneTable, pieces_of  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one rank: gathers are copies then."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "meeting"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Layer(nn.Module):
    """A frozen product and norm with a trained pair beside it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.up = nn.LayerNorm(6), nn.Linear(6, 6)
        self.requires_grad_(False)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(self.norm(x))) + self.b(self.a(x))


def layers(count: int) -> list[Layer]:
    return [Layer(seed) for seed in range(count)]


def passed(order: list[Layer], *, again: bool = False) -> torch.Tensor:
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    for layer in order:
        x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
    return x


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_steps_are_those_of_layers_that_are_whole(count: int, again: bool) -> None:
    plain, shared = layers(count), layers(count)
    base = BaseShards(shared, lambda layer: None, CPU)
    for _ in range(3):
        for model in (plain, shared):
            passed(model, again=again).square().sum().backward()
        with torch.no_grad():
            assert torch.equal(passed(shared), passed(plain))
        for ours, theirs in zip(shared, plain, strict=True):
            assert ours.a.weight.grad is not None
            assert torch.equal(ours.a.weight.grad, theirs.a.weight.grad)
            assert torch.equal(ours.b.weight.grad, theirs.b.weight.grad)
    # Both buffers stand from the start; the rest is this rank's part, here the only one.
    assert base.bytes == (count + 2) * 1024


def test_layers_may_be_called_in_any_order_and_more_than_once() -> None:
    plain, shared = layers(5), layers(5)
    BaseShards(shared, lambda layer: None, CPU)
    order = [4, 0, 2, 2, 1, 3, 0]
    found, expected = (passed([model[number] for number in order]) for model in (shared, plain))
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(shared, plain, strict=True):
        assert torch.allclose(ours.a.weight.grad, theirs.a.weight.grad)


def test_a_pass_begins_with_the_layers_that_the_one_before_ended_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetui.engine.models import base_shards

    shared, brought = layers(6), list[int]()
    base = BaseShards(shared, lambda layer: None, CPU)
    numbers = {part.data_ptr(): number for number, part in enumerate(base._parts)}

    def gather(whole: torch.Tensor, part: torch.Tensor) -> None:
        brought.append(numbers[part.data_ptr()])
        whole.copy_(part)

    monkeypatch.setattr(base_shards, "all_gather", gather)
    passed(shared).sum().backward()
    assert brought == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]
    brought.clear()
    passed(shared).sum().backward()
    assert brought == [2, 3, 4, 5, 3, 2, 1, 0]


def test_bytes_tied_and_lowered_weights_keep_their_places() -> None:
    layer = Layer(0)
    layer.second = nn.Linear(6, 6, bias=False).requires_grad_(False)  # type: ignore[assignment]
    layer.second.weight = layer.up.weight
    layer.bits = nn.Parameter(torch.arange(7, dtype=torch.uint8), requires_grad=False)
    pieces = pieces_of(layer, torch.bfloat16)
    assert {piece.dtype for piece in pieces} == {torch.uint8, torch.bfloat16}
    assert all(piece.start % 256 == 0 for piece in pieces)
    assert sorted(len(piece.places) for piece in pieces) == [1, 1, 1, 1, 2]
    expected = layer.up.weight.detach().bfloat16()
    others = [Layer(1), Layer(2)]
    base: Any = BaseShards([layer, *others], lambda _: None, CPU, torch.bfloat16)
    base.ready(2)
    base.ready(0)
    assert layer.second.weight is layer.up.weight
    assert torch.equal(layer.up.weight, expected)
    assert layer.bits.tolist() == list(range(7))
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}


def test_a_table_has_memory_for_its_look_up_alone() -> None:
    table = nn.Embedding(9, 5).requires_grad_(False)
    words, expected = torch.tensor([0, 8, 3]), table.weight.detach().clone()
    LoneTable(table)
    assert table.weight.untyped_storage().size() == 0
    assert torch.equal(table(words), expected[words])
    assert table.weight.untyped_storage().size() == 0
