"""What is read from a model's config before any library that knows models is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from finetui.engine.models.load import already_quantised, head_size


@pytest.mark.parametrize(
    ("config", "size", "quantised"),
    [
        ({"head_dim": 96, "hidden_size": 1024, "num_attention_heads": 8}, 96, False),
        ({"head_dim": None, "hidden_size": 1024, "num_attention_heads": 8}, 128, False),
        ({"text_config": {"hidden_size": 512, "num_attention_heads": 8}, "quantization_config": {}}, 64, True),
        ({"text_config": {"head_dim": 32, "quantization_config": {"quant_method": "torchao"}}}, 32, True),
        ({"n_embd": 768}, None, False),
        ({"hidden_size": 1024, "num_attention_heads": 0}, None, False),
        ([], None, False),
    ],
)
def test_heads_and_quantisation(tmp_path: Path, config: Any, size: int | None, quantised: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (head_size(tmp_path), already_quantised(tmp_path)) == (size, quantised)


def test_a_config_that_cannot_be_read_is_left_to_who_loads_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert (head_size(tmp_path), already_quantised(tmp_path)) == (None, False)
