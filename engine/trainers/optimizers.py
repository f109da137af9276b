"""The optimisers of a recipe that neither torch nor transformers has in this form, and what the others are told.

Each follows its paper: Lion (arXiv:2302.06675), Muon for matrices beside AdamW for the rest (arXiv:2502.16982), GaLore
(arXiv:2403.03507), APOLLO (arXiv:2412.05270), schedule-free AdamW (arXiv:2405.15682); ADOPT and CAME are in
:mod:`.adopt`. LoRA+ (arXiv:2402.12354) is a rate of its own for the B matrices under any of them. States are fp32
whatever is trained, but for Lion's and Muon's single one, which has the format of the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...planner.plan import Resolved
from .adopt import Adopt, Came
from .decoupled import Decoupled

Group = dict[str, Any]
#: Optimisers of our own; the names on the left of a recipe.
OWN = frozenset({"sgd", "lion", "muon", "galore", "apollo", "apollo-mini", "schedule-free", "adopt", "came"})


def optimizer_for(
    model: Any, resolved: Resolved, groups: list[Group], stock: Any, named: Iterable[tuple[str, Tensor]]
) -> tuple[Any, dict[str, Any]] | None:
    """Class and arguments of the plan's optimiser, in the form that a trainer takes; None if its own serves.

    Args:
        groups: trained parameters with their weight decay, as the trainer would group them.
        stock: gives the trainer's own class and arguments for the plan's settings.
        named: what is in the groups, by name.
    """
    options, ratio = resolved.updates, resolved.options.lora_plus_ratio
    name, rate = resolved.optimizer, resolved.learning_rate
    if name not in OWN and ratio == 1.0:
        return None
    if ratio > 1.0:
        groups = with_faster_b(named, groups, rate, ratio)
    if name not in OWN:
        kind, given = stock()
        return kind, {**given, "params": groups}
    betas = options.betas or {"lion": (0.9, 0.99), "adopt": (0.9, 0.9999)}.get(name, (0.9, 0.999))
    given = {"params": groups, "lr": rate}
    if name == "sgd":
        return torch.optim.SGD, {**given, "momentum": options.momentum}
    if name == "lion":
        return Lion, {**given, "betas": betas}
    if name == "schedule-free":
        return ScheduleFree, {**given, "betas": betas, "eps": options.epsilon}
    if name == "came":
        return Came, {**given, "betas": betas}
    if name == "adopt":
        return Adopt, {**given, "betas": betas}
    matrices = inner_matrices(model)
    if name == "muon":
        momentum = options.momentum or 0.95
        return Muon, {**given, "matrices": matrices, "momentum": momentum, "betas": betas, "eps": options.epsilon}
    scale = options.projection_scale or {"galore": 0.25, "apollo": 1.0, "apollo-mini": math.sqrt(128)}[name]
    return LowRankAdamW, {
        **given,
        "matrices": matrices,
        "method": name,
        "rank": 1 if name == "apollo-mini" else options.projection_rank or 128,
        "every": options.projection_every,
        "scale": scale,
        "betas": betas,
        "eps": options.epsilon,
        "seed": resolved.seed,
    }


def inner_matrices(model: Any) -> set[int]:
    """The ids of the matrices that are neither embeddings nor the output head."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    outside = {id(p) for module in ends if module is not None for p in module.parameters()}
    outside |= {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return {id(p) for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in outside}


def with_faster_b(named: Iterable[tuple[str, Tensor]], groups: list[Group], rate: float, ratio: float) -> list[Group]:
    """Groups in which the B matrices of LoRA have ``ratio`` times the rate."""
    fast = {id(p) for name, p in named if "lora_B" in name}
    split: list[Group] = []
    for group in groups:
        split.append({**group, "params": [p for p in group["params"] if id(p) not in fast]})
        split.append({**group, "params": [p for p in group["params"] if id(p) in fast], "lr": rate * ratio})
    return [group for group in split if group["params"]]


def stock_settings(resolved: Resolved) -> dict[str, Any]:
    """Arguments of transformers' own optimisers."""
    options = resolved.updates
    betas = options.betas or ((0.9, 0.99) if "lion" in resolved.optimizer else (0.9, 0.999))
    return {"adam_beta1": betas[0], "adam_beta2": betas[1], "adam_epsilon": options.epsilon}


def schedule_settings(resolved: Resolved, steps: int) -> dict[str, Any]:
    """Which of transformers' schedules the plan's is, and its arguments."""
    options, shape = resolved.updates, resolved.schedule
    low = options.min_rate
    if shape == "cosine":
        name, more = ("cosine_with_min_lr", {"min_lr_rate": low}) if low else ("cosine", {})
    elif shape == "linear":
        name, more = "linear", {}
        if low:
            name, more = "polynomial", {"power": 1.0, "lr_end": low * resolved.learning_rate}
    elif shape == "wsd":
        # 1 - sqrt falls best (arXiv:2405.18392, section 4).
        falling = max(1, round(options.decay_ratio * steps))
        name, more = "warmup_stable_decay", {"num_decay_steps": falling, "min_lr_ratio": low, "decay_type": "1-sqrt"}
    elif shape == "cosine-restarts":
        name, more = "cosine_with_restarts", {"num_cycles": options.cycles}
    else:
        name, more = {"constant": "constant_with_warmup", "inverse-sqrt": "inverse_sqrt"}[shape], {}
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": more or None}


class Lion(Decoupled):
    """The sign of a mean of gradients: one state, and steps of the same size everywhere."""

    def move(self, p: Any, b1: float, b2: float, rate: float, keep: float) -> None:
        mean = _state(self, p, "mean", lambda: torch.zeros_like(p))
        direction = torch.lerp(p.grad, mean, b1).sign_()
        p.mul_(keep).sub_(direction, alpha=rate)
        mean.lerp_(p.grad, 1 - b2)


class Together(Optimizer):
    """Several optimisers as one: their groups side by side."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class Muon(Together):
    """Orthogonalised momentum for matrices, scaled to AdamW's usual step so that one rate serves both."""

    def __init__(
        self,
        params: list[Group],
        lr: float,
        matrices: set[int],
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        inside, rest = _split(params, matrices)
        parts: list[Optimizer] = []
        if inside:
            parts.append(torch.optim.Muon(inside, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if rest:
            parts.append(torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps))
        super().__init__(*parts)


class LowRankAdamW(Optimizer):
    """AdamW whose moments of a matrix live in a space of ``rank`` directions of its shorter side.

    GaLore takes the gradient's main directions and maps AdamW's step back from there. APOLLO takes random ones, drawn
    again from a seed, and only learns from AdamW's step how much larger or smaller than the gradient each column
    (``apollo-mini``: the whole matrix) should be. Its updates may grow by 1% from step to step (Fira's limiter).
    """

    def __init__(
        self, params: list[Group], lr: float, matrices: set[int], method: str, rank: int, every: int, scale: float,
        betas: tuple[float, float], eps: float, seed: int,
    ) -> None:  # fmt: skip
        inside, rest = _split(params, matrices)
        groups = [{**g, "projected": True} for g in inside] + [{**g, "projected": False} for g in rest]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.method, self.rank, self.every, self.scale, self.seed = method, rank, every, scale, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        number = 0
        for group in self.param_groups:
            for p in _with_gradient(group):
                number += 1
                gradient = p.grad.float()
                if group["projected"]:
                    update = self._projected(p, gradient, group, self.seed * 100_003 + number)
                else:
                    update = self._adam(p, gradient, group)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"])

    def _adam(self, p: Tensor, gradient: Tensor, group: Group) -> Tensor:
        state, (b1, b2) = self.state[p], group["betas"]
        if "mean" not in state:
            state["step"], state["mean"] = 0, torch.zeros_like(gradient)
            state["square"] = torch.zeros_like(gradient)
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - b1)
        state["square"].lerp_(gradient.square(), 1 - b2)
        root = (state["square"] / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
        return (state["mean"] / (1 - b1 ** state["step"])).div_(root)

    def _projected(self, p: Tensor, gradient: Tensor, group: Group, seed: int) -> Tensor:
        wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T  # [short, long]
        steps = self.state[p].get("step", 0)
        space = self._space(p, wide, steps, seed)  # [short, rank]
        low = space.T @ wide
        normed = self._adam(p, low, group)
        if self.method == "galore":
            update = self.scale * (space @ normed)
        else:
            along = None if self.method == "apollo-mini" else 0
            factor = _norm(normed, along) / (_norm(low, along) + 1e-8)
            update = self._limited(p, self.scale * wide * factor)
        return update if wide is gradient else update.T

    def _space(self, p: Tensor, wide: Tensor, steps: int, seed: int) -> Tensor:
        rank = min(self.rank, wide.shape[0])
        if self.method == "galore":
            if steps % self.every == 0:
                self.state[p]["space"] = torch.linalg.svd(wide, full_matrices=False).U[:, :rank].contiguous()
            space: Tensor = self.state[p]["space"]
            return space
        generator = torch.Generator().manual_seed(seed + 7919 * (steps // self.every))
        return (torch.randn(wide.shape[0], rank, generator=generator) / math.sqrt(rank)).to(wide.device)

    def _limited(self, p: Tensor, update: Tensor, growth: float = 1.01) -> Tensor:
        norm, before = update.norm(), self.state[p].get("norm")
        if before is not None:
            update = update * (growth * before / norm.clamp_min(1e-12)).clamp(max=1.0)
            norm = torch.minimum(norm, growth * before)
        self.state[p]["norm"] = norm
        return update


class ScheduleFree(Optimizer):
    """AdamW at a constant rate, whose weights are good at any time because they are averaged as it goes.

    Gradients are taken at y, between z, where plain AdamW would be, and x, the mean of all z weighted by the square
    of their rates. Parameters hold y while training and x between :meth:`eval` and :meth:`train`.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "weights": 0.0})
        self.training = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        assert self.training, "the weights are the average now"
        for group in self.param_groups:
            (b1, b2), rate = group["betas"], group["lr"]
            weight = rate * rate
            group["weights"] += weight
            share = weight / group["weights"] if group["weights"] else 0.0
            for p in _with_gradient(group):
                state = self.state[p]
                if not state:
                    state["step"], state["z"] = 0, p.detach().float().clone()
                    state["square"] = torch.zeros_like(state["z"])
                state["step"] += 1
                gradient = p.grad.float()
                state["square"].lerp_(gradient.square(), 1 - b2)
                root = (state["square"] / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
                step = gradient.div_(root).add_(p.float(), alpha=group["weight_decay"])
                y = p.float().lerp_(state["z"], share).add_(step, alpha=rate * (b1 * (1 - share) - 1))
                p.copy_(y)
                state["z"].sub_(step, alpha=rate)

    def eval(self) -> None:
        """Let the parameters be x, the average."""
        self._move(False, lambda b1: 1 - 1 / b1)

    def train(self) -> None:
        """Let the parameters be y again."""
        self._move(True, lambda b1: 1 - b1)

    @torch.no_grad()
    def _move(self, training: bool, towards_z: Any) -> None:
        if self.training is training:
            return
        self.training = training
        for group in self.param_groups:
            for p in group["params"]:
                if self.state.get(p):
                    p.copy_(p.float().lerp_(self.state[p]["z"], towards_z(group["betas"][0])))


@contextlib.contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """With a schedule-free optimiser, the weights to measure, sample and keep; with any other, nothing."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, ScheduleFree) or not inner.training:
        yield
        return
    inner.eval()
    try:
        yield
    finally:
        inner.train()


def _with_gradient(group: Group) -> Iterator[Any]:
    return (p for p in group["params"] if p.grad is not None)


def _state(optimizer: Optimizer, p: Tensor, name: str, make: Any) -> Tensor:
    state = optimizer.state[p]
    if name not in state:
        state[name] = make()
    found: Tensor = state[name]
    return found


def _split(groups: list[Group], matrices: set[int]) -> tuple[list[Group], list[Group]]:
    """Groups of the matrices, and of all else."""
    inside = [{**g, "params": [p for p in g["params"] if id(p) in matrices]} for g in groups]
    rest = [{**g, "params": [p for p in g["params"] if id(p) not in matrices]} for g in groups]
    return [g for g in inside if g["params"]], [g for g in rest if g["params"]]


def _norm(tensor: Tensor, along: int | None) -> Tensor:
    return tensor.norm() if along is None else tensor.norm(dim=along, keepdim=True)
