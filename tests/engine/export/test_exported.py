"""Names and places of exports: folders may be called anything, what is written and typed next may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
from finetui.engine import output
from finetui.engine.export.exported import plain_name
from finetui.engine.export.ollama import _sampling
from finetui.engine.run import Run
from finetui.planner.errors import RunError


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("qwen3.1-answers", "qwen3.1-answers"),
        ("a b's $(id)", "a-b-s-id"),
        ("x\nPARAMETER stop y", "x-PARAMETER-stop-y"),
        ("-rf", "rf"),
        ("…", "model"),
    ],
)
def test_names_that_files_and_commands_can_hold(folder: str, name: str, tmp_path: Path) -> None:
    assert plain_name(Run(tmp_path / folder)) == name


def test_a_folder_below_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(RunError, match="the folder can't be made") as told,
        output.written_whole(tmp_path / "file" / "sub"),
    ):
        raise AssertionError("there is nowhere to write to")
    assert told.value.where == str(tmp_path / "file" / "sub")
    assert (tmp_path / "file").read_text() == "mine"


def test_only_numbers_become_parameters(tmp_path: Path) -> None:
    told = {"do_sample": True, "temperature": "1\nFROM elsewhere", "top_k": 20, "top_p": 0.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    assert _sampling(tmp_path) == {"top_k": 20, "top_p": 0.5}
