"""Job files as their systems read them, and that nothing in a recipe becomes a part of a program."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetui.engine.cluster import modal, skypilot, slurm
from finetui.engine.cluster.job import Job
from finetui.engine.cluster.written import ATTEMPT, Written
from finetui.planner.errors import HardwareError, RecipeError, RunError, UserError
from finetui.planner.recipe import Recipe
from finetui.planner.version import VERSION

WRITERS = {"skypilot": skypilot.write, "slurm": slurm.write, "modal": modal.write}
#: A file name with most of what shells, YAML and Python have a meaning for.
NASTY = "a b'c\"$(touch canary)`touch canary`;&|{x}%s\\n: #~'''.jsonl"


def written(job: Job, base: Path) -> Written:
    return WRITERS[job.system](job, base, "job file")


def recipe_in(job: Job, text: str) -> Recipe:
    """The recipe that a job file holds."""
    if job.system == "modal":
        [recipe] = [n.value for n in ast.parse(text).body if isinstance(n, ast.Assign) and _is(n, "RECIPE")]
        return Recipe.parse(ast.literal_eval(recipe))
    script = yaml.safe_load(text)["run"] if job.system == "skypilot" else text
    return Recipe.parse(re.split(r"<<'FINETUI_RECIPE'\n|^FINETUI_RECIPE\n", script, flags=re.MULTILINE)[1])


def _is(node: ast.Assign, name: str) -> bool:
    return isinstance(node.targets[0], ast.Name) and node.targets[0].id == name


@pytest.mark.parametrize("system", WRITERS)
def test_the_recipe_inside_is_the_plan(system: str, job: Callable[..., Job], tmp_path: Path) -> None:
    made = job(system)
    found = recipe_in(made, written(made, tmp_path).text)
    assert found == made.recipe
    assert found.micro_batch == made.machine.plan.resolved.micro_batch
    assert found.hardware.gpu is None


@pytest.mark.parametrize("system", WRITERS)
def test_tokens_are_never_in_the_file(
    system: str, job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz012345")
    monkeypatch.setenv("DATA_TOKEN", "correct-horse-battery")
    data = [{"path": "https://host/rows.jsonl?token=${DATA_TOKEN}"}]
    made = job(system, {"data": data}, has_token=True)
    text = written(made, tmp_path).text
    assert "hf_abc" not in text
    assert "correct-horse" not in text
    assert "DATA_TOKEN" in text
    assert made.secrets == ["HF_TOKEN", "DATA_TOKEN"]
    commands = " ".join(word for _, command in written(made, tmp_path).commands for word in command)
    assert "hf_abc" not in commands


# --- nothing becomes a part of a program


@pytest.mark.parametrize("system", WRITERS)
def test_names_of_files_stay_names(system: str, job: Callable[..., Job], rows: Any, tmp_path: Path) -> None:
    recipe = {
        "data": [{"path": str(rows(NASTY))}],
        "tuning": {"type": "prompt", "init_text": "$(id)\nFINETUI_RECIPE\n"},
    }
    made = job(system, recipe, packages=("finetui[train] @ git+https://host/a b'$(touch canary)",))
    text = written(made, tmp_path / "data").text
    if system == "modal":
        # Values differ, and nothing else does: every name of the user's is a constant of the program.
        tame = job("modal", {"data": [{"path": str(rows())}]})
        assert _shape(text) == _shape(written(tame, tmp_path / "data").text)
        calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
        [local] = [call.args[0] for call in calls if call.func.attr == "add_local_file"]
        assert ast.unparse(local) == f"HERE / {NASTY!r}"
        return
    script = text
    if system == "skypilot":
        task = yaml.safe_load(text)
        assert list(task["file_mounts"].values()) == [f"./{NASTY}"]
        script = task["setup"] + task["run"]
    else:
        assert made.recipe.data[0].path == str(tmp_path / "data" / NASTY)
    _run_dry(script, tmp_path)
    assert not list(tmp_path.rglob("canary"))


def _run_dry(script: str, folder: Path) -> list[str]:
    """Run a script with programs that only write down how they were called."""
    home = folder / "home"
    for program in ("uv", "python3", "python", "sky"):
        path = folder / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/bash\nprintf "%q " {program} "$@" >> {shlex.quote(str(folder / "called"))}\n')
        path.chmod(0o755)
    (home / "finetui" / "venv" / "bin").mkdir(parents=True)
    (home / "finetui" / "venv" / "bin" / "python").symlink_to(folder / "bin" / "python")
    environment = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(home), "FINETUI_PYTHON": str(folder / "bin" / "python")
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shlex.split((folder / "called").read_text())


def _shape(text: str) -> str:
    """A program without its values, and without the number of lines of its recipe."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.value = None
    return ast.dump(tree)


@pytest.mark.parametrize("system", WRITERS)
@pytest.mark.parametrize("name", ["-rf", "a b", "a;b", "$(id)", "../up", "a\nb", "", "n" * 101])
def test_a_run_has_a_plain_name(system: str, name: str, job: Callable[..., Job]) -> None:
    with pytest.raises(RunError, match="is not a run name"):
        job(system, name=name)


@pytest.mark.parametrize(
    "asked",
    [{"packages": ("two\nlines",)}, {"packages": ("--index-url=x",)}, {"secrets": ("A;B",)}, {"bucket": "s3://a b"}],
)
def test_what_is_asked_for_is_looked_at(asked: dict[str, str], job: Callable[..., Job]) -> None:
    with pytest.raises(UserError):
        job("skypilot", provider="aws", **asked)


# --- each system


def test_skypilot_rents_what_was_planned(job: Callable[..., Job], tmp_path: Path) -> None:
    made = job("skypilot", {"limits": {"cost_usd": 5}}, provider="runpod", has_token=True)
    task = yaml.safe_load(written(made, tmp_path).text)
    assert task["resources"] == {
        "infra": "runpod", "accelerators": "H100-SXM:1", "memory": f"{made.memory_gib}+", "disk_size": made.disk_gib,
    }  # fmt: skip
    assert task["secrets"] == {"HF_TOKEN": None}
    assert task["file_mounts"] == {"~/finetui/files/0/rows.jsonl": "./data/rows.jsonl"}
    called = _run_dry(task["setup"] + task["run"], tmp_path)
    assert f"finetui[train]=={VERSION}" in called
    assert called[called.index(ATTEMPT) :] == [ATTEMPT, "recipe.yaml", "--name", "test-run", "--runs", "runs"]
    [(_, start), (_, fetch), (_, down)] = written(made, tmp_path).commands
    assert start == ["sky", "launch", "-c", "test-run", "--secret", "HF_TOKEN", "job file"]
    assert fetch[0] == "rsync"
    assert down == ["sky", "down", "test-run"]
    assert "autostop" not in task["resources"]  # the result is on that machine alone
    assert made.recipe.limits.cost_usd == 5
    assert made.recipe.hardware.usd_per_h == made.machine.usd_per_h > 0
    assert made.recipe.limits.hours == pytest.approx(made.limit_s / 3600, abs=0.01)


def test_a_bucket_lets_machines_go(job: Callable[..., Job], tmp_path: Path) -> None:
    task = yaml.safe_load(written(job("skypilot", provider="lambda", bucket="s3://mine"), tmp_path).text)
    assert task["resources"]["autostop"] == {"idle_minutes": 10, "down": True}
    assert task["file_mounts"]["/finetui-keep"] == {"source": "s3://mine", "mode": "MOUNT"}
    assert "--keep /finetui-keep" in task["run"]
    own = yaml.safe_load(written(job("skypilot", provider="lambda"), tmp_path).text)["file_mounts"]["/finetui-keep"]
    assert re.fullmatch(r"finetui-[0-9a-f]{10}", own["name"])
    none = yaml.safe_load(written(job("skypilot", provider="lambda", bucket="none"), tmp_path).text)
    assert "autostop" not in none["resources"]
    assert "--keep" not in none["run"]


def test_a_spot_machine_is_a_managed_job_with_a_bucket(job: Callable[..., Job], tmp_path: Path) -> None:
    made = job("skypilot", {"hardware": {"gpu": "L4", "usd_per_h": 0.2}}, provider="gcp", spot=True)
    result = written(made, tmp_path)
    task = yaml.safe_load(result.text)
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert "/finetui-keep" in task["file_mounts"]
    assert result.commands[0][1][:3] == ["sky", "jobs", "launch"]
    with pytest.raises(HardwareError, match="goes on elsewhere from its bucket"):
        job("skypilot", {"hardware": {"gpu": "RTX-4090", "usd_per_h": 0.2}}, provider="runpod", spot=True)
    with pytest.raises(HardwareError, match="can't mount a bucket"):
        job("skypilot", provider="runpod", bucket="s3://mine")


@pytest.mark.parametrize(
    ("hardware", "asked"),
    [
        ({"gpu": "L4", "usd_per_h": 0.2}, {"provider": "gcp", "spot": True, "idle_minutes": 5}),
        ({"gpu": "H100"}, {"provider": "verda", "idle_minutes": 5}),
    ],
    ids=["spot", "cloud"],
)
def test_idle_minutes_where_they_have_no_effect(
    hardware: dict[str, Any], asked: dict[str, Any], job: Callable[..., Job]
) -> None:
    with pytest.raises(HardwareError, match="it has no effect"):
        job("skypilot", {"hardware": hardware}, **asked)


def test_a_machine_without_gpus(job: Callable[..., Job], tmp_path: Path) -> None:
    def task(**asked: Any) -> Any:
        return yaml.safe_load(written(job("skypilot", {"hardware": {"device": "cpu"}}, **asked), tmp_path).text)

    assert not {"accelerators", "infra"} & set(task()["resources"])
    assert task(provider="aws")["resources"]["infra"] == "aws"
    assert "/finetui-keep" in task(spot=True)["file_mounts"]
    assert task(bucket="s3://mine")["file_mounts"]["/finetui-keep"]["source"] == "s3://mine"


def test_skypilot_gets_names_that_it_takes(job: Callable[..., Job], tmp_path: Path) -> None:
    task = yaml.safe_load(written(job("skypilot", name="7b.run-"), tmp_path).text)
    assert task["name"] == "run-7b.run"
    assert "--name 7b.run-" in task["run"]


def test_slurm_asks_for_what_was_planned(job: Callable[..., Job], tmp_path: Path) -> None:
    made = job("slurm", {"hardware": {"gpu": "A100-80GB", "gpus": 4}, "limits": {"hours": 30}})
    text = written(made, tmp_path).text
    assert subprocess.run(["bash", "-n"], input=text.encode(), check=False).returncode == 0
    directives = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
    assert len(directives) == text.count("#SBATCH")
    assert {"--gres=gpu:a100:4", "--nodes=1", "--requeue", "--open-mode=append", f"--mem={made.memory_gib}G"} <= set(
        directives
    )
    assert "--time=1-06:15:00" in directives  # what the recipe allows, and a little to end in
    assert "--signal=B:USR1@120" in directives
    called = _run_dry(text, tmp_path)
    assert called[called.index("--name") :] == [
        "--name", "test-run", "--runs", str(tmp_path / "runs"), "--notice-s", "110", "--requeue"
    ]  # fmt: skip
    assert Recipe.load(tmp_path / "runs" / "test-run.recipe.yaml") == made.recipe


def test_a_large_checkpoint_is_asked_for_in_time(job: Callable[..., Job], tmp_path: Path) -> None:
    made = job("slurm", {"tuning": "full", "hardware": {"gpu": "B200"}})
    assert made.machine.plan.disk.checkpoint_gib > 40
    assert made.lead_s > 2 * made.machine.plan.disk.checkpoint_gib * 2**30 / 0.8e9
    assert f"--signal=B:USR1@{made.lead_s}" in written(made, tmp_path).text


def test_slurm_makes_an_environment_once(job: Callable[..., Job], tmp_path: Path) -> None:
    script = written(job("slurm", packages=("one-package",)), tmp_path).text
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    # As ``python3 -m venv FOLDER`` does, it makes a FOLDER/bin/python, which is itself; and it notes how it was called.
    stub.write_text(
        f'#!/bin/bash\n(printf "%q " "$@"; echo) >> {tmp_path / "called"}\n'
        '[ "$2" != venv ] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }\n'
    )
    stub.chmod(0o755)
    environment = {"PATH": f"{stub.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    version, venv, install, *starts = [shlex.split(line) for line in (tmp_path / "called").read_text().splitlines()]
    assert version[0] == "-c"
    assert venv[:2] == ["-m", "venv"]
    assert install == ["-m", "pip", "install", f"finetui[train]=={VERSION}", "one-package"]
    assert [start[:3] for start in starts] == [["-P", "-m", ATTEMPT]] * 2


def test_slurm_looks_for_secrets_before_it_starts(job: Callable[..., Job], tmp_path: Path) -> None:
    made = job("slurm", {"data": [{"path": "https://host/rows.jsonl?token=${DATA_TOKEN}"}]})
    text = written(made, tmp_path).text
    done = subprocess.run(["bash", "-c", text], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "DATA_TOKEN: the recipe needs it in the environment" in done.stderr


def test_modal_runs_one_function_on_that_gpu(job: Callable[..., Job], tmp_path: Path) -> None:
    made = job("modal", {"hardware": {"gpu": "H100", "gpus": 2}}, has_token=True)
    tree = ast.parse(written(made, tmp_path).text)
    options = _options(tree)
    assert options["gpu"] == "H100:2"
    assert options["memory"] == 1024 * made.memory_gib
    assert options["timeout"] == pytest.approx(made.limit_s, abs=1)
    assert options["secrets"] == "[modal.Secret.from_local_environ(['HF_TOKEN'])]"
    assert "retries" not in options


def test_modal_goes_on_after_a_day(job: Callable[..., Job], tmp_path: Path) -> None:
    options = _options(ast.parse(written(job("modal", {"limits": {"hours": 60}}), tmp_path).text))
    assert options["timeout"] == 86400
    assert options["retries"] == "modal.Retries(max_retries=3, initial_delay=0.0)"


def _options(tree: ast.Module) -> dict[str, Any]:
    [train] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    decorator = train.decorator_list[0]
    assert isinstance(decorator, ast.Call)
    return {
        str(one.arg): one.value.value if isinstance(one.value, ast.Constant) else ast.unparse(one.value)
        for one in decorator.keywords
    }


# --- what goes along


@pytest.mark.parametrize("system", WRITERS)
def test_packages_and_secrets_go_along(system: str, job: Callable[..., Job], tmp_path: Path) -> None:
    data = [{"path": "s3://bucket/rows.jsonl"}]
    made = job(system, {"data": data}, packages=("flash-linear-attention",), secrets=("AWS_PROFILE",))
    assert made.packages == [f"finetui[train]=={VERSION}", "flash-linear-attention", "s3fs"]
    text = written(made, tmp_path).text
    assert all(package in text for package in made.packages)
    assert "AWS_PROFILE" in text
    own = "finetui[train] @ git+https://example.org/finetui"
    assert job(system, packages=(own,)).packages == [own]


# --- what can't be sent


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ({"data": []}, "names no dataset"),
        ({"limits": {"cost_usd": 3}}, "no price is known"),
        ({"model": "CONFIG"}, "can't be trained|but not trained"),
        ({"model": "FOLDER"}, "lacks"),
        ({"method": "grpo", "rewards": ["numeric"], "rollout": {"engine": "vllm"}}, "has to be installed there"),
    ],
    ids=["data", "cost", "config", "folder", "vllm"],
)
def test_what_could_only_fail_there_is_refused_here(
    recipe: dict[str, Any], what: str, job: Callable[..., Job], tmp_path: Path
) -> None:
    import finetui

    config = Path(finetui.__file__).parent / "presets" / "models" / "Qwen--Qwen3-8B" / "config.json"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes(config.read_bytes())
    places = {"CONFIG": str(config), "FOLDER": str(tmp_path / "empty")}
    recipe = {key: places.get(value, value) if isinstance(value, str) else value for key, value in recipe.items()}
    with pytest.raises(RecipeError, match=what):
        job("slurm", recipe)


def test_code_of_a_model_is_not_let_loose_on_rented_machines(job: Callable[..., Job]) -> None:
    for system in ("skypilot", "modal"):
        with pytest.raises(RecipeError, match="nobody can be asked"):
            job(system, {"trust_remote_code": True})
    assert job("slurm", {"trust_remote_code": True}).recipe.trust_remote_code


def test_a_machine_that_is_not_ones_own_is_not_turned_off(job: Callable[..., Job]) -> None:
    made = job("slurm", {"limits": {"at_end": "shutdown"}})
    assert made.recipe.limits.at_end.do == "nothing"
    assert any("shutdown is left out" in note for note in made.notes)


def test_a_length_that_is_not_known_is_said(job: Callable[..., Job], tmp_path: Path) -> None:
    made = job("slurm", {"data": [{"path": "org/on-the-hub"}]})
    assert made.limit_s is None
    assert "--time" not in written(made, tmp_path).text
    assert any("limits.hours" in note for note in made.notes)


@pytest.mark.parametrize("asked", [{"provider": "aws"}, {"bucket": "s3://mine"}, {"idle_minutes": 5}])
def test_options_without_effect_are_errors(asked: dict[str, Any], job: Callable[..., Job]) -> None:
    with pytest.raises(UserError, match=r"have no effect|rents no machines"):
        job("slurm", **asked)
    with pytest.raises(UserError, match=r"have no effect|rents no machines"):
        job("modal", **asked)
