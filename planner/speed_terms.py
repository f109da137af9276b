"""The terms of a step's time as formulas with numbers, in seconds; the figures are those of :mod:`.speed`."""

from __future__ import annotations

from .architecture import Architecture
from .hardware import Gpu
from .launching import launched_s, loop_s
from .memory_terms import Part, Reckoned
from .settings import Settings
from .speed import step_speed
from .stacks import Stack
from .traffic import launches, optimizer_traffic
from .work import Work, as_run

_WORDS = {
    "launch": "the GPU waits for the next kernel",
    "reference": "forward passes of the frozen reference, and others without gradients",
    "teacher": "the forward pass of the frozen teacher, and what both heads' logits become",
    "parking": "the GPU waits for what is copied to and from host memory",
    "communication": "gradients and weights that devices send each other, less what goes on beside the arithmetic",
    "rollout": "answers are generated: all weights are read for each token",
    "offload": "optimiser states and weights that are copied to and from host memory",
}


def speed_parts(
    architecture: Architecture,
    settings: Settings,
    stack: Stack,
    gpu: Gpu,
    *,
    useful: float = 1.0,
    mean_length: float | None = None,
) -> dict[str, Reckoned]:
    """Each term of :attr:`.plan.Speed.terms` with its formula and its parts; arguments as of :func:`.step_speed`."""
    total = step_speed(architecture, settings, stack, gpu, useful=useful, mean_length=mean_length)
    settings, stack = as_run(architecture, settings, stack, gpu)
    work = Work.of(architecture, settings, stack, gpu, mean_length=mean_length)
    reaches = (
        f"rate = {work.peak / 1e12:,.0f} TFLOP/s × {work.achievable:.0%} of the best product × {work.efficiency:.0%} "
        f"in a training step × {work.filled:.0%} filled by {work.tokens:,} tokens = {work.rate / 1e12:,.1f} TFLOP/s"
    )
    times = settings.accumulation
    again = f" × {times} micro-batches" if times > 1 else ""
    over = f"÷ {work.bandwidth / 1e9:,.0f} GB/s"
    found: dict[str, Reckoned] = {}
    for name, flops in work.products.items():
        how = f"{work.tokens:,} tokens × {flops / 1e9:,.2f} GFLOP ÷ {work.rate / 1e12:,.1f} TFLOP/s{again}"
        found[name] = (
            f"tokens × FLOPs a token ÷ rate; {reaches}",
            "2 FLOPs per weight in forward; backward as many for inputs, and again for trained weights",
            [("matrix products", how, total.terms[name])],
        )
    found["attention"] = (
        "tokens × FLOPs a token ÷ what the attention kernel reaches, over all passes",
        "arXiv:2307.08691, arXiv:2407.08608, and an H200",
        [(
            f"over {work.span:,.0f} tokens",
            f"{work.tokens:,} tokens × {work.attention / 1e6:,.1f} MFLOP a forward pass × {work.passes:.3g} "
            f"÷ {work.attention_rate / 1e12:,.1f} TFLOP/s{again}",
            total.terms["attention"],
        )],
    )  # fmt: skip
    found["elementwise"] = (
        "tokens × bytes read and written a token ÷ memory bandwidth",
        "",
        [(
            "norms, rotary embedding, activation, residuals, adapters' sums, loss",
            f"{work.tokens:,} tokens × {work.moved / 1e6:,.1f} MB {over}{again}",
            total.terms["elementwise"],
        )],
    )  # fmt: skip
    found["dequantize"] = (
        "bytes of packed weights read and of unpacked ones written and read ÷ memory bandwidth",
        "",
        [("unpacking weights", f"{work.unpacked / 1e9:,.1f} GB {over}{again}", total.terms["dequantize"])],
    )
    update = optimizer_traffic(architecture, settings, stack)
    found["optimizer"] = (
        "bytes of weights, gradients and states ÷ memory bandwidth, once a step",
        "",
        [("update", f"{update / 1e9:,.3g} GB {over}", total.terms["optimizer"])],
    )
    for name, words in _WORDS.items():
        if name not in total.terms:
            continue
        how = f"{settings.beside.forwards:g} further forward passes{again}" if name == "reference" else ""
        found[name] = (words, "", [(name, how, total.terms[name])])
    found["launch"] = _launch(architecture, settings, stack, gpu, total.terms, work)
    if settings.beside.teacher is not None:
        spent = settings.beside.teacher.spent(architecture, settings, work, gpu)
        found["teacher"] = (_WORDS["teacher"], "", [(what, f"{how}{again}", s * times) for what, how, s in spent])
    return {name: found[name] for name in total.terms if name in found}


def _launch(
    architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, terms: dict[str, float], work: Work
) -> Reckoned:
    """The waits for the host, and for what the loop does between two steps."""
    busy = sum(terms.get(name, 0.0) for name in (*work.seconds, "reference", "teacher")) / settings.accumulation
    counted, beside = launches(architecture, settings, stack), settings.beside
    kernels = counted.total + beside.forwards * counted.forward + (beside.teacher.kernels if beside.teacher else 0)
    start_s, own = sum(launched_s(architecture, settings, stack, gpu)), loop_s(settings, stack, gpu)
    how = f"{kernels:,.0f} kernels a micro-batch: {_ms(start_s)} to start, {_ms(busy)} to run"
    parts: list[Part] = [("the host's start of kernels", "", terms["launch"] - own)]
    if own:
        parts.append(("the training loop's own Python", "once a step", own))
    return f"{_WORDS['launch']}; {how}", "", parts


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{0 if seconds >= 0.1 else 1}f} ms"
