"""Advice: every piece has its source, its settings make a recipe, and cards are chosen by the planner's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetui.planner.advisor import GOALS, WORKFLOWS, advise
from finetui.planner.architecture import Architecture
from finetui.planner.hardware import PRESETS, find_gpu, load_catalog
from finetui.planner.hub import find_config
from finetui.planner.recipe import Recipe
from finetui.planner.survey import kind_of_rows, survey
from finetui.tui.cli import main

LLAMA = Architecture.from_config(find_config("meta-llama/Llama-3.1-8B")[1], "Llama-3.1-8B")


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (("prompt", "chosen", "rejected"), "pairs"), (("prompt", "completion", "label"), "labels"),
        (("messages",), "examples"), (("instruction", "output"), "examples"), (("conversations",), "examples"),
        (("question", "answer"), "checkable"), (("problem", "solution"), "checkable"), (("text",), "text"),
        (("x", "y"), "unknown"),
    ],
)  # fmt: skip
def test_data_is_recognised_by_its_keys(keys, kind):
    assert kind_of_rows([dict.fromkeys(keys, "v"), dict.fromkeys((*keys, "more"), "v")]) == kind


def test_no_rows_are_no_kind():
    assert kind_of_rows([]) == "unknown"


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("examples", [0, 50, 5_000, 500_000])
@pytest.mark.parametrize("data", ["text", "examples", "pairs", "labels", "checkable", "unknown"])
def test_every_advice_names_its_source_and_makes_a_recipe(goal, examples, data):
    for item in advise(goal=goal, data=data, examples=examples):
        assert item.question
        assert item.answer
        assert "arXiv:" in item.source or "planner" in item.source
        if item.settings:
            Recipe(model="m").with_overrides(item.settings)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"chosen": "a", "rejected": "a"}, {"chosen": "a", "rejected": "b"}], ["1 of 2 pairs have the same answer"]),
        ([{"prompt": "p", "chosen": "long " * 9, "rejected": "short"}], ["times as long", "simpo"]),
        ([{"prompt": str(i), "completion": "c", "label": i < 3} for i in range(12)], ["3 good and 9 bad", "3.00"]),
        (
            [{"prompt": str(i // 2), "completion": "c", "label": i % 2 == 0} for i in range(8)],
            ["4 of 4 prompts", "dpo"],
        ),
        ([{"prompt": "p", "completion": "c", "label": True}], ["no answer is marked bad", "sft"]),
        ([{"prompt": "p", "chosen": "yes", "rejected": "no"}], []),
        ([{"messages": []}], []),
    ],
)
def test_rows_of_preferences_are_surveyed(rows, words):
    remarks = survey(rows)
    told = " ".join(f"{remark.what} {remark.do}" for remark in remarks)
    assert bool(remarks) == bool(words)
    assert all(word in told for word in words)
    for item in advise(data=kind_of_rows(rows), remarks=remarks):
        assert "arXiv:" in item.source
        if item.settings:
            Recipe(model="m").with_overrides(item.settings)


def test_conversations_count_by_their_words():
    rows = [{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 90}],
             "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]  # fmt: skip
    assert "times as long" in survey(rows)[0].what


def test_more_examples_get_a_larger_adapter():
    ranks = [
        next(item.settings["tuning.rank"] for item in advise(examples=count) if item.settings)
        for count in (50, 5_000, 500_000)
    ]
    assert ranks == sorted(set(ranks))


def test_cards_are_those_that_fit_and_the_cheapest_first():
    found = {item.settings["tuning.type"]: item for item in advise(LLAMA) if item.settings}
    assert set(found) == {"qlora", "lora", "full"}
    memory = [load_catalog()[found[name].settings["hardware.gpu"]].memory_gib for name in ("qlora", "lora", "full")]
    assert memory[0] <= memory[1] <= memory[2]
    assert all("USD per million tokens" in item.answer for item in found.values())
    mine = next(item for item in advise(LLAMA, gpu=find_gpu("RTX-4090")) if item.settings)
    assert mine.answer == "up to lora"
    large = Architecture.from_config(find_config("meta-llama/Llama-3.1-405B")[1], "405B")
    assert "no" in [item.answer for item in advise(large, gpu=find_gpu("T4"))]


def test_each_workflow_is_a_recipe_that_loads():
    names = ["first-finetune", "production", "alignment"]
    told = " ".join(item.answer for item in WORKFLOWS)
    for name in names:
        recipe = Recipe.load(PRESETS / f"{name}.yaml")
        assert name in told
        assert all(Path(source.path).is_file() for source in recipe.data)


def test_the_command_answers_in_json_and_refuses_an_unknown_goal(tmp_path, capsys):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 30)
    with pytest.raises(SystemExit) as done:
        main(["advise", "Qwen/Qwen3-8B", "--data", str(rows), "--json"])
    assert done.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["data"], answer["examples"]) == ("pairs", 30)
    assert "dpo" in [item["answer"] for item in answer["advice"]]
    with pytest.raises(SystemExit) as wrong:
        main(["advise", "--goal", "fame"])
    assert wrong.value.code == 2
