"""Kernels in rounds: shares of the right ceiling, and a version that can't run is a gap, not an end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

from finetui.engine.bench import kernels
from finetui.engine.bench.kernel_cases import Case
from finetui.kernels.selfcheck import Verdict


def check() -> Iterator[tuple[str, Verdict]]:
    yield "right", Verdict(True, worst=0.9)
    yield "wrong", Verdict(False, "gradient 0 is zero")


def broken() -> Iterator[tuple[str, Verdict]]:
    raise RuntimeError("no compiler")
    yield


def cases(tokens: int) -> Iterator[Case]:
    def absent() -> None:
        raise ImportError("no such kernel")

    yield Case("copies", lambda: 2.0, lambda: 4.0, absent, bytes=1e9 * tokens)
    yield Case("multiplies", lambda: 1.0, flops=1e12, graph=False)
    yield Case("cannot run", absent, lambda: 1.0, bytes=1.0)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    told: list[str] = []
    monkeypatch.setattr(kernels, "do_bench", lambda function, **_: function())  # a function tells its milliseconds
    monkeypatch.setattr(kernels, "device_ms", lambda function: function() / 2)
    monkeypatch.setattr(kernels, "copy_ms", lambda moved: moved / 2e9)
    monkeypatch.setattr(kernels, "ceilings", lambda: (1e12, 2e15))
    monkeypatch.setattr(kernels, "CHECKS", {"a": check, "b": broken})
    monkeypatch.setattr(kernels, "TIMES", {"a": cases, "b": lambda _: iter(())})
    found = kernels.run(["a", "b"], 1, told.append)
    assert any("copies, liger: ImportError" in line for line in told)
    return found


def test_rates_and_shares(report: dict[str, Any]) -> None:
    copies, multiplies = report["timings"]
    assert (copies["ours_ms"], copies["stock_ms"], copies["liger_ms"]) == (2.0, 4.0, None)
    assert copies["device_ms"] == 1.0
    assert (copies["copy_ms"], multiplies["copy_ms"]) == (0.5, None)
    assert (copies["rate"], copies["unit"], copies["share"]) == (pytest.approx(1000), "GB/s", pytest.approx(1.0))
    assert (multiplies["rate"], multiplies["unit"], multiplies["share"]) == (
        pytest.approx(1000), "TFLOP/s", pytest.approx(0.5)
    )  # fmt: skip


def test_verdicts_name_what_is_wrong(report: dict[str, Any]) -> None:
    assert {name: verdict["ok"] for name, verdict in report["verdicts"].items()} == {
        "right": True, "wrong": False, "b": False
    }  # fmt: skip
    assert report["verdicts"]["b"]["why"] == "RuntimeError: no compiler"


def test_the_table_and_the_chart_hold_it(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from finetui.tui.bench_view import kernels_chart, print_kernels

    print_kernels(report)
    out = capsys.readouterr().out
    assert "WRONG: gradient 0 is zero" in out
    assert "copies" in out
    assert "0.500" in out
    assert "2.00 ms" in kernels_chart(report)


def test_reads_between_calls_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def bench(function: Any, **_: Any) -> float:
        before = len(calls)
        function()
        return 0.75 if len(calls) > before else 0.25

    monkeypatch.setattr(kernels, "do_bench_cudagraph", bench)
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "_READ_BYTES", 2**16)
    assert kernels.device_ms(lambda: calls.append(1)) == 0.5
