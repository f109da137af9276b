"""The formula of activations against what was followed through transformers, PEFT and TRL, row by row."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[1] / "bench" / "coefficients.py"
_SPEC = importlib.util.spec_from_file_location("coefficients", _PATH)
coefficients = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = coefficients
_SPEC.loader.exec_module(coefficients)

#: Share that the formula may be off on any row; rows that were further off when they were written may not grow worse.
TOLERANCE = 0.03
TABLES = sorted(coefficients.RESULTS.glob("coefficients-transformers-*.csv"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_the_formula_does_not_drift_from_what_was_followed(table):
    rows = coefficients.read(table)
    assert len(rows) > 100
    worse = []
    for row in rows:
        error = coefficients.formula(row.key) / row.allocated - 1
        if abs(error) > max(TOLERANCE, abs(row.error) + 0.01):
            worse.append(f"{' '.join(row.key)}: {error:+.1%}, was {row.error:+.1%}")
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize(
    "key",
    [
        ("Qwen/Qwen3-8B", "finetui", "lora", "none"),
        ("meta-llama/Llama-3.1-8B", "trl", "lora", "full"),
        ("google/gemma-2-9b", "trl", "full", "none"),
    ],
    ids=" ".join,
)
def test_the_table_is_what_the_installed_libraries_do(key):
    pytest.importorskip("torch")
    table = coefficients.table_of(metadata.version("transformers"))
    if not table.is_file():
        pytest.skip("this release of transformers has no table: python -m tests.bench.coefficients")
    known = {row.key: row for row in coefficients.read(table)}[key]
    now = coefficients.followed(key)
    assert (now.moment, now.allocated) == (known.moment, pytest.approx(known.allocated, rel=0.01))
