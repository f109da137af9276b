"""The shipped data: what the script makes, well-formed, and with held-out questions that were never trained on."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.data.preview import survey
from finetui.planner.recipe import Recipe

PRESETS = Path(__file__).parents[2] / "presets"
MAKE = Path(__file__).parent / "make_tiny.py"


def pairs(split: str) -> list[tuple[str, str]]:
    lines = (PRESETS / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(message["content"] for message in json.loads(line)["messages"]) for line in lines]


def test_the_script_makes_what_is_shipped() -> None:
    made: dict[str, list[dict[str, Any]]] = runpy.run_path(str(MAKE))["questions"]()
    for split, rows in made.items():
        assert [tuple(m["content"] for m in row["messages"]) for row in rows] == pairs(split)


def test_held_out_questions_are_new_and_their_answers_are_not() -> None:
    train, held = dict(pairs("train")), dict(pairs("eval"))
    assert not train.keys() & held.keys()
    assert set(held.values()) == set(train.values())
    assert len(train) == len(pairs("train")), "no question is asked twice"


def test_questions_and_answers_are_sentences() -> None:
    for question, answer in [*pairs("train"), *pairs("eval")]:
        assert question[-1] in "?.", question
        assert answer[-1] == ".", answer
        assert len(answer) < 130, answer
        assert "{" not in question + answer
        assert "  " not in question + answer


def test_quickstart_is_a_recipe_that_fits_its_data() -> None:
    recipe = Recipe.load(PRESETS / "quickstart.yaml")
    assert Path(recipe.model) == PRESETS / "tiny"
    found = survey(recipe)
    assert found.train_rows is not None
    assert 1000 <= found.train_rows <= 2000
    assert found.max_tokens is not None
    assert isinstance(recipe.sequence_length, int)
    assert found.max_tokens < recipe.sequence_length


def test_shipped_files_are_small() -> None:
    folders = ("tiny", "data")
    assert sum(path.stat().st_size for folder in folders for path in (PRESETS / folder).iterdir()) < 600_000


@pytest.mark.slow
def test_the_tokenizer_is_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    script = runpy.run_path(str(MAKE))
    (tmp_path / "tiny").mkdir()
    monkeypatch.setitem(script["make_tokenizer"].__globals__, "PRESETS", tmp_path)
    script["make_tokenizer"](script["questions"]())
    for path in (tmp_path / "tiny").iterdir():
        assert path.read_text(encoding="utf-8") == (PRESETS / "tiny" / path.name).read_text(encoding="utf-8")
