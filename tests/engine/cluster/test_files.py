"""What comes along, and under which names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.cluster.files import absolute, bundled, on_hub, secrets_of
from finetui.planner.errors import RecipeError, UserError
from finetui.planner.recipe import Recipe


def test_files_and_folders_of_a_recipe(rows: Callable[..., Path], tmp_path: Path) -> None:
    first, second = rows("a b's.jsonl"), rows("b.jsonl")
    reward, template = tmp_path / "mine.py", tmp_path / "t.jinja"
    reward.write_text("def score(**_): ...\n")
    template.write_text("{{ messages }}")
    recipe = Recipe.build(
        {
            "model": "Qwen/Qwen3-8B", "method": "grpo", "chat_template": str(template),
            "data": [{"path": str(first)}, {"path": str(second)}, {"path": "org/set"}],
            "rewards": ["numeric", f"{reward}:score"],
        }
    )  # fmt: skip
    there, mounts = bundled(recipe)
    assert [mount.local for mount in mounts] == [template, first, second, reward]
    assert [source.path for source in there.data] == [f"./{mounts[1].remote}", f"./{mounts[2].remote}", "org/set"]
    assert there.rewards[1].function == f"./{mounts[3].remote}:score"
    assert there.rewards[0].function == "numeric"
    assert mounts[1].remote == "files/1/a-b-s.jsonl"
    assert mounts[1].bytes == first.stat().st_size
    # What is there resolves to the files, as they lie beside the recipe.
    for mount in mounts:
        target = tmp_path / "there" / mount.remote
        target.parent.mkdir(parents=True)
        target.write_bytes(mount.local.read_bytes())
    there.save(tmp_path / "there" / "recipe.yaml")
    read = Recipe.load(tmp_path / "there" / "recipe.yaml")
    assert Path(read.data[0].path).read_bytes() == first.read_bytes()
    assert Path(read.chat_template).read_text() == "{{ messages }}"


def test_a_file_that_is_named_twice_comes_once(rows: Callable[..., Path]) -> None:
    path = str(rows())
    stages = [{"method": "sft"}, {"method": "sft", "name": "more", "data": path}, {"do": "export", "path": "/srv/out"}]
    there, mounts = bundled(Recipe.build({"model": "m/m", "data": path, "stages": stages}))
    assert len(mounts) == 1
    assert there.stages[1].changes["data"] == [{"path": "./files/0/rows.jsonl"}]
    assert there.stages[2].path == ""  # into the run's own directory, which comes back


def test_a_folder_is_as_large_as_its_files(rows: Callable[..., Path]) -> None:
    folder = rows().parent
    rows("second.jsonl")
    _, [mount] = bundled(Recipe.build({"model": "m/m", "data": str(folder)}))
    assert mount.is_folder
    assert mount.bytes == sum(file.stat().st_size for file in folder.iterdir())


def test_what_is_not_here_can_not_come_along(rows: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        bundled(Recipe.build({"model": "m/m", "data": str(tmp_path / "gone.jsonl")}))
    with pytest.raises(UserError, match="line break"):
        bundled(Recipe.build({"model": "m/m", "data": str(rows("two\nlines.jsonl"))}))


def test_an_adapter_comes_without_the_run_around_it(rows: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "runs" / "first" / "output"
    output.mkdir(parents=True)
    (output / "adapter_config.json").write_text("{}")
    (output / "adapter_model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    tree = {"model": "m/m", "data": str(rows()), "tuning": {"type": "lora", "start_from": str(output.parent)}}
    there, mounts = bundled(Recipe.build(tree))
    assert [mount.local for mount in mounts if mount.is_folder] == [output]
    assert there.tuning.start_from == "./files/0/output"
    with pytest.raises(UserError, match="no adapter here"):
        bundled(Recipe.build({**tree, "tuning": {"type": "lora", "start_from": str(tmp_path)}}))


def test_on_shared_disks_paths_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    data = [{"path": "rows.jsonl"}, {"path": "~/more.jsonl"}, {"path": "org/set"}, {"path": "s3://b/rows.jsonl"}]
    tree = {"model": "./model", "data": data, "tuning": {"type": "lora", "start_from": "runs/first"}}
    there = absolute(Recipe.build(tree))  # none of it is here, and that is no matter
    assert there.model == str(tmp_path / "model")
    assert [source.path for source in there.data] == [
        str(tmp_path / "rows.jsonl"), "/home/me/more.jsonl", "org/set", "s3://b/rows.jsonl"
    ]  # fmt: skip
    assert there.tuning.start_from == str(tmp_path / "runs" / "first")


def test_secrets_are_known_by_name() -> None:
    data = [{"path": "https://host/rows.jsonl?token=${DATA_TOKEN}"}, {"path": "s3://b/${WHICH}.jsonl"}]
    recipe = Recipe.build({"model": "m/m", "data": data})
    assert secrets_of(recipe) == ["DATA_TOKEN", "WHICH"]
    assert on_hub(recipe)
    judged = {"model": "m/m", "method": "grpo", "rewards": [{"function": "/m.py:f", "environment": ["KEY; reboot"]}]}
    with pytest.raises(UserError, match="can't be the name of a variable"):
        secrets_of(Recipe.build(judged))


def test_a_teacher_comes_along(tmp_path: Path, rows: Callable[..., Path]) -> None:
    """A run as its result; an adapter only where the model that it sits on can be had there."""
    output = tmp_path / "elder" / "output"
    output.mkdir(parents=True)
    (output / "config.json").write_text("{}")

    def student(teacher: str) -> Recipe:
        tree = {"model": "m/m", "method": "distill", "distillation": {"teacher": teacher}, "data": str(rows())}
        return Recipe.build(tree)

    there, files = bundled(student(str(output.parent)))
    assert there.distillation.teacher == next(f"./{mount.remote}" for mount in files if mount.local == output)
    assert absolute(student(str(output.parent))).distillation.teacher == str(output)
    assert on_hub(student("t/t"))
    assert bundled(student("t/t"))[0].distillation.teacher == "t/t"
    described = output / "adapter_config.json"
    described.write_text(json.dumps({"base_model_name_or_path": "t/t"}))
    assert bundled(student(str(output)))[0].distillation.teacher.startswith("./files/")
    described.write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(UserError, match=r"an adapter on .*, a folder of this machine"):
        bundled(student(str(output)))
