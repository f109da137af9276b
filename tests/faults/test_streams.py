"""The command line where its standard streams are closed, full or gone, and where a name can be no file's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.tui.cli import main

from .harness import environment

COMMAND = [sys.executable, "-P", "-m", "finetui"]


def closed(*numbers: int) -> Callable[[], None]:
    """Closes streams in the child before it begins."""
    return lambda: [os.close(number) for number in numbers] and None


@pytest.mark.parametrize("words", [["--version"], ["gpus"], ["gpus", "--json"]])
def test_a_full_disk_behind_standard_output_is_one_sentence(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "standard output: No space left on device" in done.stderr


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_change_nothing(numbers: tuple[int, ...]) -> None:
    done = subprocess.run(
        [*COMMAND, "gpus"], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(), check=False,
        preexec_fn=closed(*numbers),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert ("H100" in done.stdout) is (1 not in numbers)


def test_a_folder_of_runs_that_is_a_link_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    monkeypatch.setenv("FINETUI_RUNS", str(loop))
    with pytest.raises(SystemExit) as caught:
        main(["runs"])
    assert caught.value.code == 2
    assert str(loop) in capsys.readouterr().err


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    probe = (
        "import os; from finetui.tui.outlet import open_streams; open_streams();"
        f"print(open({str(tmp_path / 'file')!r}, 'w').fileno(), file=open({str(tmp_path / 'answer')!r}, 'w'));"
        "os.write(1, b'talk of a library')"
    )
    command = [sys.executable, "-P", "-c", probe]
    assert subprocess.run(command, env=environment(), check=False, preexec_fn=closed(0, 1, 2)).returncode == 0
    assert int((tmp_path / "answer").read_text()) > 2
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "words", [["plan", "NAME"], ["logs", "NAME"], ["fit", "NAME"], ["data", "m", "--data", "NAME"]]
)
def test_a_name_that_no_file_can_have(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["x" * 5000 if word == "NAME" else word for word in words])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "File name too long" in told
    assert len(told) < 400
