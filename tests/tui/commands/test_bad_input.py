"""A user's mistake gets one clear message with its place, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetui.engine.run import Run
from finetui.planner.errors import HubError
from finetui.tui.cli import main

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    out, err = capsys.readouterr()
    assert out == ""
    return int(caught.value.code or 0), err


def recipe(text: str) -> str:
    Path("r.yaml").write_text(f"model: ./model\n{text}\n")
    return "r.yaml"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tunning: lora", "r.yaml:2: tunning: unknown key 'tunning'. Did you mean 'tuning'?"),
        ("epochs: lots", "r.yaml:2: epochs: must be a number (not 'lots')."),
        ("tuning: {type: full, quantization: nf4}", "full fine-tuning can't train 4-bit weights. Use type: qlora"),
        ("method: dpo\npacking: true", "packing can't be used with method dpo"),
        ("data: ./none.jsonl", "none.jsonl"),
    ],
)
def test_recipes(capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    code, message = fails(capsys, "run", recipe(text))
    assert code == 2
    assert expected in message
    assert not Path("runs").exists()


def test_a_missing_folder(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = fails(capsys, "plan", "./nowhere")
    assert code == 2
    assert "nowhere" in message


def test_a_config_without_a_known_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model/config.json").write_text(json.dumps({"model_type": "unet", "sample_size": 64}))
    code, message = fails(capsys, "plan", "./model")
    assert code == 2
    assert "hidden_size" in message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"messages": [{"role": "us', "rows.jsonl:731: the line is not valid JSON"),
        (json.dumps({"messages": [GOOD["messages"][0], {"role": "assistant", "content": ""}]}), "rows.jsonl:731"),
        (json.dumps({"messages": [{"role": "wizard", "content": "x"}]}), "wizard"),
        ('"just text"', "rows.jsonl:731"),
    ],
)
def test_a_bad_line_731(capsys: pytest.CaptureFixture[str], row: str, expected: str) -> None:
    lines = [json.dumps(GOOD)] * 1000
    lines[730] = row
    Path("rows.jsonl").write_text("\n".join(lines))
    code, message = fails(capsys, "run", recipe("data: ./rows.jsonl"))
    assert code == 2
    assert expected in message
    assert not Path("runs").exists()


def test_a_model_that_can_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text(json.dumps(GOOD))
    big = {**LLAMA, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
           "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    Path("model/config.json").write_text(json.dumps(big))
    code, message = fails(capsys, "run", recipe("data: ./rows.jsonl\ntuning: full\nhardware: {device: cpu}"))
    assert code == 2
    assert "does not fit" in message
    assert not Path("runs").exists()


def test_json_errors_are_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "./nowhere", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert caught.value.code == 2
    assert error["kind"] == "ModelError"
    assert error["do"]


@pytest.mark.parametrize("words", [["attach", "none"], ["stop", "none"], ["resume", "none"], ["logs", "none"]])
def test_a_run_that_is_not_there(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, message = fails(capsys, *words)
    assert code == 2
    assert "there is no run 'none'" in message


@pytest.mark.parametrize("verb", ["attach", "stop", "resume", "logs"])
def test_an_empty_name_is_not_the_latest_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """As of a variable of a script that is not set: ``finetui stop "$RUN"``."""
    for place in ("finetui.engine.run", "finetui.tui.commands.places"):
        monkeypatch.setattr(f"{place}.list_runs", lambda root=None: [Run("runs/tiny-b"), Run("runs/tiny-a")])
    code, message = fails(capsys, verb, "")
    assert code == 2
    assert message == "finetui: there is no run ''. The latest runs are: tiny-b, tiny-a.\n"


@pytest.mark.parametrize("verb", ["attach", "stop", "resume", "logs", "chat", "export"])
def test_the_beginning_of_several_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr("finetui.engine.run.list_runs", lambda root: [Run("runs/tiny-b"), Run("runs/tiny-a")])
    code, message = fails(capsys, verb, "tin")
    assert code == 2
    assert message == "finetui: the names of 2 runs begin with 'tin'. Type more of its name: tiny-b, tiny-a.\n"


def test_a_slip_in_a_known_models_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def away(model: str, name: str) -> str:
        raise HubError("the Hub can't be reached", where="model", do="Check the network.")

    monkeypatch.setattr("finetui.planner.hub._fetch", away)
    code, message = fails(capsys, "fit", "qwen/Qwen3-8")
    assert code == 2
    assert "can't be reached. Did you mean Qwen/Qwen3-8B" in message
    assert message.endswith("? Check the network.\n")
    assert "Did you mean" not in fails(capsys, "fit", "somebody/something-else")[1]


def test_models_of_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = fails(capsys, "fit", "--gpu", "T4,L4")
    assert code == 2
    assert "one GPU, not T4, L4" in message


def test_a_place_that_is_another_users(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> Run:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(Run, "open", forbidden)
    code, message = fails(capsys, "logs", "theirs")
    assert code == 2
    assert message.startswith("finetui: theirs: Permission denied. Look whose it is")


def test_gpus_that_are_named_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "plan", "./model", "--gpus", "a,b")[1].startswith("finetui: --gpus: 'a,b' names no GPUs")
    assert "Did you mean" in fails(capsys, "plan", "./model", "--gpu", "H1000")[1]


@pytest.mark.parametrize("text", ["~nobody-of-this-name", "x" * 300])
def test_a_model_that_can_not_be_a_path(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = fails(capsys, "fit", text)
    assert (code, err.count("\n")) == (2, 1)
    assert "can't be a path" in err
