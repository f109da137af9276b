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
#: Values that are translated at a time: whole blocks.
_PIECE = BLOCK * 2**16


def translated(optimizer: Any, told: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A state dictionary as an optimiser takes it, and whether its states had to be given another format.

    Args:
        optimizer: any; states that are of no other AdamW than its own are left as they are.
        told: what an optimiser over the same parameters has written. Settings of groups that it lacks are the
            optimiser's own.

    Raises:
        RunError: the states are those of the fused AdamW, and Triton is missing, without which nobody can read them.
    """
    if "param_groups" not in told:  # several optimisers as one, none of which has a stand-in
        return told, False
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
        stored, signed = state[f"state{number}"], name == "exp_avg"
        if stored.is_floating_point():
            made[name] = stored
            continue
        tables = state[f"qmap{number}"].to(device), values(signed).to(device)
        codes, made[f"{name}_scale"] = _recoded(stored, state[f"absmax{number}"], *tables, 128 if signed else None)
        made[name] = codes.view(torch.int8) if signed else codes
    return made


def _to_bitsandbytes(optimizer: Any, state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    made: dict[str, Any] = {"step": int(state["step"])}
    for name, number in _MOMENTS:
        stored = state[name]
        if stored.is_floating_point():
            made[f"state{number}"] = stored.float()
            continue
        table = optimizer.name2qmap["dynamic" if name == "exp_avg" else "udynamic"].to(device)
        tables = _codes_of_fused(name, device), table
        made[f"state{number}"], made[f"absmax{number}"] = _recoded(stored, state[f"{name}_scale"], *tables)
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


def _recoded(
    stored: Tensor, scales: Tensor, before: Tensor, after: Tensor, unused: int | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a moment by another table, where the old ones lie; ``unused`` as in :func:`_nearest`.

    A piece at a time is on the tables' device, which has little room beside a model.
    """
    flat = stored.reshape(-1).view(torch.uint8)
    codes, tops = [flat[:0]], [scales[:0]]  # some ranks have no rows of a small tensor
    for start in range(0, flat.numel(), _PIECE):
        part = flat[start : start + _PIECE].to(before.device)
        each = scales[start // BLOCK : (start + _PIECE) // BLOCK].to(before.device).repeat_interleave(BLOCK)
        made, top = _nearest(before[part.int()] * each[: part.numel()], after, unused)
        codes.append(made.to(stored.device))
        tops.append(top.to(scales.device))
    return torch.cat(codes).view(stored.shape), torch.cat(tops)


def _nearest(moment: Tensor, table: Tensor, unused: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and scales (fp32, one per block) by which a table says nearly the same.

    A second moment that is not 0 gets no code of 0: the next update of its weight would be enormous.

    Args:
        moment: fp32, of one dimension.
        table: what the 256 codes stand for, in units of the scale; ``unused``: a code that is never written.
    """
    order = table.argsort()
    if unused is not None:
        order = order[order != unused]
    ordered = table[order]
    blocks = torch.nn.functional.pad(moment, (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    units = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).reshape(-1)[: moment.numel()]
    codes = order[torch.bucketize(units, (ordered[1:] + ordered[:-1]) / 2, out_int32=True)]
    if ordered[0] >= 0:
        codes = torch.where((units > 0) & (table[codes] == 0), order[ordered > 0][0], codes)
    return codes.to(torch.uint8), scales
