"""Code that a model wrote, run against tests in a process of its own with limits (``jail.py`` is its inside)."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...planner.errors import HardwareError
from .answers import code_of
from .jail import NO_WALLS

_JAIL = Path(__file__).with_name("jail.py")
#: Bytes that a jail may say: the outputs of a hundred programs. More is a way to fill this process's memory.
_MOST_OUTPUT = 64 << 20
Ending = Literal["ended", "out of time", "killed"]


@dataclass(frozen=True)
class Verdict:
    """How many tests passed, and how the process ended; one that was stopped has passed none."""

    passed: int
    total: int
    ending: Ending


def run_tests(code: str, tests: Sequence[Any], *, timeout_s: float = 10.0, memory_mib: int = 1024) -> Verdict:
    """Run tests on code that nobody trusts: no network, no processes or threads, no file written, no time to waste.

    What a program prints is compared here, where it can't reach. Sources share an interpreter with the code they test:
    code that sets out to can make them pass, as by objects that equal everything. Prefer input and output for rewards.

    Args:
        code: a Python program.
        tests: sources such as ``assert f(1) == 2``, or ``{"input", "output"}`` of the whole program.
        timeout_s: for all tests together, in seconds of CPU and of the clock.
        memory_mib: address space of the process.

    Raises:
        HardwareError: this system can't wall the process in; the code was not run.
    """
    sources = [test for test in tests if not isinstance(test, dict)]
    programs = [test for test in tests if isinstance(test, dict)]
    token = secrets.token_hex(16)
    task = json.dumps({"code": code, "tests": sources, "inputs": [str(test["input"]) for test in programs]})
    command = [sys.executable, "-I", "-B", str(_JAIL), str(max(1, round(timeout_s))), str(memory_mib)]
    with tempfile.TemporaryDirectory(prefix="finetui-jail-") as folder:
        ending = _carried_out(command, f"{task}\n{token}\n".encode(), timeout_s + 1, folder)
    if ending is None:
        return Verdict(0, len(tests), "out of time")
    status, said, complaint = ending
    if status == NO_WALLS:
        why = complaint.decode(errors="replace").strip().splitlines()[-1:]
        do = "Run on Linux (x86-64 or arm64) in a container that allows seccomp, or use another reward."
        raise HardwareError(f"code can't be run safely here ({''.join(why)})", where="rewards: python-tests", do=do)
    head, _, answer = said.decode(errors="replace").partition(" ")
    if head != token:
        # SIGXCPU, at the limit of CPU time.
        return Verdict(0, len(tests), "out of time" if status == -24 else "killed")
    try:
        told = json.loads(answer)
        passed, outputs = int(told["passed"]), [text if isinstance(text, str) else None for text in told["printed"]]
    except (ValueError, KeyError, TypeError, RecursionError):  # foreign code has written there too
        return Verdict(0, len(tests), "killed")
    right = sum(
        printed is not None and printed.split() == str(test["output"]).split()
        for printed, test in zip(outputs, programs, strict=False)
    )
    return Verdict(min(max(passed, 0), len(sources)) + right, len(tests), "ended")


def _carried_out(command: list[str], given: bytes, timeout_s: float, folder: str) -> tuple[int, bytes, bytes] | None:
    """Exit status and the first bytes of output and complaints; None if time, or room for its output, ran out."""
    with tempfile.TemporaryFile(dir=folder) as stdin:
        stdin.write(given)
        stdin.seek(0)
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            # One thread each for libraries that would start more, which the walls forbid.
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
    said: dict[Any, bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
    deadline = time.monotonic() + timeout_s
    with process, selectors.DefaultSelector() as selector:
        for stream in said:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready or sum(map(len, said.values())) > _MOST_OUTPUT:
                process.kill()
                return None
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                said[key.fileobj] += piece
                if not piece:
                    selector.unregister(key.fileobj)
        try:
            status = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            return None
    return status, bytes(said[process.stdout]), bytes(said[process.stderr])


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
