"""Kernels run in Triton's interpreter where there is no GPU; it must be chosen before Triton is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts of a test stay with the test."""
    from finetui.kernels import selfcheck

    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))
    selfcheck.forget()
