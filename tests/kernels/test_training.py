"""Two hundred steps of training with our kernels end where stock ends, within the noise of seeds, for each tuning.

Small, in fp32 and interpreted, so what it proves is the arithmetic of a whole step many times over: layers, adapters,
NF4 weights, the fused head and its gradient scale. The rotary kernel, which would take most of the interpreter's time
and has tests of its own, is replaced by what it computes. The batches come from a Markov chain, so that there is
something to learn.
"""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from finetui.engine.trainers.head import Wanted, give_token_loss
from finetui.kernels.patch import patch_model

STEPS, LENGTH, VOCABULARY, SEEDS = 200, 4, 24, (0, 1, 2)


def model(tuning: str, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)  # one base model; seeds differ in adapters and data, as they do between runs
    # Whole blocks of 64 in each row: bitsandbytes 0.50 unpacks others wrongly on a CPU.
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(
        **shape, num_key_value_heads=2, head_dim=16, vocab_size=VOCABULARY, attn_implementation="sdpa",
        initializer_range=0.3,  # a frozen head of the usual 0.02 could tell no tokens apart
    )  # fmt: skip
    base: Any = LlamaForCausalLM(config)
    if tuning == "qlora":
        base = packed(base)
    torch.manual_seed(seed)
    if tuning == "full":
        return base
    from peft import LoraConfig, get_peft_model

    base.requires_grad_(False)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def packed(base: Any) -> Any:
    """NF4 weights in all linear layers but the head, as bitsandbytes stores them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for path, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            kind = bitsandbytes.nn.Linear4bit
            new = kind(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            new.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False
            base.set_submodule(path, new.to("cpu"))
    base.is_loaded_in_4bit = True
    return base


def batches(seed: int) -> list[torch.Tensor]:
    """Rows of a Markov chain in which each token has three likely successors."""
    draw = torch.Generator().manual_seed(100)
    after = torch.full((VOCABULARY, VOCABULARY), 0.2)
    after.scatter_(1, torch.randint(0, VOCABULARY, (VOCABULARY, 3), generator=draw), 12.0)
    draw.manual_seed(seed)
    rows = []
    for _ in range(STEPS):
        row = [int(torch.randint(0, VOCABULARY, (1,), generator=draw))]
        while len(row) < LENGTH:
            row.append(int(torch.multinomial(after[row[-1]], 1, generator=draw)))
        rows.append(torch.tensor([row]))
    return rows


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str, *, backward: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What :func:`finetui.kernels.rope.rotate` computes in Llama's layout, without a kernel."""
    assert layout == "half"
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    results = [x * cos - turned(x * sin) if backward else x * cos + turned(x) * sin for x in (q, k)]
    if out is None:
        return results[0], results[1]
    return out[0].copy_(results[0]), out[1].copy_(results[1])


def losses(tuning: str, seed: int, *, ours: bool) -> list[float]:
    trained = model(tuning, seed)
    if ours:
        report = patch_model(trained)
        assert "decoder_layer" in {item.kernel for item in report.replaced}
        assert not report.left, report.summary()
        assert give_token_loss(trained, contextlib.nullcontext()) == ""
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3 if tuning == "full" else 1e-2)
    found = []
    for row in batches(seed):
        if ours:
            wanted = Wanted(torch.tensor(float(LENGTH - 1)), LENGTH - 1)
            loss = trained(input_ids=row, labels=row, token_loss=wanted).loss
        else:
            loss = trained(input_ids=row, labels=row).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def settled(found: list[float]) -> float:
    return statistics.mean(found[-50:])


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_two_hundred_steps_end_where_stock_ends(tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetui.kernels.rope.rotate", rotate)
    stock = {seed: losses(tuning, seed, ours=False) for seed in SEEDS}
    noise = statistics.stdev(settled(found) for found in stock.values())
    for found in stock.values():
        assert settled(found) < 0.93 * statistics.mean(found[:10]), "there is something to learn"
    mine = losses(tuning, SEEDS[0], ours=True)
    assert mine[0] == pytest.approx(stock[SEEDS[0]][0], rel=1e-5)
    assert mine[:10] == pytest.approx(stock[SEEDS[0]][:10], rel=1e-3)
    assert abs(settled(mine) - settled(stock[SEEDS[0]])) < noise
