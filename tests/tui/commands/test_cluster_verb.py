"""finetui cluster: the job on stdout or in a file, and what to type next on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetui.tui.cli import main

MODEL = ("Qwen/Qwen3-8B", "--tuning", "qlora", "--name", "trial")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 100)


def ask(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["cluster", *words])
    return int(caught.value.code or 0)


def test_the_job_is_on_stdout_and_talk_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(*MODEL, "--data", "rows.jsonl", "--gpu", "H100", "--to", "skypilot", "--provider", "runpod") == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["resources"]["accelerators"] == "H100-SXM:1"
    assert "1 × H100 at runpod" in err
    assert "$" in err
    assert "  sky launch -c trial trial.sky.yaml" in err
    assert "HF_TOKEN is not set here" in err


def test_a_file_has_paths_beside_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    words = (*MODEL, "--data", "rows.jsonl", "--gpu", "L4", "--to", "skypilot", "--provider", "aws")
    assert ask(*words, "-o", "here.sky.yaml") == 0
    assert capsys.readouterr().out == ""
    assert "./rows.jsonl" in yaml.safe_load(Path("here.sky.yaml").read_text())["file_mounts"].values()
    # Not beside it: the path is whole.
    assert ask(*words, "-o", "jobs/there.sky.yaml") == 0
    assert (
        str(tmp_path / "rows.jsonl") in yaml.safe_load(Path("jobs/there.sky.yaml").read_text())["file_mounts"].values()
    )


def test_in_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    assert ask(*MODEL, "--data", "rows.jsonl", "--gpu", "H100", "--to", "modal", "--json") == 0
    out = capsys.readouterr().out
    assert "hf_abc" not in out
    tree = json.loads(out)
    assert (tree["system"], tree["gpu"], tree["count"], tree["provider"]) == ("modal", "H100", 1, "modal")
    assert tree["usd"] == pytest.approx(tree["usd_per_h"] * tree["time_s"] / 3600, abs=1e-3)
    assert tree["limit_s"] > tree["time_s"]
    assert tree["files"] == [{"local": str(tmp_path / "rows.jsonl"), "remote": "files/0/rows.jsonl", "bytes": 3500}]
    assert tree["secrets"] == ["HF_TOKEN"]
    assert tree["commands"][0] == ["modal", "run", "--detach", "trial.modal.py"]
    compile(tree["text"], "job", "exec")


def test_without_a_gpu_the_cheapest_is_rented(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(*MODEL, "--data", "rows.jsonl", "--to", "modal", "--json") == 0
    cheapest = json.loads(capsys.readouterr().out)
    for gpu in ("T4", "L4", "A10", "H100"):
        assert ask(*MODEL, "--data", "rows.jsonl", "--to", "modal", "--gpu", gpu, "--json") == 0
        assert json.loads(capsys.readouterr().out)["usd"] >= cheapest["usd"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--gpu", "H100"), "which system"),
        (("--gpu", "H100", "--to", "skypilot", "--nodes", "2"), "several machines are not supported"),
        (("--gpu", "RTX-3060-12GB", "--to", "modal"), "does not know what modal calls a RTX-3060-12GB"),
        (("--gpu", "H100", "--to", "skypilot", "--provider", "here"), "rents no machines at 'here'"),
        (("--gpu", "T4", "--tuning", "full", "--to", "modal"), "does not fit"),
    ],
    ids=["to", "nodes", "name", "provider", "fit"],
)
def test_mistakes_are_told(words: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("Qwen/Qwen3-8B", "--tuning", "qlora", "--data", "rows.jsonl", *words) == 2
    out, err = capsys.readouterr()
    assert what in err
    assert out == ""


def test_a_file_that_is_there_stays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: Qwen/Qwen3-8B\ntuning: qlora\ndata: [rows.jsonl]\n")
    words = (str(recipe), "--gpu", "H100", "--to", "slurm")
    assert ask(*words, "-o", str(recipe)) == 2
    assert "Add --force" in capsys.readouterr().err
    assert recipe.read_text().startswith("model:")
    job = tmp_path / "job"
    job.write_text("old")
    assert ask(*words, "--out", str(job), "--force") == 0
    assert job.read_text().startswith("#!/bin/bash")


def test_a_folder_that_can_not_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(*MODEL, "--data", "rows.jsonl", "--gpu", "H100", "--to", "slurm", "-o", "absent/job") == 2
    assert "can't be written" in capsys.readouterr().err


def test_it_answers_without_torch_and_textual() -> None:
    code = (
        "import sys\nfrom finetui.tui.cli import main\n"
        f"try: main({['cluster', *MODEL, '--data', 'rows.jsonl', '--gpu', 'H100', '--to', 'slurm']!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print({'torch', 'transformers', 'textual', 'numpy'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
