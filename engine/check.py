"""Check: something looked at before a run or by the doctor, what was found, and what to do about it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

#: The extra ``train`` of pyproject.toml: the first version that is good and, where known, the first that is not.
PACKAGES: dict[str, tuple[str, str | None]] = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", "6"),
    "peft": ("0.21", "1"),
    "trl": ("1.15", "2"),
    "bitsandbytes": ("0.48", "1"),
    "accelerate": ("1.10", "2"),
    "triton": ("3.6", "4"),
    "datasets": ("4.8", "6"),
    "safetensors": ("0.6", "1"),
    "tensorboard": ("2.20", "3"),
    "jinja2": ("3.1.6", "4"),
}


@dataclass(frozen=True)
class Check:
    """What one check found, and what to do about it."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    do: str = ""


def logout(settings: Path = Path("/etc/systemd")) -> list[Check]:
    """Whether systemd-logind ends what a user leaves behind, as some distributions set it up."""
    value = "no"
    for path in (settings / "logind.conf", *sorted((settings / "logind.conf.d").glob("*.conf"))):
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                key, _, given = line.partition("=")
                value = given.strip() if key.strip() == "KillUserProcesses" else value
    if value not in {"yes", "true", "1", "on"} or os.geteuid() == 0:
        return []
    do = "Start finetui with: systemd-run --user --scope finetui (and allow that once: loginctl enable-linger)."
    return [Check("logout", "warn", f"{socket.gethostname()} ends all processes of a user who logs out", do)]


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() else nearest_folder(path.parent)
