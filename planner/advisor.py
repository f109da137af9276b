"""Advice on the questions people come with: fine-tune at all, which method, which adapter, which card, which workflow.

Every piece of advice names what it rests on: a paper, or this planner's own figures, which overrule rules of thumb
wherever they can answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .architecture import Architecture
from .fit import Fit, fit_table
from .hardware import Gpu
from .survey import DataKind, Remark

Goal = Literal["facts", "format", "domain", "preference", "cost", "prototype", "reasoning", "unknown"]
GOALS: tuple[str, ...] = ("facts", "format", "domain", "preference", "cost", "prototype", "reasoning")

_LORA = "arXiv:2106.09685 (LoRA)"
_QLORA = "arXiv:2305.14314 (QLoRA)"
_FEW = "arXiv:2305.11206 (LIMA: 1,000 chosen examples teach a style, 30 conversations)"
_STAGES = "arXiv:2203.02155 (InstructGPT: SFT, then preferences)"
_PLANNER = "this planner: memory and speed by formula, prices of presets/prices.csv"


@dataclass(frozen=True)
class Advice:
    """One question with its answer. ``settings`` are recipe keys to values that carry the answer out."""

    question: str
    answer: str
    why: str
    source: str
    settings: Mapping[str, Any] | None = None


_WHETHER: dict[str, tuple[str, str, str]] = {
    "facts": (
        "retrieval",
        "facts that change are looked up: an index is refreshed without training, and answers more of them rightly",
        "arXiv:2312.05934 (fine-tuning or retrieval)",
    ),
    "format": ("fine-tune (SFT)", "a prompt can't promise the same style or format every time", _FEW),
    "domain": (
        "fine-tune (SFT), with retrieval beside it",
        "the model learns words and style, facts are looked up; both together gain most",
        "arXiv:2401.08406 (retrieval and fine-tuning, a case study)",
    ),
    "preference": ("SFT first, then DPO, KTO or GRPO", "preferences refine what SFT has to establish", _STAGES),
    "cost": (
        "fine-tune a small model",
        "224 of 310 models of 2 to 8B beat GPT-4 at the task they were tuned for with 4-bit LoRA",
        "arXiv:2405.00732 (LoRA Land)",
    ),
    "prototype": ("few-shot prompts", "nothing is trained before it is known that it is worth it", "arXiv:2005.14165"),
    "reasoning": ("SFT first, then GRPO", "answers that can be checked are a reward", "arXiv:2501.12948 (DeepSeek-R1)"),
}

_METHODS: dict[DataKind, tuple[str, str, str]] = {
    "text": ("pretrain", "plain text has no answers: every token is learnt", "arXiv:2004.10964"),
    "examples": ("sft", "examples to imitate; always the first stage, and often the last", _STAGES),
    "pairs": ("dpo", "chosen and rejected answers teach without a reward model, after SFT", "arXiv:2305.18290 (DPO)"),
    "labels": ("kto", "single answers marked good or bad need no pairs", "arXiv:2402.01306 (KTO)"),
    "checkable": ("grpo", "answers that can be checked are a reward; several completions each", "arXiv:2402.03300"),
}
_OTHER_METHODS: dict[DataKind, str] = {
    "examples": "distill (arXiv:2306.13649) also learns what a larger model of the same family would say at each word",
    "pairs": "ORPO (arXiv:2403.07691) does SFT and preference in one pass with one model in memory; SimPO "
    "(arXiv:2405.14734) needs no reference model but is less stable; IPO (arXiv:2310.12036) resists overfitting",
    "labels": "with both verdicts on the same prompts, make pairs and use DPO: its signal is stronger",
    "checkable": "rloo (arXiv:2402.14740) needs fewer completions for each; writing answers takes most of the time",
}
#: The workflows that presets hold as recipes.
WORKFLOWS: tuple[Advice, ...] = (
    Advice(
        "first fine-tune",
        "finetui run first-finetune; then finetui export RUN --to ollama, tried in Ollama",
        "QLoRA of rank 16 on a model of about 8B fits cards with 16 GB and free notebooks",
        f"{_QLORA}; presets/first-finetune.yaml",
    ),
    Advice(
        "production",
        "finetui run production; evaluate before and after, merge the adapter, serve with vLLM",
        "one recipe in version control, held-out data in it; a merged adapter costs nothing at inference",
        f"{_LORA}, section 4; presets/production.yaml",
    ),
    Advice(
        "alignment in stages",
        "finetui run alignment: SFT, then DPO on what it made, then a measurement",
        "each stage is evaluated by itself, and preferences start from a model that already answers",
        f"{_STAGES}; arXiv:2305.18290; presets/alignment.yaml",
    ),
)


def advise(
    architecture: Architecture | None = None,
    *,
    goal: Goal = "unknown",
    data: DataKind = "unknown",
    examples: int | None = None,
    gpu: Gpu | None = None,
    sequence_length: int = 2048,
    remarks: Sequence[Remark] = (),
) -> list[Advice]:
    """Advice for a situation, as far as it is known.

    Args:
        architecture: the model; without it no card is advised.
        examples: rows to train on.
        gpu: the card that is there already.
        remarks: what a survey of the rows found.
    """
    advice = [item for item in (_whether(goal, examples), _method(data)) if item]
    advice += [Advice("what about these rows?", r.do, r.what, r.source, r.settings) for r in remarks]
    if examples is not None:
        advice.append(_adapter(examples))
    if architecture:
        advice += _cards(architecture, gpu, sequence_length)
    return advice + list(WORKFLOWS)


def _whether(goal: Goal, examples: int | None) -> Advice | None:
    question = "fine-tune, retrieve or prompt?"
    if goal != "unknown":
        return Advice(question, *_WHETHER[goal])
    if examples is not None and examples < 100:
        why = f"{examples} examples fit into a prompt, and are few to learn from"
        return Advice(question, "try few-shot prompts first", why, f"arXiv:2005.14165 (GPT-3); {_FEW}")
    return None


def _method(data: DataKind) -> Advice | None:
    if data == "unknown":
        return None
    method, why, source = _METHODS[data]
    more = _OTHER_METHODS.get(data)
    return Advice("which method for this data?", method, f"{why}; {more}" if more else why, source, {"method": method})


def _adapter(examples: int) -> Advice:
    question = "which adapter and rank?"
    if examples < 100:
        settings = {"tuning.type": "lora", "tuning.rank": 4, "tuning.alpha": 8}
        why = f"{examples} examples can't fill a larger one: ranks of 1 to 8 did as well as 64"
        return Advice(question, "LoRA, rank 4, alpha 8", why, f"{_LORA}, section 7.2", settings)
    if examples > 100_000:
        settings = {"tuning.type": "lora", "tuning.rank": 64, "tuning.alpha": 128}
        why = f"{examples:,} examples hold more than a small adapter can; it forgets less, though"
        source = "arXiv:2405.09673 (LoRA learns less and forgets less)"
        return Advice(question, "full fine-tuning, or LoRA of rank 64 and more, alpha 128", why, source, settings)
    settings = {"tuning.type": "lora", "tuning.rank": 16, "tuning.alpha": 32}
    why = "rank matters less than reaching all linear layers; alpha twice the rank; dropout 0 is fastest"
    return Advice(
        question, "LoRA or QLoRA, rank 16, alpha 32, on all linear layers", why, f"{_QLORA}; {_LORA}", settings
    )


def _cards(architecture: Architecture, gpu: Gpu | None, length: int) -> list[Advice]:
    """For each tuning the cheapest card per million tokens that fits; on a card that is there, the best tuning."""
    rows = [row for row in fit_table(architecture, [gpu] if gpu else None, sequence_lengths=(length,)) if row.fits]
    name, shape = architecture.name, f"rows of {length} tokens"
    if gpu:
        if not rows:
            why = f"not even QLoRA of rank 16 with {shape} fits its {gpu.memory_gib:.1f} GiB"
            return [Advice(f"can {gpu.name} train {name}?", "no", why, _PLANNER)]
        best = max(rows, key=lambda row: ("qlora", "lora", "full").index(row.tuning))
        why = ", ".join(f"{row.tuning} {row.device_gib:.1f}" for row in rows) + f" of {gpu.memory_gib:.1f} GiB, {shape}"
        settings = {"hardware.gpu": gpu.name, "tuning.type": best.tuning}
        return [Advice(f"what can {gpu.name} train of {name}?", f"up to {best.tuning}", why, _PLANNER, settings)]
    found = []
    for tuning in ("qlora", "lora", "full"):
        fitting = [row for row in rows if row.tuning == tuning and row.high_gib <= row.memory_gib]
        if not fitting:
            answer = "no single card of the catalog: several with sharding"
            found.append(Advice(f"which card for {tuning} on {name}?", answer, f"{shape} fit on none", _PLANNER))
            continue
        best = min(fitting, key=_price)
        fastest = max(fitting, key=lambda row: row.tokens_per_s)
        why = f"{best.device_gib:.1f} of {best.memory_gib:.1f} GiB, {shape}; fastest: {_told(fastest)}"
        settings = {"hardware.gpu": best.gpu, "tuning.type": tuning}
        found.append(Advice(f"which card for {tuning} on {name}?", _told(best), why, _PLANNER, settings))
    return found


def _price(row: Fit) -> float:
    return row.usd_per_million_tokens if row.usd_per_million_tokens is not None else float("inf")


def _told(row: Fit) -> str:
    speed = f"{row.gpu} at {row.tokens_per_s:,.0f} tokens/s"
    if row.usd_per_million_tokens is None:
        return f"{speed} (nobody offers it)"
    return f"{speed}, {row.usd_per_million_tokens:.2f} USD per million tokens ({row.provider})"
