"""Calibration: three runs of a kind correct a plan, one odd run does not, and nothing feeds on itself."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetui.planner.architecture import Architecture
from finetui.planner.calibration import (
    Correction,
    Finished,
    Kind,
    compare,
    corrected_speed,
    correction,
    history,
    out_of_memory,
    record,
    size_of,
)
from finetui.planner.hardware import Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.plan import Plan, Speed
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan

LLAMA = Architecture.from_config(find_config("meta-llama/Llama-3.1-8B")[1], "Llama-3.1-8B")
SIZE = size_of(LLAMA.parameters)
KIND = Kind("A100-80GB", "Llama", "lora", SIZE)


def plan(finished=(), gpu: str = "A100", tuning: str = "lora") -> Plan:
    recipe = Recipe.build({"model": "m", "tuning": tuning, "micro_batch": 4, "hardware": {"checkpointing": "full"}})
    return make_plan(recipe, LLAMA, Node(find_gpu(gpu)), finished=finished)


def runs(*ratios: float) -> list[Finished]:
    return [Finished("A100-80GB", "Llama", "lora", SIZE, "finetui", ratio, ratio) for ratio in ratios]


def test_two_runs_change_nothing_and_three_do():
    base = plan()
    assert plan(runs(1.2, 1.2)).memory == base.memory
    better = plan(runs(1.2, 1.2, 1.2))
    assert (base.basis, better.basis) == ("formula", "calibrated")
    assert better.speed.tokens_per_s == pytest.approx(1.2 * base.speed.tokens_per_s)
    assert better.memory.allocated_gib > base.memory.allocated_gib
    assert sum(better.memory.terms.values()) == pytest.approx(better.memory.device_gib)
    assert sum(better.speed.terms.values()) == pytest.approx(better.speed.step_s)
    assert better.memory.terms["weights"] == base.memory.terms["weights"]
    assert "3 finished runs" in better.reasons[0].why


@given(st.lists(st.floats(0.9, 1.1), min_size=3, max_size=9), st.floats(0.01, 90.0))
def test_one_odd_run_bends_nothing(ratios, odd):
    """However wild it is, the correction stays within what the other runs said."""
    found = correction(runs(*ratios, odd), KIND)
    assert found is not None
    assert min(ratios) <= found.speed <= max(ratios)
    assert min(ratios) <= found.memory <= max(ratios)


def test_a_correction_is_bounded_and_only_for_its_kind():
    wild = correction(runs(50, 60, 70), KIND)
    assert wild is not None
    assert wild.memory <= 1.5
    assert wild.speed <= 2.0
    assert plan(runs(1.2, 1.2, 1.2), gpu="H100").basis == "formula"
    assert plan(runs(1.2, 1.2, 1.2), tuning="qlora").basis == "formula"


def test_sizes_within_a_factor_of_two_are_alike():
    assert size_of(7_000_000_000) == size_of(8_000_000_000) != size_of(70_000_000_000)
    assert size_of(500_000_000) != size_of(8_000_000_000)


def test_what_is_learnt_is_against_the_formula(tmp_path):
    """A corrected plan that comes true confirms the correction instead of squaring it."""
    truth, first = 1.1, plan()
    stored = sum(first.memory.terms[name] for name in ("weights", "adapter", "optimizer"))
    measured = stored + truth * (first.memory.allocated_gib - stored)
    seen: list[Finished] = []
    for _ in range(6):
        now = plan(seen)
        record(compare(now, allocated_gib=measured, tokens_per_s=0.8 * first.speed.tokens_per_s), tmp_path)
        seen = history(tmp_path)
    assert [run.memory for run in seen] == pytest.approx([truth] * 6)
    assert statistics.median(run.speed or 0 for run in seen) == pytest.approx(0.8)
    assert plan(seen).memory.allocated_gib == pytest.approx(measured)


def test_the_history_survives_broken_lines_and_missing_folders(tmp_path):
    assert history(tmp_path / "none") == []
    record(runs(1.1)[0], tmp_path / "deep" / "er")
    file = tmp_path / "deep" / "er" / "calibration.jsonl"
    strange = ['{"gpu": "x"', "[]", '{"gpu": 1}', json.dumps({**json.loads(file.read_text()), "speed": "fast"})]
    with file.open("a") as out:
        out.write("\n".join([*strange, json.dumps({**json.loads(file.read_text()), "later": 1})]) + "\n")
    assert len(history(tmp_path / "deep" / "er")) == 2


def test_a_run_that_measured_nothing_says_nothing():
    finished = compare(plan(), allocated_gib=None, tokens_per_s=None)
    assert (finished.memory, finished.speed) == (None, None)
    assert correction([finished] * 5, finished.kind) is None


def test_a_plan_keeps_its_correction_in_json():
    corrected = plan(runs(1.2, 1.2, 1.2))
    assert Plan.from_dict(json.loads(corrected.to_json())).correction == pytest.approx({"memory": 1.2, "speed": 1.2})


def test_one_run_out_of_memory_raises_memory_at_once_and_nothing_else():
    short = Finished("A100-80GB", "Llama", "lora", SIZE, "finetui", 1.3, None, at_least=True)
    found = correction([short], KIND)
    assert found is not None
    assert (found.memory, found.speed) == (1.3, 1.0)
    assert correction([*runs(1.1, 1.1, 1.1), short], KIND).memory == 1.3
    assert correction([*runs(1.4, 1.4, 1.4), short], KIND).memory == 1.4  # it needed more than that anyway
    wild = Finished("A100-80GB", "Llama", "lora", SIZE, "finetui", 9.0, None, at_least=True)
    assert correction([wild], KIND).memory == 1.5
    base, expected = plan(), plan([short])
    assert expected.memory.device_gib > base.memory.device_gib
    assert expected.speed == base.speed


def test_out_of_memory_below_what_was_planned_teaches_nothing(tmp_path):
    base = plan()
    assert out_of_memory(base, needed_gib=0.9 * base.memory.allocated_gib) is None
    lesson = out_of_memory(base, needed_gib=1.03 * base.memory.allocated_gib, run="short")
    assert lesson is not None
    record(lesson, tmp_path)
    assert history(tmp_path) == [lesson]
    corrected = plan([lesson])
    assert corrected.memory.allocated_gib == pytest.approx(1.03 * base.memory.allocated_gib)
    # Once it is corrected by that, the same figure is no news.
    assert out_of_memory(corrected, needed_gib=1.03 * base.memory.allocated_gib) is None


def test_a_run_teaches_only_those_that_are_spread_and_replayed_as_it_was():
    lora = runs(1.2, 1.2, 1.2)
    split = [replace(run, strategy="fsdp") for run in lora]
    copied = [replace(run, strategy="ddp") for run in lora]
    recorded = [replace(run, graphs=True) for run in lora]
    base = plan()
    assert base.resolved.strategy == "single"
    assert plan(split + copied).memory == base.memory
    assert plan(split + copied).basis == "formula"
    assert plan(lora).basis == "calibrated"
    assert correction(recorded, KIND) is None
    assert correction(recorded, replace(KIND, graphs=True)).speed == pytest.approx(1.2)
    two = Recipe.build({"model": "m", "tuning": "lora", "micro_batch": 4, "hardware": {"gpus": 2, "strategy": "ddp"}})
    node = Node(find_gpu("A100"), count=2)
    assert make_plan(two, LLAMA, node, finished=copied).basis == "calibrated"
    assert make_plan(two, LLAMA, node, finished=lora + split).basis == "formula"


def test_what_a_plan_teaches_is_of_its_own_kind():
    base = plan()
    sharded = replace(base, resolved=replace(base.resolved, strategy="fsdp", graphs=True))
    for made in (base, sharded):
        finished = compare(made, allocated_gib=30.0, tokens_per_s=1000.0)
        assert finished.kind == Kind.of(made)
    assert (Kind.of(sharded).strategy, Kind.of(sharded).graphs) == ("fsdp", True)


def test_lines_of_a_release_that_did_not_note_how_a_run_was_spread_teach_nothing(tmp_path):
    record(runs(1.1)[0], tmp_path)
    file = tmp_path / "calibration.jsonl"
    old = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("strategy", "graphs")}
    with file.open("a") as out:
        out.write(json.dumps(old) + "\n")
    assert len(history(tmp_path)) == 1


def test_the_interval_of_speed_moves_along_with_it():
    by = Correction(speed=0.8, runs=3)
    speed = Speed(1000.0, 2.0, 0.5, {"forward": 2.0}, low_tokens_per_s=900.0, high_tokens_per_s=1200.0)
    corrected = corrected_speed(speed, by)
    assert (corrected.low_tokens_per_s, corrected.high_tokens_per_s) == pytest.approx((720.0, 960.0))
    assert corrected.low_tokens_per_s < corrected.tokens_per_s < corrected.high_tokens_per_s
