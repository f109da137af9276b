"""Where a job runs: the GPUs of its plan, the offer that they are rented by, and what the run costs there."""

from __future__ import annotations

from dataclasses import dataclass

from ...planner.cost import price_of, restart_s
from ...planner.errors import HardwareError, RecipeError
from ...planner.hardware import Offer
from ...planner.plan import Plan
from ...planner.recipe import Recipe
from .clouds import Cloud, System, find_cloud, name_of, offers_of


@dataclass(frozen=True)
class Machine:
    """A plan and where it is carried out.

    Args:
        recipe: the recipe, which names GPU and number now.
        plan: its plan there.
        cloud: who is rented from; None under Slurm.
        gpu_name: what the system calls the GPU; empty without one.
        usd_per_h: price of the whole machine; 0 where none is known.
        time_s: seconds of the run, with what interruptions of a spot machine add.
        as_of: the day of the price, where it is one of the list.
    """

    recipe: Recipe
    plan: Plan
    cloud: Cloud | None = None
    gpu_name: str = ""
    usd_per_h: float = 0.0
    time_s: float = 0.0
    as_of: str = ""

    @property
    def count(self) -> int:
        """GPUs, or on a CPU the processes."""
        return self.plan.resolved.world_size

    @property
    def usd(self) -> float:
        """What the run is expected to cost."""
        return self.usd_per_h * self.time_s / 3600


def choose(
    recipe: Recipe, system: System, *, provider: str | None = None, spot: bool = False, gpu_name: str | None = None
) -> Machine:
    """Where a recipe runs: on the GPUs that it names at the cheapest provider, or on the cheapest offer where it fits.

    Raises:
        HardwareError: no GPU is named where none can be chosen, the plan does not fit, nobody rents it out, or what
            the system calls it is not known.
    """
    from ..planning import plan_for

    if provider is None and system == "modal":
        provider = "modal"
    cloud = find_cloud(system, provider) if provider is not None else None
    if spot and (system == "slurm" or (cloud is not None and not cloud.spot)):
        do = "Leave --spot out." if system == "slurm" else "Leave --spot out, or rent elsewhere."
        what = f"{cloud.provider if cloud else system} has no spot machines that {system} can ask for"
        raise HardwareError(what, where="--spot", do=do)
    if recipe.hardware.device == "cpu":
        plan = _fitting(plan_for(recipe))
        return Machine(recipe, plan, cloud, time_s=plan.time_s, usd_per_h=recipe.hardware.usd_per_h or 0.0)
    if recipe.hardware.gpu is None:
        recipe = _cheapest(recipe, system, cloud, spot) if system != "slurm" else _of_this_machine(recipe)
    plan = _fitting(plan_for(recipe))
    gpu, count = plan.hardware.gpu, plan.resolved.world_size
    if system == "slurm":
        name = name_of(system, "", gpu, count, gpu_name)
        return Machine(recipe, plan, None, name, recipe.hardware.usd_per_h or 0.0, plan.time_s)
    offer, cloud = _offer(system, gpu, count, cloud, spot=spot, named=gpu_name is not None)
    price = (price_of(offer, spot=spot) or 0.0) * count / offer.count
    if recipe.hardware.usd_per_h is not None:
        price = recipe.hardware.usd_per_h
    return Machine(
        recipe,
        plan,
        cloud,
        name_of(system, cloud.provider, gpu, count, gpu_name),
        price,
        plan.time_s + (restart_s(plan) if spot else 0.0),
        "" if recipe.hardware.usd_per_h is not None else offer.as_of,
    )


def _fitting(plan: Plan) -> Plan:
    if not plan.fits:
        need, have = plan.memory.device_gib, plan.hardware.memory_gib
        what = f"the plan does not fit on {plan.hardware.gpu}: {need:.1f} of {have:.1f} GiB"
        raise HardwareError(what, do=" ".join(plan.warnings[:1]))
    return plan


def _of_this_machine(recipe: Recipe) -> Recipe:
    """The recipe for GPUs like those here, where there are some: the nodes of a cluster are often like its login's."""
    from ...planner.hardware import this_machine

    node = this_machine()
    if node.gpu.kind == "cpu":
        do = "Name it with --gpu, or say --set hardware.device=cpu if it has none."
        raise HardwareError("which GPU do the nodes have?", where="hardware.gpu", do=do)
    return recipe.with_overrides({"hardware.gpu": node.gpu.name})


def _cheapest(recipe: Recipe, system: System, cloud: Cloud | None, spot: bool) -> Recipe:
    """The recipe with the GPUs of the cheapest offer on which it fits and keeps to its limits."""
    from ...planner.architecture import Architecture
    from ...planner.hub import find_config
    from ...planner.ranking import cheapest, rank_offers
    from ..planning import workload_of

    if recipe.stages:
        do = "Name it with --gpu; finetui fit shows what fits."
        raise RecipeError("which GPU is to be rented for these stages?", where="hardware.gpu", do=do)
    name, config, _ = find_config(recipe.model)
    wanted = recipe.hardware.gpus
    count = wanted if isinstance(wanted, int) else None if wanted == "auto" else len(wanted)
    offers = [
        offer
        for offer, at in offers_of(system, cloud).items()
        if count in (None, offer.count) and (at.spot or not spot) and (offer.usd_per_h or spot)
    ]
    ranked = rank_offers(recipe, Architecture.from_config(config, name), workload_of(recipe), offers=offers, spot=spot)
    best = cheapest(ranked)
    if best is None:
        do = "Look at finetui gpus, which names what each offer breaks."
        raise HardwareError(f"no offer that {system} can rent fits this plan and keeps to its limits", do=do)
    return recipe.with_overrides({"hardware.gpu": best.offer.gpu, "hardware.gpus": best.offer.count})


def _offer(
    system: System, gpu: str, count: int, cloud: Cloud | None, *, spot: bool, named: bool
) -> tuple[Offer, Cloud]:
    """The cheapest offer of these GPUs; single ones stand for several where nobody lists so many.

    Args:
        named: the user says what the system calls the GPU.
    """
    every = offers_of(system, cloud, any_gpu=named).items()
    priced = [(o, at) for o, at in every if o.gpu == gpu and price_of(o, spot=spot) and (at.spot or not spot)]
    for fitting in ([p for p in priced if p[0].count == count], [p for p in priced if p[0].count == 1]):
        if fitting:
            return min(fitting, key=lambda pair: (pair[0].as_of == "unknown", price_of(pair[0], spot=spot)))
    return _unpriced(system, gpu, count, cloud, spot=spot, named=named)


def _unpriced(
    system: System, gpu: str, count: int, cloud: Cloud | None, *, spot: bool, named: bool
) -> tuple[Offer, Cloud]:
    """An offer without a price, where a provider that the user names is known to have these GPUs.

    Raises:
        HardwareError: there is no such provider.
    """
    if cloud is not None:
        if not named:
            name_of(system, cloud.provider, gpu, count)
        return Offer(cloud.provider, gpu, count, None, None, "", "", ""), cloud
    elsewhere = sorted({at.provider for o, at in offers_of(system, any_gpu=True).items() if o.gpu == gpu})
    kind = "spot offer" if spot else "offer"
    do = f"Name one of {', '.join(elsewhere)} with --provider." if elsewhere else "finetui gpus lists what is offered."
    raise HardwareError(f"there is no {kind} of {count} × {gpu} that {system} can rent", where="hardware.gpu", do=do)
