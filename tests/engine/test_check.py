"""What preflight and the doctor look at alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetui.engine.check import logout


def test_a_machine_that_ends_what_a_user_leaves_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert logout(tmp_path) == []
    (tmp_path / "logind.conf").write_text("[Login]\n#KillUserProcesses=no\nKillUserProcesses=yes\n")
    assert logout(tmp_path)[0].status == "warn"
    (tmp_path / "logind.conf.d").mkdir()
    (tmp_path / "logind.conf.d" / "10.conf").write_text("KillUserProcesses=no\n")
    assert logout(tmp_path) == []
