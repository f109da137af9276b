"""Code that a model wrote, run against tests in a process of its own with limits (``jail.py`` is its inside)."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...planner.errors import HardwareError
from .answers import code_of
from .jail import NO_WALLS

_JAIL = Path(__file__).with_name("jail.py")
Ending = Literal["ended", "out of time", "killed"]


@dataclass(frozen=True)
class Verdict:
    """How many tests passed, and how the process ended; one that was stopped has passed none."""

    passed: int
    total: int
    ending: Ending


def run_tests(code: str, tests: Sequence[Any], *, timeout_s: float = 10.0, memory_mib: int = 1024) -> Verdict:
    """Run tests on code that nobody trusts: no network, no processes or threads, no file written, no time to waste.

    Args:
        code: a Python program.
        tests: sources such as ``assert f(1) == 2``, or ``{"input", "output"}`` of the whole program.
        timeout_s: for all tests together, in seconds of CPU and of the clock.
        memory_mib: address space of the process.

    Raises:
        HardwareError: this system can't wall the process in; the code was not run.
    """
    token = secrets.token_hex(16)
    task = json.dumps({"code": code, "tests": list(tests)})
    command = [sys.executable, "-I", "-B", str(_JAIL), str(max(1, round(timeout_s))), str(memory_mib)]
    with tempfile.TemporaryDirectory(prefix="finetui-jail-") as folder:
        try:
            done = subprocess.run(
                command,
                input=f"{task}\n{token}\n".encode(),
                capture_output=True,
                timeout=timeout_s + 1,
                cwd=folder,
                # One thread each for libraries that would start more, which the walls forbid.
                env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LANG": "C.UTF-8"},
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Verdict(0, len(tests), "out of time")
    if done.returncode == NO_WALLS:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        do = "Run on Linux (x86-64 or arm64) in a container that allows seccomp, or use another reward."
        raise HardwareError(f"code can't be run safely here ({''.join(why)})", where="rewards: python-tests", do=do)
    answer = done.stdout.decode(errors="replace").split()
    if len(answer) == 3 and answer[0] == token:
        return Verdict(int(answer[1]), int(answer[2]), "ended")
    # SIGXCPU, at the limit of CPU time.
    return Verdict(0, len(tests), "out of time" if done.returncode == -24 else "killed")


def python_tests(
    completions: Sequence[str], tests: Sequence[Any], *, timeout_s: float = 10.0, memory_mib: int = 1024, jobs: int = 4
) -> list[float | None]:
    """The share of its tests that each completion's code passes; None for a row without tests.

    The code is the completion's last fenced block. Tests are a list, a JSON text of one, or one source.
    """

    def one(pair: tuple[str, Any]) -> float | None:
        text, given = pair
        wanted = _listed(given)
        if not wanted:
            return None
        verdict = run_tests(code_of(text), wanted, timeout_s=timeout_s, memory_mib=memory_mib)
        return verdict.passed / verdict.total

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(one, zip(completions, tests, strict=True)))


def _listed(tests: Any) -> list[Any]:
    if isinstance(tests, str):
        text = tests.strip()
        if text.startswith("["):
            try:
                return list(json.loads(text))
            except ValueError:
                pass
        return [text] if text else []
    return list(tests) if tests else []
