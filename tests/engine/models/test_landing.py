"""What lands in host memory is what left the device, whatever its size."""

from __future__ import annotations

import contextlib

import pytest

torch = pytest.importorskip("torch")

from finetui.engine.models import landing as module  # noqa: E402
from finetui.engine.models.landing import Landing  # noqa: E402


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_every_byte_arrives_in_order_and_by_the_time_it_is_closed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(module, "PIECE", 1000)  # no multiple of an element, nor of a tensor
    sources = [
        torch.arange(12_345, dtype=torch.int32, device=device),
        torch.tensor([float("nan"), -0.0, 1.5], dtype=torch.bfloat16, device=device),
        torch.zeros(0, device=device),
        torch.arange(255, dtype=torch.uint8, device=device).repeat(41),
    ]
    expected = [source.cpu().clone() for source in sources]
    targets = [torch.empty(source.shape, dtype=source.dtype) for source in sources]
    with contextlib.closing(Landing(torch.device(device))) as landing:
        for source, target in zip(sources, targets, strict=True):
            landing.put(source, target)
            source.zero_()  # as training goes on: behind the copy, on the same stream
    for there, target in zip(expected, targets, strict=True):
        assert torch.equal(there.view(torch.uint8), target.view(torch.uint8))
