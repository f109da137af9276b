"""bench and doctor: what they print, keep and refuse; the measuring itself is replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from finetui.engine.bench.ceilings import Figure
from finetui.engine.check import Check
from finetui.planner.ceilings import Ceilings, for_gpu
from finetui.tui.cli import main

ENGINE = {
    "gpu": "CPU", "date": "2026-11-22", "command": "finetui bench engine", "versions": {"torch": "2.13"},
    "task": {"model": "/m/toy", "tuning": "lora", "sequence_length": 64, "micro_batch": 2},
}  # fmt: skip
DONE: dict[str, Any] = {
    "arm": "finetui", "checkpointing": "none", "tokens_per_s": 1200, "step_ms": 100.0, "spread_ms": 4.0,
    "allocated_gib": 1.5, "reserved_gib": 2.0, "to_first_step_s": 8.25, "loss": 2.5, "grad_norm": [0.5, 0.25],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def test_ceilings_are_shown_and_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured = Ceilings("L4", "570.1", "2026-11-22", bf16_tflops=98.5)
    figure = Figure("product, bfloat16", 98.5, 97.0, 99.0, "TFLOP/s", 121.0)
    monkeypatch.setattr("finetui.engine.bench.ceilings.measure", lambda tell: (measured, [figure]))
    assert call("bench") == 0
    out, err = capsys.readouterr()
    assert "L4, driver 570.1, 2026-11-22" in out
    assert "81%" in out, "of the datasheet"
    assert "ceilings.json" in err
    assert for_gpu("L4") == measured
    assert call("bench", "ceilings", "--json") == 0
    assert json.loads(capsys.readouterr().out)["figures"][0]["value"] == 98.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "nothing"], "nothing named 'nothing'"),
        (["bench", "--chart", "x.svg"], "--chart has no effect on bench ceilings"),
        (["bench", "kernels", "--model", "m"], "--model has no effect on bench kernels"),
        (["bench", "engine", "--only", "glu"], "--only has no effect on bench engine"),
        (["bench", "engine"], "no model is named"),
        (["bench", "engine", "--model", "/no/such/folder"], "there is no checkpoint at /no/such/folder"),
        (["bench", "engine", "--model", "llama-1b", "--arms", "nobody"], "nobody"),
        (["bench", "engine", "--model", "llama-1b", "--arms", ","], "--arms"),
        (["doctor", "--model", "openai-community/gpt2", "--tuning", "qlora"], "'qlora' is no tuning"),
        (["doctor", "--tuning", "full"], "--tuning has no effect without --model"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words) == 2
    assert said in capsys.readouterr().err


def test_a_comparison_is_shown_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"arm": "trl", "checkpointing": "none", "failed": "out of memory"}
    monkeypatch.setattr("finetui.engine.bench.turns.measure", lambda tasks, tell: [DONE, failed])
    monkeypatch.setattr("finetui.engine.bench.turns.facts", lambda command: {**ENGINE, "command": command})
    (tmp_path / "config.json").write_text("{}")
    words = ["bench", "engine", "--model", str(tmp_path), "--seq-len", "64", "--chart", str(tmp_path / "c.svg")]
    assert call(*words) == 1, "one arm failed"
    out = capsys.readouterr().out
    assert "1,200" in out
    assert "±2.0%" in out
    assert "8.2" in out
    assert "out of memory" in out
    assert "1,200 tok/s, 1.5 GiB" in (tmp_path / "c.svg").read_text()
    assert call(*words, "--json") == 1
    assert json.loads(capsys.readouterr().out)["results"][0]["grad_norm"] == [0.5, 0.25]


def test_kernels_are_drawn_beside_each_other() -> None:
    from finetui.tui.bench_view import kernels_chart, print_kernels

    timing = {
        "name": "glu, forward + backward", "ours_ms": 1.0, "ours_range_ms": [0.9, 1.1], "device_ms": 0.9,
        "stock_ms": 2.0, "liger_ms": None, "rate": 4000.0, "unit": "GB/s", "share": 0.94,
    }  # fmt: skip
    verdicts = {"glu": {"ok": True, "why": "", "worst": 0.5}, "rope": {"ok": False, "why": "zero", "worst": 0.0}}
    report = {**ENGINE, "tokens": 64, "copy_gb_per_s": 4200.0, "gemm_tflop_per_s": 700.0,
              "verdicts": verdicts, "timings": [timing]}  # fmt: skip
    svg = kernels_chart(report)
    assert "2.00 ms" in svg
    assert "Liger" not in svg
    print_kernels(report)


def examined() -> Iterator[Check]:
    yield Check("python", "ok", "Python 3.12")
    yield Check("driver", "fail", "it does not answer", "Restart.")


def test_the_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("finetui.engine.doctor.checks.examine", examined)
    assert call("doctor") == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == ["✔ python: Python 3.12", "✘ driver: it does not answer", "    Restart."]
    assert "1 failed" in err
    assert call("doctor", "--json") == 1
    assert [check["status"] for check in json.loads(capsys.readouterr().out)] == ["ok", "fail"]


def test_modules_that_differ_by_their_layer_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = [
        {"path": f"base_model.model.model.layers.{i}.mlp", "kernel": "glu", "replaced": i < 2, "why": "silu"}
        for i in range(3)
    ]
    answer = {"architecture": "A", "tuning": "lora", "device": "a GPU", "layers": 40, "built": 3, "modules": modules}
    monkeypatch.setattr("finetui.engine.doctor.checks.kernels_of", lambda config, tuning: answer)
    assert call("doctor", "--model", "openai-community/gpt2") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "layers" in line]
    assert rows == [
        ["✔", "model.layers.*.mlp", "2", "glu", "silu"],
        ["–", "model.layers.*.mlp", "1", "not", "glu", "silu"],
    ]
