"""Folders that somebody else made: nothing in them runs, and nothing of them is read from elsewhere."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetui.engine import pickles
from finetui.engine.data.sources import source_files
from finetui.engine.models import remote_code
from finetui.engine.models.adapter_start import find_adapter
from finetui.engine.models.at_hand import check_model
from finetui.engine.models.load import load_tokenizer, locate
from finetui.engine.models.weights import stored_tensors
from finetui.planner.datasource import DataSource
from finetui.planner.errors import DataError, FinetuiError, ModelError
from finetui.planner.inside import inside


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Exists once foreign code has run."""
    return tmp_path / "it-ran"


def bomb(mark: Path) -> bytes:
    """A torch file whose pickle is a program."""
    raw = io.BytesIO()
    torch.save({"weight": Bomb(mark)}, raw)
    return raw.getvalue()


def test_the_bomb_goes_off(mark: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.is_dir()


@pytest.fixture
def checkpoint(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a small model that a test may spoil."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def test_pickled_weights_are_refused_and_their_conversion_runs_nothing(checkpoint: Path, mark: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(bomb(mark))
    for load in (lambda: locate(str(checkpoint)), lambda: check_model(str(checkpoint))):
        with pytest.raises(ModelError, match=r"are a pickle .*finetui\.engine\.pickles"):
            load()
    with pytest.raises(ModelError, match="something else than tensors"):
        pickles.convert(checkpoint)
    assert not mark.exists()


def test_pickled_weights_can_be_converted(checkpoint: Path) -> None:
    whole = load_file(checkpoint / "model.safetensors")
    names = sorted(whole)
    half = len(names) // 2
    torch.save({name: whole[name] for name in names[:half]}, checkpoint / "pytorch_model-00001-of-00002.bin")
    torch.save({name: whole[name] for name in names[half:]}, checkpoint / "pytorch_model-00002-of-00002.bin")
    (checkpoint / "model.safetensors").unlink()
    assert pickles.main([str(checkpoint)]) == 0
    assert locate(str(checkpoint)) == checkpoint
    assert set(stored_tensors(checkpoint)) == set(whole)


def test_a_pickled_adapter_is_refused(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(bomb(mark))
    with pytest.raises(ModelError, match="are a pickle"):
        find_adapter(str(tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.PICKLE"])
def test_pickled_rows_are_refused(tmp_path: Path, mark: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps([Bomb(mark)]))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match="this is a pickle"):
            source_files(DataSource(path=str(path)))
    assert not mark.exists()


def test_a_folder_with_a_loading_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.py").write_text("import datasets")
    with pytest.raises(DataError, match="a program that makes it"):
        source_files(DataSource(path=str(tmp_path)))


# --- code that comes with a model

_CODE = """\
import os
from transformers import LlamaConfig, LlamaForCausalLM
os.mkdir({mark!r}) if not os.path.isdir({mark!r}) else None
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def odd(checkpoint: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose classes are its own."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddModel"]}
    config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "odd.py").write_text(_CODE.format(mark=str(mark)))
    return checkpoint


def test_code_of_a_model_runs_only_when_recipe_and_user_agree(odd: Path, mark: Path, make_plan: Callable) -> None:
    from finetui.engine.models.load import load_base

    resolved = make_plan().resolved

    def load() -> object:
        return load_base(locate(str(odd)), resolved, torch.device("cpu"), lambda _: None)

    with pytest.raises(ModelError, match="finetui trust"):
        load()
    with pytest.raises(ModelError, match="finetui trust"):
        remote_code.check(odd, wanted=True, model="odd")
    assert not mark.exists()

    remote_code.allow(remote_code.code_of(odd), "odd")
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        remote_code.check(odd, wanted=False, model="odd")
    remote_code.check(odd, wanted=True, model="odd")
    load()
    assert mark.is_dir()

    (odd / "helper.py").write_text("import os")
    with pytest.raises(ModelError, match="finetui trust"):
        load()


def test_code_of_a_model_that_transformers_knows_never_runs(odd: Path, mark: Path, make_plan: Callable) -> None:
    from finetui.engine.models.load import load_base

    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    remote_code.allow(remote_code.code_of(odd), "odd")
    load_base(locate(str(odd)), make_plan().resolved, torch.device("cpu"), lambda _: None)
    load_tokenizer(odd)
    assert not mark.exists()
    assert check_model(str(odd), trust=True)[0].status == "fail"


def test_code_of_another_repository_is_refused(odd: Path) -> None:
    config = json.loads((odd / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "someone/else--odd.OddConfig"}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="another repository"):
        remote_code.code_of(odd)


# --- paths


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "C:\\x", "a\\b", "..", "a\0b"])
def test_names_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FinetuiError, match="does not lie in its own folder"):
        inside(tmp_path, name)


def test_an_index_can_not_lead_out_of_its_folder(checkpoint: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2)}, checkpoint.parent / "secret.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    for read in (lambda: stored_tensors(checkpoint), lambda: locate(str(checkpoint))):
        with pytest.raises(FinetuiError, match=r"index\.json: it names '\.\./secret"):
            read()
    index.write_text("[]")
    with pytest.raises(ModelError, match="no index"):
        locate(str(checkpoint))


def test_a_link_can_not_lead_out_of_a_model_or_a_folder_of_data(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "private.jsonl").write_text('{"text": "private"}\n')
    (checkpoint / "chat_template.jinja").symlink_to(tmp_path / "private.jsonl")
    with pytest.raises(ModelError, match="is a link to"):
        locate(str(checkpoint))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").symlink_to(tmp_path / "private.jsonl")
    with pytest.raises(DataError, match="is a link to"):
        source_files(DataSource(path=str(tmp_path / "rows")))
    assert source_files(DataSource(path=str(tmp_path / "rows" / "a.jsonl")))  # which the user named


def test_links_of_the_hub_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in checkpoint.iterdir():
        shutil.copy(file, repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert locate(str(snapshot)) == snapshot
    assert stored_tensors(snapshot)
