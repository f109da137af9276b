"""What transformers finds in its models is remembered, until one of them changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import finetui
from finetui.engine.known_models import remembered, remembering

#: A package that reads its models as transformers does, and says so.
READER = """
import os
def create_import_structure_from_path(path):
    path = os.path.dirname(path) if os.path.isfile(path) else path
    print("reads", os.path.basename(path), flush=True)
    found = {}
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            if entry.is_dir() and entry.name != "__pycache__":
                found[entry.name] = create_import_structure_from_path(entry.path)
            elif entry.name.endswith(".py") and entry.name != "__init__.py":
                found.setdefault(frozenset({"torch"}), {})[entry.name[:-3]] = {open(entry.path).read().strip()}
    return found
"""
USES = """
import sys
from finetui.engine.known_models import remembered
before = list(sys.meta_path)
with remembered():
    import transformers
    from transformers.utils import import_utils
    found = transformers.found
assert sys.meta_path == before
functions = [value for value in vars(import_utils).values() if hasattr(value, "__code__")]
assert [one.__code__.co_filename for one in functions] == [import_utils.__file__]
assert import_utils.__name__ == "transformers.utils.import_utils"
print(sorted((str(key), sorted(map(str, value))) for key, value in found.items()))
print(found["llama"][frozenset({"torch"})])
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with such a package."""
    package = tmp_path / "site" / "transformers"
    (package / "utils").mkdir(parents=True)
    (package / "models" / "llama").mkdir(parents=True)
    path = '__import__("pathlib").Path(__file__).parent / "models"'
    for name, text in {
        "__init__.py": f"from .utils.import_utils import create_import_structure_from_path as f\nf({path})\n"
        f"found = f({path} / '__init__.py')\n",
        "utils/__init__.py": "",
        "utils/import_utils.py": READER,
        "models/__init__.py": "",
        "models/auto.py": "AutoModel",
        "models/llama/__init__.py": "",
        "models/llama/modeling_llama.py": "LlamaModel",
    }.items():
        (package / name).write_text(text)
    return tmp_path / "site"


def start(site: Path, uses: str = USES) -> tuple[list[str], str]:
    """Which folders were read by a process that imports the package, and all else that it printed."""
    path = os.pathsep.join([str(site), str(Path(finetui.__file__).parent.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(site.parent / "cache")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-P", "-c", uses], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [line.split()[1] for line in lines if line.startswith("reads")], "\n".join(
        line for line in lines if not line.startswith("reads")
    )


def test_models_are_read_once_until_one_changes(site: Path) -> None:
    models = site / "transformers" / "models"
    first = start(site)
    assert first[0] == ["models", "llama"]
    assert start(site) == ([], first[1])
    assert "{'modeling_llama': {'LlamaModel'}}" in first[1]
    (models / "llama" / "modeling_llama.py").write_text("LlamaModels")
    read, told = start(site)
    assert read == ["models", "llama"]
    assert "{'modeling_llama': {'LlamaModels'}}" in told
    assert start(site) == ([], told)
    (models / "more.py").write_text("More")
    assert start(site)[0] == ["models", "llama"]
    os.utime(site / "transformers" / "utils" / "import_utils.py", (1, 1))  # another release reads in another way
    assert start(site)[0] == ["models", "llama"]


@pytest.mark.parametrize("harm", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[:40] + b"?" + raw[41:]])
def test_what_is_damaged_is_made_again(site: Path, harm: Any) -> None:
    first = start(site)
    (kept,) = (site.parent / "cache" / "finetui" / "known-models").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(harm(whole))
    assert start(site) == first
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("other", ["7", "(1, 2)", "{3: {4}}", "{'a': {('b',)}}"])
def test_what_could_not_be_kept_as_it_is_is_not_kept(site: Path, other: str) -> None:
    utils = site / "transformers" / "utils" / "import_utils.py"
    utils.write_text(READER.replace("    return found", f"    found['other'] = {other}\n    return found"))
    uses = USES.replace("sorted(map(str, value))", "str(value)")
    first = start(site, uses)
    assert first[0] == ["models", "llama", "models", "llama"]
    assert start(site, uses) == first


def test_without_a_cache_they_are_read_each_time(site: Path) -> None:
    (site.parent / "cache").write_text("a file in the way")
    first = start(site)
    assert first[0] == ["models", "llama"]
    assert start(site) == first


def test_a_release_that_reads_them_otherwise_is_left_alone(site: Path) -> None:
    for name in ("__init__.py", "utils/import_utils.py"):
        file = site / "transformers" / name
        file.write_text(file.read_text().replace("create_import_structure_from_path", "another_name"))
    first = start(site)
    assert first[0] == ["models", "llama", "models", "llama"]
    assert start(site) == first


def test_transformers_own_answer_is_the_same_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from transformers.utils import import_utils

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stock = import_utils.create_import_structure_from_path
    source = Path(import_utils.__file__)
    models = source.parents[1] / "models"
    expected = stock(models)
    assert remembering(stock, source)(models) == expected

    def must_not(_: Any) -> dict[Any, Any]:
        raise AssertionError("read again")

    second = remembering(must_not, source)
    assert second(models / "__init__.py") == second(str(models)) == expected
    assert second(models) is not second(models)
    with pytest.raises(AssertionError, match="read again"):
        second(models / "llama")


def test_nothing_is_left_where_transformers_was_not_imported() -> None:
    before = list(sys.meta_path)
    with remembered():
        assert len(sys.meta_path) == len(before) + 1
    assert sys.meta_path == before
