"""YAML that would eat the machine, loop, make objects or mean two things is an error with a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetui.planner.errors import RecipeError
from finetui.planner.recipe import Recipe
from finetui.planner.yaml_text import LONGEST, parse, read_text

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (LAUGHS, r"r\.yaml:\d: this stands for more than 20,000 values"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("[" * 60 + "]" * 60, "nested deeper than 40 levels"),
        ("- " * 3000 + "x", "nested"),
        ("model: a\nmodel: b", "r.yaml:2: 'model' is set twice"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: 2024-99-99", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ('a: "\\ud800"', "no file can hold"),
        ('a: "x\\0y"', "no file can hold"),
        ("? [a]\n: b\n? {c: d}\n: e", "not valid YAML"),
    ],
)
def test_refused(text: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        parse(text, "r.yaml")


def test_aliases_and_merges_that_people_write_work() -> None:
    tree, node = parse("base: &b {x: 1}\na: {<<: *b, y: 2}\nc: [*b, *b]", "r.yaml")
    assert tree == {"base": {"x": 1}, "a": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}
    assert node is not None
    assert parse("", "r.yaml") == (None, None)


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_bytes(b"a" * (LONGEST + 1))
    with pytest.raises(RecipeError, match="which no recipe is"):
        read_text(tmp_path / "weights.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    for path in (tmp_path / "latin.yaml", tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(RecipeError):
            Recipe.load(path)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/x"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    from finetui.planner.errors import ModelError
    from finetui.planner.hub import find_config

    recipe = Recipe.parse(f"model: {name}\ndata: {name}\nchat_template: {name}", base=tmp_path)
    with pytest.raises(ModelError, match="can't be a path"):
        find_config(recipe.model)
