"""Optimiser states of one AdamW, as another keeps them: for a run that goes on with other kernels than it began with.

The optimiser of a run follows from where it runs: the fused one (:mod:`.fused_adamw`) where Triton has proven itself
and ``hardware.kernels`` allows it, elsewhere that of bitsandbytes or torch. All keep the same two moments, in formats
of their own, and none reads another's: bitsandbytes would end in the middle of a step for want of a name.

8-bit states hold 256 neighbours as codes and one scale (Dettmers et al., arXiv:2110.02861). Both formats are of that
kind but give their codes other values, so a moment becomes the nearest one of the other format: off by half a cell at
most, as it is in every step anyway. 32-bit states stay as they are, bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...planner.errors import RunError
from .shards import BLOCK, WRAPPED

_MOMENTS = (("exp_avg", "1"), ("exp_avg_sq", "2"))


def translated(optimizer: Any, told: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A state dictionary as an optimiser takes it, and whether its states had to be given another format.

    Args:
        optimizer: any; states that are of no other AdamW than its own are left as they are.
        told: what an optimiser over the same parameters has written. Settings of groups that it lacks are the
            optimiser's own.

    Raises:
        RunError: the states are those of the fused AdamW, and Triton is missing, without which nobody can read them.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    parameters = [p for group in inner.param_groups for p in group["params"]]
    numbers = [number for group in told["param_groups"] for number in group["params"]]
    if len(told["param_groups"]) != len(inner.param_groups) or len(numbers) != len(parameters):
        return told, False  # which the optimiser will refuse
    groups = [{**own, **saved} for own, saved in zip(inner.param_groups, told["param_groups"], strict=True)]
    told = {**told, "param_groups": groups}
    foreign = "state1" if hasattr(inner, "scale_gradients") else "exp_avg" if hasattr(inner, "name2qmap") else ""
    if not any(foreign in _flat(state) for state in told["state"].values()):
        return told, False
    state = {}
    for number, p in zip(numbers, parameters, strict=True):
        if number in told["state"]:
            own = _flat(told["state"][number])
            state[number] = _to_bitsandbytes(inner, own, p.device) if foreign == "exp_avg" else _to_fused(own, p.device)
    return {**told, "state": state}, True


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in state.items() if name != WRAPPED}, **state.get(WRAPPED, {})}


def _to_fused(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    from ...kernels.blockwise import values

    made: dict[str, Any] = {"step": int(state["step"])}
    for name, number in _MOMENTS:
        stored = state[f"state{number}"].to(device)
        if stored.is_floating_point():
            made[name] = stored
            continue
        moment = _spread(state[f"qmap{number}"].to(device)[stored.long()], state[f"absmax{number}"].to(device))
        signed = name == "exp_avg"
        codes, made[f"{name}_scale"] = _nearest(moment, values(signed).to(device), 128 if signed else None)
        made[name] = codes.view(torch.int8) if signed else codes
    return made


def _to_bitsandbytes(optimizer: Any, state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    made: dict[str, Any] = {"step": int(state["step"])}
    for name, number in _MOMENTS:
        stored = state[name].to(device)
        if stored.is_floating_point():
            made[f"state{number}"] = stored.float()
            continue
        table = optimizer.name2qmap["dynamic" if name == "exp_avg" else "udynamic"].to(device)
        moment = _spread(_codes_of_fused(name, device)[stored.view(torch.uint8).long()], state[f"{name}_scale"])
        made[f"state{number}"], made[f"absmax{number}"] = _nearest(moment, table)
        made[f"qmap{number}"] = table
    return made


def _codes_of_fused(name: str, device: torch.device) -> Tensor:
    try:
        from ...kernels.blockwise import values
    except ImportError as error:
        raise RunError(
            f"the optimiser's states are in 8 bits as the fused AdamW keeps them, which takes Triton to read ({error})",
            do="Install Triton, or resume the run on the machine that it began on.",
        ) from error
    return values(signed=name == "exp_avg").to(device)


def _spread(units: Tensor, scales: Tensor) -> Tensor:
    """Moments of units of their block's scale."""
    each = scales.to(units.device).repeat_interleave(BLOCK)[: units.numel()]
    return units * each.view(units.shape)


def _nearest(moment: Tensor, table: Tensor, unused: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes (uint8, of the moment's shape) and scales (fp32, one per block) by which a table says nearly the same.

    A second moment that is not 0 gets no code of 0: the next update of its weight would be enormous.

    Args:
        moment: fp32.
        table: what the 256 codes stand for, in units of the scale; ``unused``: a code that is never written.
    """
    order = table.argsort()
    if unused is not None:
        order = order[order != unused]
    ordered = table[order]
    blocks = torch.nn.functional.pad(moment.reshape(-1), (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    units = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).reshape(-1)[: moment.numel()]
    codes = order[torch.bucketize(units, (ordered[1:] + ordered[:-1]) / 2)]
    if ordered[0] >= 0:
        codes = torch.where((units > 0) & (table[codes] == 0), order[ordered > 0][0], codes)
    return codes.to(torch.uint8).view(moment.shape), scales
