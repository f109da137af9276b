"""The formula of activations against what was followed through transformers, PEFT and TRL, row by row."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import Node, find_gpu
from finetui.planner.memory import peak_memory
from finetui.planner.recipe import Recipe
from finetui.planner.settings import Settings
from finetui.planner.solver import make_plan
from finetui.planner.stacks import STACKS

_PATH = Path(__file__).parents[1] / "bench" / "coefficients.py"
_SPEC = importlib.util.spec_from_file_location("coefficients", _PATH)
coefficients = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = coefficients
_SPEC.loader.exec_module(coefficients)

#: Share that the formula may be off on any row; rows that were further off when they were written may not grow worse.
TOLERANCE = 0.03
TABLES = sorted(coefficients.RESULTS.glob("coefficients-transformers-*.csv"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_the_formula_does_not_drift_from_what_was_followed(table):
    rows = coefficients.read(table)
    assert len(rows) > 100
    worse = []
    for row in rows:
        error = coefficients.formula(row.key) / row.allocated - 1
        if abs(error) > max(TOLERANCE, abs(row.error) + 0.01):
            worse.append(f"{' '.join(row.key)}: {error:+.1%}, was {row.error:+.1%}")
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize(
    "key",
    [
        ("Qwen/Qwen3-8B", "finetui", "lora", "none"),
        ("meta-llama/Llama-3.1-8B", "trl", "lora", "full"),
        ("google/gemma-2-9b", "trl", "full", "none"),
    ],
    ids=" ".join,
)
def test_the_table_is_what_the_installed_libraries_do(key):
    pytest.importorskip("torch")
    table = coefficients.table_of(metadata.version("transformers"))
    if not table.is_file():
        pytest.skip("this release of transformers has no table: python -m tests.bench.coefficients")
    known = {row.key: row for row in coefficients.read(table)}[key]
    now = coefficients.followed(key)
    assert (now.moment, now.allocated) == (known.moment, pytest.approx(known.allocated, rel=0.01))


#: Bytes that one more token costs in one more layer without recomputation, 2 x 512 to 2 x 2048 tokens, as the
#: differences of four steps followed through transformers 5.23.0 and peft 0.21.2.
EXPERTS = [
    ("mistralai/Mixtral-8x7B-v0.1", "trl", ["q_proj", "v_proj"], 258_364),
    ("mistralai/Mixtral-8x7B-v0.1", "finetui", "all-linear", 315_772),
    ("Qwen/Qwen3-30B-A3B", "finetui", "all-linear", 159_912),
    ("Qwen/Qwen3-30B-A3B", "trl", "all-linear", 193_704),
    ("deepseek-ai/DeepSeek-V2-Lite", "trl", "all-linear", 194_724),
]


@pytest.mark.parametrize(("model", "framework", "targets", "followed"), EXPERTS)
def test_what_a_token_leaves_with_the_experts_it_passes(model, framework, targets, followed):
    def allocated(layers: int, tokens: int) -> float:
        recipe = Recipe.build(
            {
                "model": model, "tuning": {"type": "lora", "targets": targets}, "sequence_length": tokens,
                "micro_batch": 2, "batch_size": 2, "optimizer": {"name": "adamw"},
                "hardware": {"gpu": coefficients.GPU, "checkpointing": "none", "precision": "bf16"},
            }
        )  # fmt: skip
        architecture = Architecture.from_config(coefficients.shortened(model, layers), model)
        plan = make_plan(recipe, architecture, Node(find_gpu(coefficients.GPU)), None, framework=framework)
        return plan.memory.allocated_gib * 2**30

    grown = (allocated(3, 2048) - allocated(2, 2048)) - (allocated(3, 512) - allocated(2, 512))
    assert grown / (2 * 1536) == pytest.approx(followed, rel=0.05)


#: MiB at the fullest instant of a step of 2 rows through two layers whose attention writes its scores out, as followed
#: through torch 2.13, transformers 5.23.0, peft 0.21.2 and trl 1.16.0, by tokens of a row.
SCORES = {
    ("google/gemma-2-9b", "none"): {256: 2925, 1024: 4277, 2048: 6989},
    ("google/gemma-2-9b", "full"): {256: 2808, 1024: 3618, 2048: 5161, 4096: 10545},
    ("openai/gpt-oss-20b", "none"): {256: 5752, 1024: 7804, 2048: 13785},
    ("openai/gpt-oss-20b", "full"): {256: 5624, 1024: 7166, 2048: 11999, 4096: 30929},
    ("meta-llama/Llama-3.1-8B", "none"): {512: 3685, 1024: 4821, 2048: 8635},
    ("meta-llama/Llama-3.1-8B", "full"): {512: 3386, 2048: 6376, 4096: 15994, 6144: 31787},
}


@pytest.mark.parametrize(("key", "known"), SCORES.items(), ids=map(" ".join, SCORES))
def test_scores_that_are_written_out_are_counted_at_every_length(key, known):
    model, policy = key
    architecture = Architecture.from_config(coefficients.shortened(model, 2), model)
    for length, followed in known.items():
        settings = Settings("lora", length, micro_batch=2, checkpointing=policy, attention="eager", masked=True)
        memory = peak_memory(architecture, settings, STACKS["trl"], find_gpu(coefficients.GPU))
        assert memory.allocated_gib * 1024 == pytest.approx(followed, rel=0.025), length
