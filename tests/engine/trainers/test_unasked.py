"""Models that make no masks: layers that know the documents of their rows say the same, and so do those that do not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, masking_utils

from finetui.engine.trainers.unasked import no_masks, plainly_causal, told
from finetui.kernels.attention import Documents
from finetui.kernels.patch import fallbacks, patch_model

IDS = torch.arange(12).reshape(2, 6)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
#: As a batch says it; and as a graph has it, with a bound on lengths and empty documents at the end.
TOLD = Documents((3, 2, 1, 6), torch.tensor([0, 3, 5, 6, 12], dtype=torch.int32))
BOUND = Documents((6, 6), torch.tensor([0, 3, 5, 6, 12, 12, 12], dtype=torch.int32))


@pytest.fixture(scope="module")
def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=32, attn_implementation="sdpa",
    )  # fmt: skip
    base = LlamaForCausalLM(config).requires_grad_(False)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, lora).train()
    assert all(item.replaced for item in patch_model(model, only=["decoder_layer"]).items)
    return model


def loss_and_gradients(model, **more):
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, position_ids=POSITIONS, use_cache=False, **more)
    out.loss.backward()
    return torch.cat([out.loss.detach().view(1), *(p.grad.flatten() for p in model.parameters() if p.requires_grad)])


@pytest.mark.parametrize(("documents", "falls_back"), [(BOUND, False), (TOLD, True)])
def test_rows_of_several_documents(adapted, documents, falls_back):
    expected = loss_and_gradients(adapted)
    listener = None
    if falls_back:
        layer = adapted.get_base_model().model.layers[1]
        listener = layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    with no_masks():
        assert torch.allclose(loss_and_gradients(adapted, documents=documents), expected, atol=1e-5)
        assert not torch.allclose(loss_and_gradients(adapted), expected, atol=1e-3), "nobody told of documents"
    assert [item.why for item in fallbacks(adapted)] == (["something listens to its parts"] if falls_back else [])
    if listener is not None:
        listener.remove()
        patch_model(adapted, only=["decoder_layer"])
    assert torch.allclose(loss_and_gradients(adapted), expected, atol=1e-6), "masks are made again afterwards"


def test_a_mask_of_documents_is_that_of_the_model():
    mask = TOLD.mask(2, 6)
    assert mask.shape == (2, 1, 6, 6)
    assert torch.equal(mask, BOUND.mask(2, 6))
    assert mask[0, 0, 2].tolist() == [True, True, True, False, False, False]
    assert mask[0, 0, 4].tolist() == [False, False, False, True, True, False]
    assert TOLD.mask(2, 6, window=2)[1, 0, 5].tolist() == [False, False, False, False, True, True]


def test_windows_need_their_masks(monkeypatch):
    assert plainly_causal(SimpleNamespace(), 4096)
    assert plainly_causal(SimpleNamespace(sliding_window=4096), 4096)
    assert not plainly_causal(SimpleNamespace(sliding_window=4096), 4097)
    assert not plainly_causal(SimpleNamespace(attention_chunk_size=8), 9)
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    assert not plainly_causal(SimpleNamespace(), 8)


def test_what_needs_masks_besides_documents_is_given_them():
    ids, several = {"input_ids": IDS}, {"input_ids": IDS, "position_ids": POSITIONS}
    assert told(ids, SimpleNamespace()) == (ids, True)
    assert told(several, SimpleNamespace()) == (several, False)
    assert told({**several, "documents": TOLD}, SimpleNamespace(sliding_window=3))[1]
    assert told(ids, SimpleNamespace(attention_chunk_size=3)) == (ids, False)
    windowed, spared = told(ids, SimpleNamespace(sliding_window=3))
    assert (spared, windowed["documents"].lengths, windowed["documents"].starts.tolist()) == (True, (6, 6), [0, 6, 12])


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
@pytest.mark.parametrize("falls_back", [False, True])
def test_rows_longer_than_a_window(family, falls_back):
    torch.manual_seed(0)
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}
    config = AutoConfig.for_model(
        family, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, vocab_size=32, sliding_window=3, pad_token_id=0, **kinds,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()

    def gradients(**inputs):
        model.zero_grad()
        model(**inputs, labels=IDS, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients(input_ids=IDS)
    assert all(item.replaced for item in patch_model(model, only=["decoder_layer"]).items)
    if falls_back:
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    inputs, spared = told({"input_ids": IDS}, config)
    assert spared
    with no_masks():
        assert torch.allclose(gradients(**inputs), expected, atol=1e-5)
        assert not torch.allclose(gradients(input_ids=IDS), expected, atol=1e-3)  # nobody told of the window
    assert len(fallbacks(model)) == falls_back


def test_an_error_within_leaves_transformers_as_it_was():
    stock = masking_utils.find_packed_sequence_indices
    with pytest.raises(ValueError, match="inside"), no_masks():
        raise ValueError("inside")
    assert masking_utils.find_packed_sequence_indices is stock
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is masking_utils.sdpa_mask
