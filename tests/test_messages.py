"""What a user reads when something is wrong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import finetui
from finetui.planner import errors
from finetui.planner.errors import ModelError, RecipeError, UserError
from finetui.planner.hub import read_config
from finetui.planner.recipe import Recipe

ROOT = Path(finetui.__file__).parent
#: Their ``do`` is made from what they are given.
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, UserError)} - {
    "MissingExtraError"
}


def raised(tree: ast.AST) -> list[ast.Call]:
    return [
        node.exc
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    ]


def test_every_mistake_of_a_user_is_told_with_what_to_do() -> None:
    silent = []
    for package in ("tui", "engine", "planner", "kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for call in raised(ast.parse(path.read_text(encoding="utf-8"))):
                given = {word.arg: word.value for word in call.keywords}
                says = None in given or ("do" in given and getattr(given["do"], "value", True) != "")
                if getattr(call.func, "id", "") in KINDS and not says:
                    silent.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert silent == []


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000, b"\xff", b" " * (9 << 20), None])
def test_a_config_that_can_not_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is None:
        path.symlink_to(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json") as refused:
        read_config(path)
    assert refused.value.do.endswith(".")


@pytest.mark.parametrize("content", [b"\xff", None])
def test_a_recipe_that_can_not_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if content is None:
        path.symlink_to(path)
    else:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match="can't be read") as refused:
        Recipe.load(path)
    assert refused.value.do.endswith(".")
