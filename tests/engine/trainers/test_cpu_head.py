"""Our own per-token log-probabilities are those of TRL's output head."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetui.engine.trainers import cpu_head


@pytest.mark.skipif(cpu_head.needed(torch.device("cpu")), reason="this TRL's own head does not run on the CPU")
@pytest.mark.parametrize(("family", "more"), [("llama", {}), ("gemma2", {"final_logit_softcapping": 5.0})])
def test_the_same_scores_and_gradients(family: str, more: dict[str, float]) -> None:
    from trl.trainer.utils import add_fused_lm_head

    config = AutoConfig.for_model(
        family, vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 7))
    labels = ids.masked_fill(torch.rand(2, 7) < 0.3, -100)
    told = []
    for ours in (True, False):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        if ours:
            cpu_head.give_word_scores(model, temperature=0.7)
        else:
            add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        out = model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True)
        (out.log_probs.sum() + out.entropy.sum()).backward()
        told.append((out, model.get_input_embeddings().weight.grad))
        assert model(input_ids=ids).logits.shape == (2, 7, 50)
    (ours_out, ours_grad), (their_out, their_grad) = told
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(ours_out, name), getattr(their_out, name).float())
    assert torch.equal(ours_out.is_top1.bool(), their_out.is_top1.bool())
    torch.testing.assert_close(ours_grad, their_grad)
