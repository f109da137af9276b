"""Folders for what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetui.engine import folders
from finetui.planner.errors import UserError


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache can't be made; temporary folders lie in the one that is returned."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_without_a_cache_made_weights_lie_in_a_temporary_folder_of_this_user(no_cache: Path) -> None:
    folder = folders.cache_folder()
    assert folder == no_cache / f"finetui-{os.geteuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folders.cache_folder() == folder


def test_without_a_home_too(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert folders.cache_folder() == no_cache / f"finetui-{os.geteuid()}"


@pytest.mark.parametrize("how", ["theirs", "open to all", "a link"])
def test_a_temporary_folder_that_others_can_fill_is_refused(
    how: str, no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = no_cache / f"finetui-{os.geteuid()}"
    if how == "a link":
        (no_cache / "elsewhere").mkdir()
        folder.symlink_to(no_cache / "elsewhere")
    else:
        folder.mkdir()
    if how == "open to all":
        folder.chmod(0o777)
    if how == "theirs":
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
        folder.rename(no_cache / f"finetui-{me + 1}")
    with pytest.raises(UserError, match="XDG_CACHE_HOME") as refused:
        folders.cache_folder()
    assert ("others can write" if how == "open to all" else "belongs to somebody else") in refused.value.what
