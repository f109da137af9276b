"""What the tests of kernels share. Without a GPU they run in Triton's interpreter (``tests/conftest.py``)."""

from __future__ import annotations

from pathlib import Path

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
