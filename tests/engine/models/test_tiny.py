"""The tiny model: complete, the same bits every time, never half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetui.engine.models.tiny import ensure_tiny_model, is_tiny, tiny_folder


def test_it_loads_as_any_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ensure_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    assert 2e6 < model.num_parameters() < 5e6
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    text = "Naïve café: 1+1=2,\n\tпривет 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_its_bits_are_fixed_and_the_callers_random_numbers_are_not_touched(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = ensure_tiny_model(tmp_path / "a")
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    two = ensure_tiny_model(tmp_path / "b")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    stamp = (one / "model.safetensors").stat().st_mtime_ns
    assert ensure_tiny_model(tmp_path / "a") == one
    assert (one / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        ensure_tiny_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_is_tiny(tmp_path: Path) -> None:
    assert is_tiny(tiny_folder())
    assert is_tiny(str(tiny_folder()) + "/../tiny")
    assert not is_tiny(tmp_path)
    assert not is_tiny("Qwen/Qwen3-8B")
