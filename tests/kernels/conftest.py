"""What the tests of kernels share. Without a GPU they run in Triton's interpreter (``tests/conftest.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts of a test stay with the test."""
    from finetui.kernels import selfcheck

    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))
    selfcheck.forget()


@pytest.fixture
def quick_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """For whole layers: the rotary kernel has tests of its own, and takes most of the interpreter's time."""
    from finetui.kernels import rope
    from finetui.kernels.launch import INTERPRETED

    def rotate(q: Any, k: Any, cos: Any, sin: Any, layout: Any, *, backward: bool = False, out: Any = None) -> Any:
        made = rope.rope_reference(q, k, cos, -sin if backward else sin, layout)
        return made if out is None else tuple(place.copy_(one) for place, one in zip(out, made, strict=True))

    if INTERPRETED:
        monkeypatch.setattr(rope, "rotate", rotate)
