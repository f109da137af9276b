"""The inside of the sandbox: a Python process that has given up everything but to compute and to answer.

    python -I -B jail.py SECONDS MEBIBYTES     (a JSON object on stdin; see :func:`main`)

Before it reads a line of foreign code it limits its CPU time, memory and open files, and on Linux installs a seccomp
filter (https://docs.kernel.org/userspace-api/seccomp_filter.html) that refuses, until it ends: sockets, new processes
and threads, signals to others, tracing, and whatever opens a file for writing or changes the file system. Files that
the user can read stay readable. This file is run by path and imports nothing of finetui.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

#: Exit status of a jail whose walls could not be put up.
NO_WALLS = 97
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO with EPERM, _KILL_PROCESS
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06  # BPF: ld abs, jeq, jgt, jset, ret
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

#: Per machine: its audit architecture, refused system calls by number, and those that open a file with the argument
#: that holds their flags (numbers of arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h).
_CALLS: dict[str, tuple[int, list[int], dict[int, int]]] = {
    "x86_64": (
        0xC000003E,
        [
            41, 42, 43, 44, 46, 49, 50, 53, 56, 57, 58, 59, 62, 76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94,
            101, 129, 133, 155, 161, 165, 166, 200, 234, 258, 259, 260, 263, 264, 265, 266, 268, 272, 280, 288, 297,
            298, 308, 310, 311, 316, 321, 322, 424, 425, 426, 427, 434, 435, 437, 438, 452,
        ],
        {2: 1, 257: 2},
    ),
    "aarch64": (
        0xC00000B7,
        [
            33, 34, 35, 36, 37, 38, 39, 40, 41, 45, 46, 51, 52, 53, 54, 55, 88, 97, 117, 129, 130, 131, 138, 198, 199,
            200, 201, 202, 203, 206, 211, 220, 221, 240, 241, 242, 268, 270, 271, 276, 280, 281, 424, 425, 426, 427,
            434, 435, 437, 438, 452,
        ],
        {56: 2},
    ),
}  # fmt: skip


def filter_program(machine: str) -> bytes:
    """The filter as BPF instructions: refused calls, flags of calls that open files, all else allowed."""
    arch, refused, opening = _CALLS[machine]
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),  # the architecture of the call: another one would have other numbers
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_ABOVE, 0, 1, 0x3FFFFFFF),  # the x32 numbers of x86
        (_RETURN, 0, 0, _REFUSE),
    ]
    for number in refused:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    for number, argument in opening.items():
        # Arguments are 64 bits wide and begin at byte 16; flags are in the low half (little-endian).
        code += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, 16 + 8 * argument),
            (_ANY_BIT, 0, 1, _WRITES),
            (_RETURN, 0, 0, _REFUSE),
            (_RETURN, 0, 0, _ALLOW),
        ]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def put_up_walls(seconds: int, mebibytes: int) -> None:
    """Limit this process for good.

    Raises:
        OSError: the kernel refuses the filter, or this machine has none.
    """
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, mebibytes * 2**20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        # A second more before the kernel kills: the first signal says that time was what ran out.
        resource.setrlimit(kind, (limit, limit + (kind == resource.RLIMIT_CPU)))
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _CALLS:
        raise OSError(f"no filter is known for {sys.platform} on {machine}")
    program = filter_program(machine)
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    wanted = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    # PR_SET_NO_NEW_PRIVS, without which only root may set a filter; then PR_SET_SECCOMP, SECCOMP_MODE_FILTER.
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(wanted), 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> int:
    """Run ``{"code", "tests"}``; answer ``TOKEN PASSED TOTAL`` on stdout, where TOKEN is the line after the object.

    A test is source that must not raise, or ``{"input", "output"}``: the program is then run anew with that standard
    input and must print that. The token stays unread in the pipe while foreign code runs.
    """
    put_up_walls(int(sys.argv[1]), int(sys.argv[2]))
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    stream = os.fdopen(os.dup(0), "rb", buffering=0)
    task = json.loads(_line(stream))
    os.dup2(null, 0)
    code, tests = task["code"], task["tests"]
    sys.setrecursionlimit(5000)
    passed = 0
    programs = [test for test in tests if isinstance(test, dict)]
    sources = [test for test in tests if not isinstance(test, dict)]
    if sources:
        space: dict[str, Any] = {"__name__": "__main__"}
        if _raises_nothing(code, space):
            passed += sum(_raises_nothing(source, space) for source in sources)
    for test in programs:
        printed = _printed(code, str(test["input"]))
        passed += printed is not None and printed.split() == str(test["output"]).split()
    token = _line(stream).decode().strip()
    os.write(answer, f"{token} {passed} {len(tests)}\n".encode())
    os._exit(0)


def _line(stream: Any) -> bytes:
    """One line, byte for byte: nothing behind it may be read yet."""
    line = bytearray()
    while (byte := stream.read(1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def _raises_nothing(source: str, space: dict[str, Any]) -> bool:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(source, "<answer>", "exec"), space)
    except BaseException:  # foreign code may raise anything, SystemExit and MemoryError too
        return False
    return True


def _printed(source: str, given: str) -> str | None:
    told = io.StringIO()
    before, sys.stdin = sys.stdin, io.StringIO(given)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(source, "<answer>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        return told.getvalue() if ended.code in (None, 0) else None
    except BaseException:
        return None
    finally:
        sys.stdin = before
    return told.getvalue()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(NO_WALLS)
