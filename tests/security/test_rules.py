"""Rules of the source itself: what nobody may write, because one place would be enough to undo the rest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("planner", "engine", "kernels", "tui")
#: Benchmarks start other programs as their users would, on models that are made on the spot; an alert runs the one
#: command that the user has put into their own settings.
_APART = {"engine/bench/arms.py", "tui/alerts.py"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call with its dotted name, as far as it has one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call, name: str) -> ast.expr | None:
    """A keyword argument."""
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def offences(path: Path, root: Path = _ROOT) -> Iterator[str]:
    """What a file does that it must not."""
    for name, call in calls(path):
        where = f"{path.relative_to(root)}:{call.lineno}"
        last = name.rpartition(".")[2]
        if name in ("pickle.load", "pickle.loads", "joblib.load", "dill.loads", "marshal.loads", "shelve.open"):
            yield f"{where}: {name} runs what it reads"
        if name == "torch.load" and ast.unparse(given(call, "weights_only") or ast.Constant(False)) != "True":
            yield f"{where}: torch.load without weights_only=True"
        if last == "load" and name.startswith(("np.", "numpy.")) and given(call, "allow_pickle") is not None:
            yield f"{where}: numpy.load with pickles"
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"):
            yield f"{where}: {name} makes objects"
        if name in ("os.system", "os.popen", "subprocess.getoutput") or given(call, "shell") is not None:
            yield f"{where}: {name} goes through a shell"
        if last == "from_pretrained" and name.startswith(("Auto", "kind.", "transformers.Auto")):
            spread = any(keyword.arg is None for keyword in call.keywords)
            if given(call, "trust_remote_code") is None and not spread:
                yield f"{where}: {name} would ask on the terminal whether to run a model's code"
        if last in ("extractall", "unpack_archive"):
            yield f"{where}: {name} writes where an archive says"
        if last == "mktemp":
            yield f"{where}: {name} can be raced"
        if name in ("eval", "exec") and path.name != "jail.py":
            yield f"{where}: {name}"


@pytest.mark.parametrize("package", _PACKAGES)
def test_rules(package: str) -> None:
    files = [path for path in (_ROOT / package).rglob("*.py") if str(path.relative_to(_ROOT)) not in _APART]
    assert files
    assert [offence for path in sorted(files) for offence in offences(path)] == []


def test_the_rules_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "torch.load('a')\nyaml.load('b')\nos.system('c')\neval('d')\nAutoModel.from_pretrained('e')\n"
        "t.extractall()\nsubprocess.run('x', shell=True)\npickle.loads(b'')\ntempfile.mktemp()\n"
        "torch.load('a', weights_only=True)\nAutoModel.from_pretrained('e', trust_remote_code=False)\n"
    )
    assert [int(offence.split(":")[1]) for offence in offences(bad, tmp_path)] == list(range(1, 10))
