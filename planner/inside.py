"""Paths that others chose (a model's index, a manifest, an entry of a folder) stay inside the folder they belong to."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import UserError


def local_path(text: str, *, error: type[UserError] = UserError, where: str = "") -> Path:
    """What somebody wrote as a path, with ``~`` replaced; whether anything is there can be asked of it.

    Raises:
        UserError: no file of any system can have this name, or ``~`` names nobody.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as reason:
        why = getattr(reason, "strerror", None) or str(reason).rstrip(".")
        raise error(f"{text[:60]!r} can't be a path ({why})", where=where, do="Check it.") from None
    return path


def inside(folder: Path, name: str, *, error: type[UserError] = UserError, where: str = "") -> Path:
    """The file ``name`` of a folder.

    A link may lead out of the folder of a model on the Hub only into the blobs that belong to it, which is how
    huggingface_hub keeps its cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).

    Args:
        folder: the root.
        name: a relative path, from a file that nobody checked.
        error: what is raised.
        where: the file that holds the name, for the message; the folder by default.

    Raises:
        UserError: the name is absolute, climbs out by ``..``, or is a link to somewhere else.
    """
    where = where or str(folder)
    windows = PureWindowsPath(name)
    parts = PurePosixPath(name).parts
    bad = not parts or "\0" in name or "\\" in name or ".." in parts or name.startswith("/") or windows.drive
    if bad or not isinstance(name, str):
        do = "Do not use this file unless you know who made it; fetch it again from its source."
        raise error(f"it names {name!r}, which does not lie in its own folder", where=where, do=do)
    path = folder / name
    if leaves(folder, path):
        do = "Put the file itself there, or name its own folder in the recipe."
        aim = _aim(path)
        what = f"is a link to {aim}, outside of its folder" if aim else "is a link that leads back to itself"
        raise error(f"{name} {what}", where=where, do=do)
    return path


def leaves(folder: Path, path: Path) -> bool:
    """Whether what a path of a folder really is lies somewhere else."""
    real = _aim(path)
    return real is None or not any(real.is_relative_to(root) for root in _roots(folder))


def _aim(path: Path) -> Path | None:
    """What a path really is; None of links that lead to each other."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # the latter before Python 3.13
        return None


def _roots(folder: Path) -> list[Path]:
    root = folder.resolve()
    snapshots = root.parent
    return [root, snapshots.parent / "blobs"] if snapshots.name == "snapshots" else [root]
