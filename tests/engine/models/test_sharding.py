"""A model that is split over ranks: how rows are cut, what stands in for weights, and kernels over gathered weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import finetui  # noqa: E402
from finetui.engine.models import sharding  # noqa: E402
from finetui.engine.models.sharding import load_whole, rows_of, twin_of  # noqa: E402
from finetui.engine.models.stand_in import stood_in  # noqa: E402
from finetui.planner.errors import ModelError  # noqa: E402
from finetui.planner.plan import Plan  # noqa: E402


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rows_are_cut_as_torch_cuts_them(rows: int, world: int) -> None:
    whole = torch.arange(rows)
    expected = [*whole.chunk(world), *[whole[:0]] * world][:world]
    assert [whole[rows_of(rows, rank, world)].tolist() for rank in range(world)] == [t.tolist() for t in expected]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(3.0))


def test_a_twin_has_all_but_memory() -> None:
    model = Tied()
    model.norm.requires_grad_(False)
    twin = twin_of(model)
    assert all(p.is_meta for p in twin.parameters())
    assert [(n, p.shape, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert twin.head.weight is twin.embedding.weight
    assert torch.equal(twin.table, model.table)
    assert not any(p.is_meta for p in model.parameters())


def test_what_stands_in_has_the_weights_place_and_none_of_their_values() -> None:
    model = Tied()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    with stood_in(model, torch.device("cpu"), torch.bfloat16):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.head.weight is model.embedding.weight
        assert model.norm.weight is not model.norm.bias
        assert model.norm.weight.data_ptr() == model.norm.bias.data_ptr()  # of one shape: one memory
        assert not torch.equal(model.head.weight.float(), values["embedding.weight"])
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in before.items())


class Words(nn.Module):
    def __init__(self, *, tied: bool, trained: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.requires_grad_(trained)
        if tied:
            self.head.weight = self.table.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize(("tied", "trained"), [(False, False), (True, False), (False, True)])
def test_an_embedding_is_gathered_alone_where_its_look_up_is_all_it_does(tied: bool, trained: bool) -> None:
    model = Words(tied=tied, trained=trained)
    assert sharding._table_alone(model) is (None if tied or trained else model.table)


def test_weights_that_layers_share_are_not_split() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    sharding._require_own(Words(tied=False, trained=False), layers)
    layers[1].weight = layers[0].weight
    with pytest.raises(ModelError, match="several layers share") as refused:
        sharding._require_own(Words(tied=False, trained=False), layers)
    assert refused.value.do


def test_a_rank_without_the_checkpoint_answers_as_the_one_that_read_it(
    model_folder: Callable[[str], Path], make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    told_there = {"eos_token_id": [2, 7], "repetition_penalty": 1.5, "max_length": 33}
    (folder / "generation_config.json").write_text(json.dumps(told_there))
    resolved, sent = make_plan(precision="fp32").resolved, list[Any]()

    def broadcast(told: list[Any], src: int) -> None:
        if sent:
            told[:] = sent
        else:
            sent.extend(told)

    monkeypatch.setattr(sharding.dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(sharding.dist, "get_rank", lambda: 0)
    first = load_whole(folder, resolved, print)
    monkeypatch.setattr(sharding.dist, "get_rank", lambda: 1)
    other = load_whole(folder, resolved, print)
    assert all(p.is_meta for p in other.parameters())
    assert other.generation_config.eos_token_id == [2, 7]
    assert other.generation_config.to_dict() == first.generation_config.to_dict()


def wider(folder: Path, target: Path) -> Path:
    """Rows of whole blocks of 64: those of others are read wrongly by bitsandbytes (0.50) on a CPU, not by ours; and
    more layers than are whole at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), intermediate_size=128, num_hidden_layers=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target


@pytest.mark.slow
def test_layers_of_ours_have_the_gradients_of_the_whole_model(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    script, folder = Path(__file__).with_name("split_ranks.py"), wider(model_folder("llama"), tmp_path / "model")
    path = os.pathsep.join([str(Path(finetui.__file__).parent.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    environment |= {"FINETUI_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", str(script), str(folder), str(tmp_path / "meeting"), str(rank)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=500) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], [err[-2500:] for _, err in told]
    apart = json.loads(told[0][0].strip().splitlines()[-1])
    assert apart.keys() == {"lora fp32", "qlora fp32", "qlora bf16-mixed", "full fp32", "full bf16-mixed"}
    assert apart["lora fp32"] < 1e-6
    assert apart["qlora fp32"] < 1e-6
    assert apart["full fp32"] < 1e-6
    assert apart["qlora bf16-mixed"] < 0.04
    assert apart["full bf16-mixed"] < 0.02  # the gradients that are summed are of 8 bits
