"""The inside of the sandbox: a Python process that has given up everything but to compute and to answer.

    python -I -B jail.py SECONDS MEBIBYTES     (a JSON object on stdin; see :func:`main`)

Before it reads a line of foreign code it limits its CPU time, memory and open files, and on Linux gives up, until it
ends: all capabilities; the sight of every file but Python's own and the system's libraries, where the kernel has
Landlock (https://docs.kernel.org/userspace-api/landlock.html); and, by a seccomp filter
(https://docs.kernel.org/userspace-api/seccomp_filter.html), every system call that is not on a short list. That list
holds what a program needs to compute: no sockets, no processes and threads, no signals, priorities or limits of others,
no tracing, and no file opened for writing. This file is run by path and imports nothing of finetui.
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
#: Characters of what a program printed that are told; no test asks for more.
LONGEST_OUTPUT = 1 << 20
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO with EPERM, _KILL_PROCESS
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06  # BPF: ld abs, jeq, jgt, jset, ret
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
#: What may be asked of ioctl (whether a file is a terminal, bytes that wait, close on exec, blocking) and of fcntl
#: (copies and flags of a descriptor): others write into terminals and send signals.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_FCNTLS = (0, 1, 2, 3, 4, 1030)

#: Per machine: its audit architecture; allowed system calls by number; those that open a file, with the argument that
#: holds their flags; ioctl and fcntl (numbers of arch/x86/entry/syscalls/syscall_64.tbl and
#: include/uapi/asm-generic/unistd.h).
_CALLS: dict[str, tuple[int, list[int], dict[int, int], tuple[int, int]]] = {
    "x86_64": (
        0xC000003E,
        [
            0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 32, 33, 34,
            35, 36, 37, 38, 39, 60, 63, 78, 79, 80, 81, 89, 95, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 111, 115,
            118, 120, 121, 124, 127, 128, 130, 131, 137, 138, 140, 143, 145, 146, 147, 149, 150, 158, 186, 201, 202,
            204, 213, 217, 218, 219, 221, 228, 229, 230, 231, 232, 233, 262, 267, 269, 270, 271, 273, 274, 281, 284,
            290, 291, 292, 293, 295, 309, 318, 324, 327, 332, 334, 439,
        ],
        {2: 1, 257: 2},
        (16, 72),
    ),
    "aarch64": (
        0xC00000B7,
        [
            17, 19, 20, 21, 22, 23, 24, 43, 44, 48, 49, 50, 57, 59, 61, 62, 63, 64, 65, 66, 67, 69, 72, 73, 78, 79, 80,
            93, 94, 96, 98, 99, 100, 101, 102, 103, 113, 114, 115, 120, 121, 123, 124, 125, 126, 128, 132, 133, 134,
            135, 136, 137, 139, 141, 148, 150, 153, 155, 156, 158, 160, 163, 165, 166, 168, 169, 172, 173, 174, 175,
            176, 177, 178, 179, 214, 215, 216, 222, 223, 226, 227, 228, 229, 232, 233, 278, 283, 286, 291, 293, 439,
        ],
        {56: 2},
        (29, 25),
    ),
}  # fmt: skip
#: The call that makes a socket.
_SOCKET = {"x86_64": 41, "aarch64": 198}
#: The calls of Landlock, which are the same on every machine, and rights of its first version: all of them, those to
#: read a file, and those to read what is below a folder.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_ALL_RIGHTS, _READ, _READ_BELOW = (1 << 13) - 1, 1 << 2, 1 << 0 | 1 << 2 | 1 << 3
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero",
           "/dev/urandom")  # fmt: skip


def filter_program(machine: str) -> bytes:
    """The filter as BPF instructions: what is allowed, with the arguments that are, and all else refused."""
    arch, allowed, opening, (ioctl, fcntl) = _CALLS[machine]
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),  # the architecture of the call: another one would have other numbers
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_ABOVE, 0, 1, 0x3FFFFFFF),  # the x32 numbers of x86
        (_RETURN, 0, 0, _REFUSE),
    ]
    for number in allowed:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    # Arguments are 64 bits wide and begin at byte 16; what is looked at is in the low half (little-endian).
    for number, argument in opening.items():
        code += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, 16 + 8 * argument),
            (_ANY_BIT, 0, 1, _WRITES),
            (_RETURN, 0, 0, _REFUSE),
            (_RETURN, 0, 0, _ALLOW),
        ]
    for number, commands in ((ioctl, _IOCTLS), (fcntl, _FCNTLS)):
        code += [(_EQUAL, 0, 2 * len(commands) + 2, number), (_LOAD, 0, 0, 16 + 8)]
        for command in commands:
            code += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
        code.append((_RETURN, 0, 0, _REFUSE))
    code.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def has_landlock() -> bool:
    """Whether this kernel can hide files from a process that asks for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return sys.platform == "linux" and libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1) >= 1


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
    libc = ctypes.CDLL(None, use_errno=True)
    # PR_SET_NO_NEW_PRIVS, without which only root may set walls.
    _or_raise(libc.prctl(38, 1, 0, 0, 0))
    # All capabilities: version 3 of the header, of this process, and three empty sets of 64 bits.
    _or_raise(libc.capset(struct.pack("II", 0x20080522, 0), bytes(24)))
    if has_landlock():
        _hide_files(libc)
    _install(libc, filter_program(machine))


def forbid_network() -> None:
    """Refuse this process, and all that it starts, every new socket but pairs, which reach nobody else.

    Raises:
        OSError: the kernel refuses the filter, or none is known for this machine.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _SOCKET:
        raise OSError(f"no filter is known for {sys.platform} on {machine}")
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _CALLS[machine][0]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_ABOVE, 0, 1, 0x3FFFFFFF),
        (_RETURN, 0, 0, _REFUSE),
        (_EQUAL, 1, 0, _SOCKET[machine]),
        (_EQUAL, 0, 1, 425),  # io_uring, which has sockets of its own
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    libc = ctypes.CDLL(None, use_errno=True)
    _or_raise(libc.prctl(38, 1, 0, 0, 0))
    _install(libc, b"".join(struct.pack("HBBI", *instruction) for instruction in code))


def _install(libc: ctypes.CDLL, program: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]

    buffer = ctypes.create_string_buffer(program, len(program))
    wanted = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _or_raise(libc.prctl(22, 2, ctypes.byref(wanted), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _hide_files(libc: ctypes.CDLL) -> None:
    """Leave nothing to be seen but Python, its packages and the system's libraries."""
    rights = struct.pack("Q", _ALL_RIGHTS)
    rules = _or_raise(libc.syscall(_CREATE, rights, ctypes.c_size_t(len(rights)), 0))
    for path in {*_SYSTEM, sys.prefix, sys.base_prefix, sys.exec_prefix, *filter(os.path.isdir, sys.path)}:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # there is none on this machine
            continue
        rule = struct.pack("=Qi", _READ_BELOW if os.path.isdir(path) else _READ, place)
        _or_raise(libc.syscall(_ADD, rules, 1, rule, 0))
        os.close(place)
    _or_raise(libc.syscall(_RESTRICT, rules, 0))
    os.close(rules)


def _or_raise(told: int) -> int:
    if told < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return told


def main() -> int:
    """Run ``{"code", "tests", "inputs"}``; answer ``TOKEN {"passed", "printed"}`` on stdout.

    TOKEN is the line after the object, which stays unread while foreign code runs. A test is source that
    must not raise. For each input the program is run anew with it as its standard input; what it prints is told, or
    null if it failed. Whether that is right is for others to say: what is expected never gets in here.
    """
    put_up_walls(int(sys.argv[1]), int(sys.argv[2]))
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    stream = os.fdopen(os.dup(0), "rb", buffering=0)
    task = json.loads(_line(stream))
    os.dup2(null, 0)
    code, sources = task["code"], task["tests"]
    sys.setrecursionlimit(5000)
    passed = 0
    if sources:
        space: dict[str, Any] = {"__name__": "__main__"}
        if _raises_nothing(code, space):
            passed += sum(_raises_nothing(source, space) for source in sources)
    printed = [_printed(code, given) for given in task["inputs"]]
    told = json.dumps({"passed": passed, "printed": printed})
    token = _line(stream).decode().strip()
    raw = f"{token} {told}\n".encode()
    while raw:
        raw = raw[os.write(answer, raw) :]
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
        return told.getvalue()[:LONGEST_OUTPUT] if ended.code in (None, 0) else None
    except BaseException:
        return None
    finally:
        sys.stdin = before
    return told.getvalue()[:LONGEST_OUTPUT]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(NO_WALLS)
