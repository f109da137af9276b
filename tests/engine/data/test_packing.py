"""Packing: nothing lost, nothing leaked, the same losses as without it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetui.engine.data.labels import IGNORED
from finetui.engine.data.packing import Collator, join, pack


@given(st.lists(st.integers(1, 32), max_size=80), st.integers(32, 64))
def test_every_document_once_and_no_row_too_long(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_it_is_first_fit_decreasing(lengths: list[int]) -> None:
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r in rows if sum(lengths[i] for i in r) + lengths[index] <= 20), None)
        if row is None:
            rows.append(row := [])
        row.append(index)
    assert pack(lengths, 20) == rows


@pytest.mark.parametrize("length", [0, 9])
def test_a_document_that_fits_no_row(length: int) -> None:
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens"):
        pack([3, length], 8)


def test_joined_documents_do_not_predict_each_other() -> None:
    row = join([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}])
    assert row == {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, IGNORED, 8], "seq_lengths": [2, 2]}


def test_padded_batch() -> None:
    batch = Collator(9, multiple_of=4)([{"input_ids": [1, 9], "labels": [1, 9]}, {"input_ids": [1], "labels": [-100]}])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 9, 9, 9], [1, 9, 9, 9]],
        "labels": [[1, 9, -100, -100], [-100, -100, -100, -100]],
        "attention_mask": [[1, 1, 0, 0], [1, 0, 0, 0]],
    }


def test_packed_batch() -> None:
    rows = [join([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])]
    rows.append(join([{"input_ids": [5, 6], "labels": [5, 6]}]))
    batch = Collator(0)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert set(batch) == {"input_ids", "labels", "position_ids"}


def documents() -> list[dict[str, list[int]]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (9, 7, 5, 4, 3, 2):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED if i % 3 == 0 else token for i, token in enumerate(ids)]})
    return made


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    config._attn_implementation = request.param
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("capacity", [30, 16])  # one row, and a batch of two
def test_packed_equals_unpacked(model: Any, capacity: int) -> None:
    import torch

    made = documents()
    rows = pack([len(document["input_ids"]) for document in made], capacity)
    assert len(rows) == (1 if capacity == 30 else 2)
    batch = Collator(0)([join([made[i] for i in row]) for row in rows])
    labels = batch.pop("labels")
    packed = model(**batch, use_cache=False).logits
    losses: dict[str, Any] = {"packed": _losses(packed, labels)}
    alone = []
    for row, logits in zip(rows, packed, strict=True):
        start = 0
        for index in row:
            ids = torch.tensor([made[index]["input_ids"]])
            expected = model(input_ids=ids).logits
            torch.testing.assert_close(
                logits[start : start + ids.shape[1]], expected[0], rtol=0, atol=_tolerance(model)
            )
            alone.append(_losses(expected, torch.tensor([made[index]["labels"]])))
            start += ids.shape[1]
    losses["alone"] = torch.cat(alone)
    torch.testing.assert_close(
        losses["packed"].sort().values, losses["alone"].sort().values, rtol=0, atol=_tolerance(model)
    )
    # Without the restarted positions the documents would see each other, so the test above can fail.
    leaky = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert (leaky - packed).abs().max() > 1e-3


def _tolerance(model: Any) -> float:
    """Eager attention takes its softmax in float32, whatever the model's dtype."""
    return 1e-5 if model.config._attn_implementation == "eager" else 1e-12


def _losses(logits: Any, labels: Any) -> Any:
    import torch

    flat = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return flat[labels[:, 1:] != IGNORED]


def test_gradients_of_packed_and_padded_batches_are_equal(model: Any) -> None:
    import torch

    made = documents()
    gradients = []
    for batch in (Collator(0)(made), Collator(0)([join(made)])):
        model.zero_grad()
        labels = batch.pop("labels")
        _losses(model(**batch, use_cache=False).logits, labels).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=100 * _tolerance(model))
