"""Divergences of rows and their gradients, against formulas in float64, autograd, and TRL."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from finetui.engine.trainers.distilled_rows import distilled_rows
from finetui.planner.distillation import Distillation

DIVERGENCES = [("forward-kl", "auto"), ("reverse-kl", "auto"), ("jsd", "auto"), ("jsd", 0.1), ("jsd", 0.9)]


def naive(student, teacher, labels, wanted):
    """Divergence and cross-entropy of each row by the definitions, from probabilities; autograd makes the gradient."""
    words = min(student.shape[-1], teacher.shape[-1])
    q = (student[:, :words] / wanted.temperature).softmax(-1)
    p = (teacher[:, :words] / wanted.temperature).softmax(-1)
    m = wanted.share * p + (1 - wanted.share) * q

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    told = {
        "forward-kl": lambda: kl(p, q),
        "reverse-kl": lambda: kl(q, p),
        "jsd": lambda: wanted.share * kl(p, m) + (1 - wanted.share) * kl(q, m),
    }[wanted.divergence]()
    return told, cross_entropy(student, labels, reduction="none")


def rows(mine=41, theirs=41, dtype=torch.float64, count=7):
    torch.manual_seed(0)
    labels = torch.randint(0, mine, (count,))
    return 3 * torch.randn(count, mine, dtype=dtype), 3 * torch.randn(count, theirs, dtype=dtype), labels


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("mine", "theirs"), [(41, 41), (41, 48), (48, 41)])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_loss_and_gradient_are_those_of_the_formula(divergence, beta, mine, theirs, temperature, weight):
    wanted = Distillation(teacher="t", divergence=divergence, beta=beta, temperature=temperature, weight=weight)
    student, teacher, labels = rows(mine, theirs)
    leaf = student.clone().requires_grad_()
    told, cross = naive(leaf, teacher, labels, wanted)
    (weight * told + (1 - weight) * cross).sum().backward()
    found = distilled_rows(student.clone(), teacher.clone(), labels, wanted, gradient=True)
    torch.testing.assert_close(found.divergence, told.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.cross_entropy, cross.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.gradient, leaf.grad, rtol=0, atol=1e-12)
    assert found.right.tolist() == (student.argmax(-1) == labels).tolist()


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_in_single_precision_they_are_as_near_as_that_allows(divergence, beta):
    wanted = Distillation(teacher="t", divergence=divergence, beta=beta, temperature=1.5)
    student, teacher, labels = rows()
    exact = distilled_rows(student.clone(), teacher.clone(), labels, wanted, gradient=True)
    found = distilled_rows(student.float(), teacher.float(), labels, wanted, gradient=True)
    torch.testing.assert_close(found.divergence.double(), exact.divergence, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.gradient.double(), exact.gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("divergence", "beta", "theirs"), [
    ("forward-kl", "auto", 0.0), ("reverse-kl", "auto", 1.0), ("jsd", 0.5, 0.5), ("jsd", 0.2, 0.2),
])  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_divergences_are_those_of_trl(divergence, beta, theirs, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    wanted = Distillation(teacher="t", divergence=divergence, beta=beta, temperature=temperature)
    student, teacher, labels = rows(dtype=torch.float32)
    labels[2] = -100
    loss = gkd.generalized_jsd_loss(
        student[None], teacher[None], labels=labels[None], beta=theirs, temperature=temperature
    )
    kept = labels >= 0
    found = distilled_rows(student[kept], teacher[kept], labels[kept], wanted, gradient=False)
    assert found.divergence.mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_teacher_that_says_the_same_teaches_nothing_more():
    student, _, labels = rows()
    for divergence, beta in DIVERGENCES:
        wanted = Distillation(teacher="t", divergence=divergence, beta=beta, weight=1.0)
        found = distilled_rows(student.clone(), student.clone(), labels, wanted, gradient=True)
        assert found.divergence.abs().max() < 1e-12
        assert found.gradient.abs().max() < 1e-12
