"""Numbers and names on the command line that nothing can come to: refused at once, in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetui.tui.cli import main

HUGE = "9" * 30


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A config.json of a small model."""
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 320,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan", "MODEL", "--gpus", HUGE], "--gpus"),
        (["plan", "MODEL", "--seq-len", HUGE], "sequence_length"),
        (["plan", "MODEL", "--set", "epochs=.inf"], "epochs"),
        (["plan", "MODEL", "--set", "optimizer.learning_rate=.nan"], "learning_rate"),
        (["run", "MODEL", "--name", "../evil", "--check"], "is not a run name"),
        (["resume", "RUN", "--gpus", HUGE], "--gpus"),
        (["chat", "RUN", "--temperature", "nan"], "--temperature"),
        (["chat", "RUN", "--temperature", "-1"], "--temperature"),
        (["chat", "RUN", "--max-new-tokens", HUGE], "--max-new-tokens"),
        (["eval", "RUN", "--limit", HUGE], "--limit"),
        (["eval", "RUN", "--temperature", "inf"], "--temperature"),
        (["eval", "RUN", "--max-new-tokens", HUGE], "--max-new-tokens"),
        (["merge", "MODEL", "MODEL", "--method", "slerp", "--t", "9"], "t is from 0"),
        (["merge", "MODEL", "MODEL", "--weights", "nan"], "nan is no number"),
    ],
)
def test_it_is_refused_at_once(
    words: list[str], told: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "made"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"state": "stopped", "created": 0}')
    with pytest.raises(SystemExit) as caught:
        main([{"MODEL": model, "RUN": str(run)}.get(word, word) for word in words])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err
