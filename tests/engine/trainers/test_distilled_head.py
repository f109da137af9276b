"""Both heads in chunks: loss and every gradient are those of whole logits, whatever the head and the chunk."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetui.engine.trainers.distill import Teacher
from finetui.engine.trainers.distilled_head import Head, Lesson, distilled, give_lessons, labelled
from finetui.planner.distillation import Distillation

WANTED = Distillation(teacher="t", weight=0.4, temperature=1.7)
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def model(kind="llama", seed=0, **changes):
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | changes))).double()
    torch.nn.init.normal_(made.get_output_embeddings().weight, std=1.0)
    return made


def batch():
    ids = torch.arange(1, 25).reshape(2, 12) % 32
    return ids, torch.where(ids % 4 == 0, -100, ids)


def naive(student, teacher, wanted=WANTED, items=3.0):
    """Loss over whole logits of the labelled positions; autograd has its gradients."""
    ids, labels = batch()
    kept, heat = labels[:, 1:] >= 0, wanted.temperature
    mine, theirs = student(input_ids=ids).logits[:, :-1][kept], teacher(input_ids=ids).logits[:, :-1][kept].detach()
    words = min(mine.shape[-1], theirs.shape[-1])
    q, p = ((t[:, :words] / heat).log_softmax(-1) for t in (mine, theirs))
    cross = cross_entropy(mine, labels[:, 1:][kept], reduction="sum")
    return (wanted.weight * kl_div(q, p, reduction="sum", log_target=True) + (1 - wanted.weight) * cross) / items


def asked(teacher, fused=True, wanted=WANTED, items=3.0):
    ids, labels = batch()
    rows, words = labelled(labels, int((labels[:, 1:] >= 0).sum()))
    kept = Teacher(teacher)
    items = torch.tensor(items, dtype=torch.float64)
    return ids, Lesson(kept.states({"input_ids": ids}, rows), rows, words, items, kept.head, wanted, fused)


def gradients(made):
    found = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("kind", "changes", "theirs"), [
    ("llama", {}, {}),
    ("qwen3", {"tie_word_embeddings": True}, {"vocab_size": 40}),
    ("granite", {"logits_scaling": 4.0}, {"tie_word_embeddings": True}),
    ("gemma2", {"final_logit_softcapping": 3.0}, {"vocab_size": 30}),
])  # fmt: skip
def test_a_model_is_taught_as_over_whole_logits(kind, changes, theirs, fused):
    student, teacher = model(kind, **changes), model("gemma2" if kind == "gemma2" else "llama", seed=1, **theirs)
    if kind == "gemma2":  # whose norms compute in fp32 in any case
        student, teacher = student.float(), teacher.float()
    near = 1e-6 if kind != "gemma2" else 1e-5
    wanted = naive(student, teacher)
    wanted.backward()
    expected = gradients(student)
    assert give_lessons(student, contextlib.nullcontext()) == ""
    ids, lesson = asked(teacher, fused)
    out = student(input_ids=ids, lesson=lesson)
    (2 * out.loss).backward()
    torch.testing.assert_close(out.loss.detach().double(), wanted.detach().double(), rtol=0, atol=near)
    found = gradients(student)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name] / 2, gradient, rtol=0, atol=near, msg=name)
    assert student(input_ids=ids).logits.shape == (2, 12, 32)  # other calls go where they went


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_nothing(chunk, fused):
    student, teacher = model(), model(seed=1)
    _, lesson = asked(teacher, fused)
    torch.manual_seed(2)
    hidden = torch.randn(lesson.labels.numel(), 16, dtype=torch.float64, requires_grad=True)
    whole = distilled(hidden, Head.of(student), lesson)
    whole.loss.backward()
    expected, hidden.grad = hidden.grad, None
    head = student.get_output_embeddings().weight
    heads, head.grad = head.grad, None
    parts = distilled(hidden, Head.of(student), lesson, chunk_rows=chunk)
    parts.loss.backward()
    for name in ("loss", "divergence", "cross_entropy", "right"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(head.grad, heads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("divergence", "weight"), [("forward-kl", 0.4), ("reverse-kl", 1.0), ("jsd", 0.4)])
def test_scale_and_cap_bend_both_gradients(divergence, weight, fused):
    wanted = Distillation(teacher="t", divergence=divergence, weight=weight, temperature=1.3)
    torch.manual_seed(3)
    mine, theirs = (nn.Linear(16, words, bias=False, dtype=torch.float64) for words in (32, 36))
    hidden = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    states, labels = torch.randn(9, 16, dtype=torch.float64), torch.randint(0, 32, (9,))

    def bent(raw, scale, cap):
        return cap * torch.tanh(raw * scale / cap)

    z, t = bent(mine(hidden), 3.0, 2.0), bent(theirs(states), 2.0, 3.0).detach()
    q, p = (z / 1.3).log_softmax(-1), (t[:, :32] / 1.3).log_softmax(-1)
    m = torch.logsumexp(torch.stack([p, q]), 0) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    sides = {"forward-kl": [(1.0, p, q)], "reverse-kl": [(1.0, q, p)], "jsd": [(0.5, p, m), (0.5, q, m)]}[divergence]
    told = sum(share * kl_div(b, a, reduction="sum", log_target=True) for share, a, b in sides)
    loss = (weight * told + (1 - weight) * cross_entropy(z, labels, reduction="sum")) / 7
    expected = torch.autograd.grad(loss, [hidden, mine.weight])
    head, rows = Head(theirs, 2.0, 3.0), torch.arange(9)
    lesson = Lesson(states, rows, labels, torch.tensor(7.0, dtype=torch.float64), head, wanted, fused)
    out = distilled(hidden, Head(mine, 3.0, 2.0), lesson, chunk_rows=4)
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-12)
    found = torch.autograd.grad(out.loss, [hidden, mine.weight])
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_a_head_with_a_bias_is_taught_too():
    student, teacher = model(), model(seed=1)
    student.lm_head = nn.Linear(16, 32, dtype=torch.float64)
    assert not Head.of(student).plain
    naive(student, teacher).backward()
    expected = gradients(student)
    assert give_lessons(student, contextlib.nullcontext()) == ""
    ids, lesson = asked(teacher)
    student(input_ids=ids, lesson=lesson).loss.backward()
    found = gradients(student)
    assert "lm_head.bias" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_without_labels_gives_zero_gradients(fused):
    student, teacher = model(), model(seed=1)
    assert give_lessons(student, contextlib.nullcontext()) == ""
    ids, _ = batch()
    rows, words = labelled(torch.full_like(ids, -100), 0)
    kept = Teacher(teacher)
    states = kept.states({"input_ids": ids}, rows)
    lesson = Lesson(states, rows, words, torch.tensor(1.0), kept.head, WANTED, fused)
    out = student(input_ids=ids, lesson=lesson)
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(student).values())


def test_labels_are_those_of_the_next_word():
    labels = torch.tensor([[7, -100, 5, 6], [1, 2, -100, -100]])
    rows, words = labelled(labels, 3)
    assert rows.tolist() == [1, 2, 4]
    assert words.tolist() == [5, 6, 2]


def test_a_scale_that_is_not_in_the_config_is_noticed():
    student = model()
    stock = student.forward

    def doubled(**inputs):
        out = stock(**inputs)
        out.logits = out.logits * 2
        return out

    student.forward = doubled
    assert "logits" in give_lessons(student, contextlib.nullcontext())


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor has that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("fused", [True, False])
def test_logits_never_stand_whole(fused):
    """Of 60 rows and 500 words, four rows at a time: the largest tensor is a head's weight, or its gradient."""
    torch.manual_seed(4)
    mine, theirs = nn.Linear(16, 500, bias=False), nn.Linear(16, 500, bias=False)
    hidden, labels = torch.randn(60, 16, requires_grad=True), torch.randint(0, 500, (60,))
    lesson = Lesson(torch.randn(60, 16), torch.arange(60), labels, torch.tensor(60.0), Head(theirs), WANTED, fused)
    with _Largest() as largest:
        distilled(hidden, Head(mine), lesson, chunk_rows=4).loss.backward()
    assert largest.numbers == 16 * 500
