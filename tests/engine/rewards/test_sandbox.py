"""Code that nobody trusts is run, judged, and kept from doing anything else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from finetui.engine.rewards.jail import has_landlock
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


#: Each tries something that must not work, and passes the test if it does.
ATTACKS = {
    "limits of the trainer": "import resource, os\nresource.prlimit({parent}, resource.RLIMIT_CPU, (1, 1))",
    "priority of the trainer": "import os\nos.setpriority(os.PRIO_PROCESS, {parent}, 19)",
    "scheduling of the trainer": "import os\nos.sched_setaffinity({parent}, {{0}})",
    "memory of the trainer": "open('/proc/{parent}/mem', 'rb').read(1)",
    "environment of the trainer": "open('/proc/{parent}/environ', 'rb').read(1)",
    "a signal through a pipe": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 8, {parent})",
    "shared memory": "from multiprocessing import shared_memory as s\ns.SharedMemory(create=True, size=9)",
    "a memory file": "import os\nos.memfd_create('x')",
    "a time stamp": "import os\nos.utime({victim!r})",
    "a key ring": "import ctypes\nassert ctypes.CDLL(None).syscall(250, 6, 0, 0) >= 0",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, 0) >= 0",
    "namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "a reboot": "import ctypes\nassert ctypes.CDLL(None).reboot(0x89ABCDEF) == 0",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/mnt', b'tmpfs', 0, None) == 0",
    "a fork by number": "import ctypes\nassert ctypes.CDLL(None).syscall(57) >= 0",
    "the import path": "import sys, os\nopen(os.path.join(sys.prefix, 'pwned.py'), 'w')",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_fail(attack: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("safe")
    code = ATTACKS[attack].format(parent=os.getpid(), victim=str(victim))
    assert run_tests(code, ["pass"], timeout_s=5) in (Verdict(0, 1, "ended"), Verdict(0, 1, "killed"))


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock")
def test_files_of_the_user_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secret")
    for path in (tmp_path / "token", Path("/etc/passwd"), Path("/proc/self/environ")):
        assert run_tests(f"open({str(path)!r}).read()", ["pass"]).passed == 0
    assert run_tests("import os\nos.listdir('/')", ["pass"]).passed == 0
    assert run_tests("import json, decimal, random\nx = json.dumps(str(decimal.Decimal(1)))", ["assert x"]).passed == 1


@pytest.mark.parametrize("descriptor", [1, 2])
def test_endless_output_ends(descriptor: int) -> None:
    code = f"import os\nwhile True: os.write({descriptor}, b'x' * 65536)"
    assert run_tests(code, ["pass"], timeout_s=20) == Verdict(0, 1, "out of time")


def test_what_a_program_should_print_can_not_be_forged() -> None:
    code = (
        "import os\nfor fd in range(3, 30):\n    try:\n        os.set_blocking(fd, False)\n"
        "        token = os.read(fd, 99)\n"
        "    except OSError:\n        continue\n    for out in range(30):\n        try:\n"
        '            os.write(out, token.split()[-1] + b\' {"passed": 9, "printed": ["x"]}\\n\')\n'
        "        except (OSError, IndexError):\n            pass\nos._exit(0)"
    )
    assert run_tests(code, [{"input": "1", "output": "7"}]).passed == 0


def test_libraries_work() -> None:
    code = "import numpy as np, re, datetime, itertools\ndef f(): return int(np.linalg.norm([3.0, 4.0]))"
    assert run_tests(code, ["assert f() == 5"]) == Verdict(1, 1, "ended")
