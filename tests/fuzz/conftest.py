"""How long to look for new inputs."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--minutes``: of random inputs for all targets together, instead of the fixed ones."""
    parser.addoption("--minutes", type=float, default=0.0, help="fuzz with random inputs for so long")
