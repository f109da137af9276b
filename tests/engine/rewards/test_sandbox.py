"""Code that nobody trusts is run, judged, and kept from doing anything else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from finetui.engine.rewards.sandbox import Verdict, python_tests, run_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")


def test_tests_are_counted() -> None:
    code = "def double(x):\n    return 2 * x if x < 5 else 0"
    assert run_tests(code, ["assert double(1) == 2", "assert double(6) == 12"]) == Verdict(1, 2, "ended")


def test_programs_read_and_print() -> None:
    code = "n = int(input())\nprint(sum(int(input()) for _ in range(n)))"
    tests = [{"input": "2\n3\n4\n", "output": "7"}, {"input": "1\n5\n", "output": "6\n"}]
    assert run_tests(code, tests) == Verdict(1, 2, "ended")


ESCAPES = {
    "a socket": "import socket\nsocket.socket()",
    "a socket by way of C": "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
    "another process": "import os\nif not os.fork(): os._exit(0)",
    "a program": "import subprocess\nsubprocess.run(['true'])",
    "a thread": "import threading\nthreading.Thread(target=int).start()",
    "a new file": "open({target!r}, 'w').write('x')",
    "a file by way of C": "import ctypes\nassert ctypes.CDLL(None).creat({target!r}.encode(), 0o644) >= 0",
    "a removed file": "import os\nos.remove({victim!r})",
    "a changed file": "open({victim!r}, 'r+').write('x')",
    "a signal": "import os\nos.kill({parent}, 0)",
    "much memory": "x = bytearray(3 * 2**30)",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_nothing_gets_out(escape: str, tmp_path: Path) -> None:
    target, victim = tmp_path / "made", tmp_path / "victim"
    victim.write_text("safe")
    code = ESCAPES[escape].format(target=str(target), victim=str(victim), parent=os.getpid())
    assert run_tests(code, ["pass"]).passed == 0
    assert not target.exists()
    assert victim.read_text() == "safe"


@pytest.mark.parametrize("code", ["while True: pass", "import time\ntime.sleep(60)"])
def test_time_is_limited(code: str) -> None:
    assert run_tests(code, ["pass"], timeout_s=0.5) == Verdict(0, 1, "out of time")


@pytest.mark.parametrize("code", ["import os\nos._exit(0)", "import os\nos.write(1, b'x 1 1')\nos._exit(0)"])
def test_an_early_exit_passes_nothing(code: str) -> None:
    assert run_tests(code, ["pass"]) == Verdict(0, 1, "killed")


def test_an_exit_is_a_failure_and_output_is_no_answer() -> None:
    assert run_tests("print('1 1 1')\nraise SystemExit(0)", ["pass"]).passed == 0


def test_shares_of_completions() -> None:
    completions = ["Sure:\n```python\ndef f(x):\n    return x\n```", "def f(x): return 0", "no code at all", "x"]
    tests = [["assert f(1) == 1", "assert f(0) == 0"], '["assert f(1) == 1", "assert f(0) == 0"]', "assert True", None]
    assert python_tests(completions, tests) == [1.0, 0.5, 0.0, None]
