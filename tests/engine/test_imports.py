"""What a run never uses is not imported, all that it uses is, and afterwards everything is as it was."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
import torch

from finetui.engine.imports import UNUSED, compiling_later, distributions_by_name, hidden, of_a_run


@pytest.fixture(autouse=True)
def _thawed():
    """What was frozen here would be reported as leaked by extensions when this process ends."""
    yield
    gc.unfreeze()


def test_functions_are_compiled_at_their_first_call(monkeypatch):
    compiled = []

    def stock(model, **options):
        compiled.append((model.__name__, options))
        return lambda *args: model(*args) + 1

    monkeypatch.setattr(torch, "compile", stock)
    with compiling_later():

        @torch.compile
        def plain(x):
            return x

        @torch.compile(dynamic=True)
        def told(x):
            return 2 * x

        class Kind:
            @torch.compile
            def method(self, x):
                return 3 * x

    assert torch.compile is stock
    assert compiled == []
    assert [plain(1), plain(1), told(1), Kind().method(1)] == [2, 2, 3, 4]
    assert compiled == [("plain", {}), ("told", {"dynamic": True}), ("method", {})]


def test_hidden_packages_are_not_installed_until_they_are_again(tmp_path, monkeypatch):
    for name in ("a_known_package", "an_unknown_package"):
        (tmp_path / f"{name}.py").write_text("VALUE = 1\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = importlib.import_module("a_known_package")
    with hidden(("a_known_package", "an_unknown_package", "a_package_that_is_nowhere")):
        assert importlib.util.find_spec("an_unknown_package") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("an_unknown_package")
        assert importlib.import_module("a_known_package") is known
    assert importlib.import_module("an_unknown_package").VALUE == 1
    assert "a_package_that_is_nowhere" not in sys.modules
    assert importlib.import_module("a_known_package") is known


def test_versions_are_found_without_reading_all_that_is_installed(tmp_path, monkeypatch):
    stock, calls = importlib.metadata.packages_distributions, []
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: calls.append(1) or stock())
    outside = importlib.metadata.packages_distributions
    (tmp_path / "borrowed").mkdir()
    (tmp_path / "borrowed-1.0.dist-info").mkdir()
    (tmp_path / "borrowed-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: borrowed\nVersion: 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with distributions_by_name():
        told = importlib.metadata.packages_distributions()
        for package in ("torch", "transformers", "trl", "huggingface_hub"):
            assert {name.lower().replace("-", "_") for name in told[package]} == {package}
        assert not calls
        assert told["yaml"] == ["PyYAML"]  # named otherwise
        assert "a_package_that_is_nowhere" not in told
        assert told.get("borrowed") is None  # a distribution of that name, without such a package
        assert set(told) == set(stock())  # and, where names differ, its answers
        assert len(calls) == 1
    assert importlib.metadata.packages_distributions is outside


def test_a_failure_within_leaves_nothing_behind():
    def state():
        return torch.compile, importlib.metadata.packages_distributions, sys.getswitchinterval(), gc.isenabled()

    before, modules = state(), set(sys.modules)
    with contextlib.suppress(ZeroDivisionError), of_a_run():
        within = state()
        raise ZeroDivisionError
    assert state() == before
    assert set(sys.modules) == modules
    assert all(inside is not outside for inside, outside in zip(within, before, strict=True))


@pytest.mark.parametrize("library", ["transformers", "peft", "trl"])
def test_what_a_library_may_have_found_already_is_not_hidden_from_it(library, monkeypatch):
    for name in ("transformers", "peft", "trl", *UNUSED):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with of_a_run():
        assert UNUSED[0] in sys.modules
    monkeypatch.setitem(sys.modules, library, json)
    with of_a_run():
        assert UNUSED[0] not in sys.modules


LIBRARIES = """
import json, sys
from finetui.engine.imports import of_a_run
with of_a_run(hide=json.loads(sys.argv[1])):
    import bitsandbytes, peft
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
    from transformers.generation import candidate_generator
    assert peft.import_utils.is_torchao_available.cache_info().currsize == 0
assert peft.import_utils.is_torchao_available.cache_info().currsize == json.loads(sys.argv[1])
found = [name for name in ["torch._inductor.compile_fx", *sys.argv[2:]] if name in sys.modules]
import sklearn
print(json.dumps([found, sklearn.HERE]))
"""


@pytest.mark.parametrize("hide", [True, False])
def test_the_libraries_do_without_what_no_run_uses(tmp_path, hide):
    """Stand-ins that say no when they are asked what they hold: a library that imports one of them fails."""
    pytest.importorskip("bitsandbytes")
    for name in UNUSED:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("HERE = True\n")
        facts = tmp_path / f"{name}-99.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", "-c", LIBRARIES, json.dumps(hide), *UNUSED],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if hide:
        assert json.loads(done.stdout.splitlines()[-1]) == [[], True], done.stderr[-2000:]
    else:
        assert done.returncode != 0  # so the libraries would have imported them
