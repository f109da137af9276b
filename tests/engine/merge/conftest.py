"""Small checkpoints of the shape of a Llama, written without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

WORDS, WIDTH, INNER = 24, 16, 20
_ENDINGS = {
    "self_attn.q_proj.weight": (WIDTH, WIDTH), "self_attn.o_proj.weight": (WIDTH, WIDTH),
    "mlp.up_proj.weight": (INNER, WIDTH), "mlp.down_proj.weight": (WIDTH, INNER), "input_layernorm.weight": (WIDTH,),
}  # fmt: skip


def shapes(layers: int = 3, words: int = WORDS, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors."""
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, WIDTH)}
    for layer in range(layers):
        named |= {f"model.layers.{layer}.{ending}": shape for ending, shape in _ENDINGS.items()}
    named["model.norm.weight"] = (WIDTH,)
    return named if tied else named | {"lm_head.weight": (words, WIDTH)}


def tensors(seed: int, dtype: torch.dtype = torch.float32, **shape: Any) -> dict[str, torch.Tensor]:
    """A common base and, unless the seed is 0, small changes of it."""
    start, changes = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    made = {}
    for name, size in shapes(**shape).items():
        made[name] = torch.randn(size, generator=start)
        if seed:
            made[name] += 0.05 * torch.randn(size, generator=changes)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def tokenizer(words: list[str], added: list[str] = []) -> dict[str, Any]:  # noqa: B006 - never changed
    """A tokenizer.json: words from 0, and added ones behind them."""
    entries = [{"id": len(words) + n, "content": word, "special": True} for n, word in enumerate(added)]
    return {"model": {"type": "BPE", "vocab": {word: n for n, word in enumerate(words)}}, "added_tokens": entries}


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint folder: ``write_model("a", seed=1)``."""

    def write(
        name: str,
        seed: int = 0,
        *,
        config: dict[str, Any] | None = None,
        words_file: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        stored: dict[str, torch.Tensor] | None = None,
        shards: int = 1,
        **shape: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        made = stored if stored is not None else tensors(seed, dtype, **shape)
        told = {
            "model_type": "llama", "num_hidden_layers": shape.get("layers", 3), "vocab_size": shape.get("words", WORDS),
            "tie_word_embeddings": shape.get("tied", False), "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(told | (config or {})))
        if words_file is not None:
            (folder / "tokenizer.json").write_text(json.dumps(words_file))
        if shards == 1:
            save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        places = {key: f"model-{1 + n % shards:05d}-of-{shards:05d}.safetensors" for n, key in enumerate(made)}
        for file in set(places.values()):
            save_file({key: made[key] for key in made if places[key] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return folder

    return write
