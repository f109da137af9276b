"""Checkpoints of what is on a GPU: copies are exact, and their pinned memory is used again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from finetui.engine.run import Run  # noqa: E402
from finetui.engine.trainers import saving  # noqa: E402
from finetui.engine.trainers.state import HostMemory, Part, Snapshot  # noqa: E402
from finetui.engine.worker import attempt  # noqa: E402

from .conftest import events  # noqa: E402
from .test_saving import hashes  # noqa: E402

pytestmark = pytest.mark.cuda


def test_copies_are_exact_and_their_memory_is_used_again(tmp_path: Path) -> None:
    weights, host = torch.randn(1000, 1000, device="cuda"), HostMemory()
    expected = weights.cpu()
    snapshot = Snapshot({}, {"b": Part({"t": weights, "turned": weights.T})})
    copy = snapshot.copied(host)
    weights.zero_()
    copy.write(tmp_path)
    found = load_file(tmp_path / "b")
    assert torch.equal(found["t"], expected)
    assert torch.equal(found["turned"], expected.T)
    assert host.bytes == 2 * expected.numel() * 4
    place = copy.parts["b"].tensors["t"].data_ptr()
    assert copy.parts["b"].tensors["t"].is_pinned()
    assert snapshot.copied(host).parts["b"].tensors["t"].data_ptr() == place
    Snapshot({}, {}).copied(host)
    assert host.bytes == 0


def test_a_slow_disk_changes_no_bit_on_a_gpu(training_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: dict[str, Any] = {"checkpoint": {"every": 3, "keep": 5}}
    waiting, behind = (training_run(device="cuda", kernels="off", recipe=recipe) for _ in range(2))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(saving, "_SHARE", 0.0)
            assert attempt(waiting) == 0
        write = Snapshot.write
        monkeypatch.setattr(Snapshot, "write", lambda self, folder: (time.sleep(0.5), write(self, folder))[1])
        assert attempt(behind) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert hashes(behind) == hashes(waiting)
    saved = events(behind, "checkpoint")
    assert all(told["waited_s"] < told["seconds"] - 0.4 for told in saved[:1])
