"""A checkpoint that is damaged or not all there is refused by name, before anything of it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

import finetui  # noqa: E402
from finetui.engine.models.files import INDEX, SINGLE, opened, require_sound, weight_files  # noqa: E402
from finetui.planner.errors import ModelError  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files."""
    for number in (1, 2):
        save_file({f"weight.{number}": torch.ones(8, 8)}, tmp_path / f"part-{number}.safetensors")
    places = {f"weight.{number}": f"part-{number}.safetensors" for number in (1, 2)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def garble(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:8] + b"\xff" * 300)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4123\n")


def page(file: Path) -> None:
    file.write_text("\n<!DOCTYPE html><html>404</html>")


def circle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (cut, "this file can't be read"),
        (garble, "this file can't be read"),
        (empty, "this file is empty"),
        (pointer, "the pointer of Git LFS"),
        (page, "this is a web page"),
        (Path.unlink, r"part-2\.safetensors is missing, which model\.safetensors\.index\.json names"),
        (circle, "a link that leads back to itself"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, harm: Callable[[Path], None], told: str) -> None:
    require_sound(folder)
    harm(folder / "part-2.safetensors")
    with pytest.raises(ModelError, match=told) as caught:
        require_sound(folder)
    assert str(folder) in caught.value.where
    assert caught.value.do


@pytest.mark.parametrize("text", ["", "[]", "{", "\ufeff{}", '{"num_hidden_layers": 1000000000}'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_none(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ModelError) as caught:
        require_sound(folder)
    assert str(folder / name) in caught.value.where


@pytest.mark.parametrize(("harm", "told"), [(cut, "can't be read"), (empty, "is empty"), (Path.unlink, "is missing")])
def test_an_adapter_is_looked_at_too(tmp_path: Path, harm: Callable[[Path], None], told: str) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    require_sound(tmp_path)
    harm(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=told):
        require_sound(tmp_path)


def test_the_single_file_comes_before_an_index_as_in_transformers(folder: Path) -> None:
    assert [file.name for file in weight_files(folder)] == ["part-1.safetensors", "part-2.safetensors"]
    save_file({"weight": torch.ones(2)}, folder / SINGLE)
    assert [file.name for file in weight_files(folder)] == [SINGLE]


def test_a_file_gives_its_tensors(folder: Path) -> None:
    assert torch.equal(opened(folder / "part-1.safetensors").get_tensor("weight.1"), torch.ones(8, 8))


def test_looking_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from finetui.engine.models.files import require_sound;"
        f"require_sound(Path({str(folder)!r})); sys.exit('torch' in sys.modules)"
    )
    environment = {"PYTHONPATH": str(Path(finetui.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=False).returncode == 0
