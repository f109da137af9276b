"""Which models fit one GPU: as ``fit`` reckons each, in the order that is asked for, and what choosing one changes."""

from __future__ import annotations

import pytest

from finetui.planner.fit import fit_table
from finetui.planner.hardware import find_gpu
from finetui.tui.model_list import LENGTH, ModelList, count_fitting, glyph, length_of, listed, models_on, on_model

SMALL = ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B", "meta-llama/Llama-3.1-405B", "openai/gpt-oss-20b"]


@pytest.fixture(scope="module")
def found() -> ModelList:
    return models_on(find_gpu("RTX4090"), 1024, SMALL)


def names(found: ModelList, **how: object) -> list[str]:
    return [row.name.split("/")[1] for row in listed(found.rows, **how)]  # type: ignore[arg-type]


def test_each_figure_is_that_of_fit(found: ModelList) -> None:
    from finetui.planner.architecture import Architecture
    from finetui.planner.hub import find_config

    name, config, _ = find_config("Qwen/Qwen3-8B")
    alone = fit_table(Architecture.from_config(config, name), [find_gpu("RTX4090")], sequence_lengths=[1024])
    row = next(row for row in found.rows if row.name == name)
    assert list(row.fits.values()) == alone
    assert (found.gpu, found.length) == ("RTX-4090", 1024)
    assert row.longest == 40_960


def test_of_a_mixture_of_experts_few_parameters_are_at_work(found: ModelList) -> None:
    active = {row.name.split("/")[1]: row.active / row.parameters for row in found.rows}
    assert active["gpt-oss-20b"] < 0.25
    assert active["Qwen3-8B"] == 1


def test_what_fits_comes_first_and_the_rest_only_on_request(found: ModelList) -> None:
    fitting = names(found)
    assert "Llama-3.1-405B" not in fitting
    assert len(fitting) == count_fitting(found.rows)
    assert names(found, everything=True)[: len(fitting)] == fitting
    assert names(found, everything=True)[len(fitting) :] == ["Llama-3.1-405B", "gpt-oss-20b"]


def test_sorted_and_filtered(found: ModelList) -> None:
    assert names(found, words="qwen3 qwen") == ["Qwen3-32B", "Qwen3-8B", "Qwen3-0.6B"]
    assert names(found, words="qwen3", sort="speed")[0] == "Qwen3-0.6B"
    assert names(found, words="qwen3", sort="memory")[0] == "Qwen3-0.6B"
    assert names(found, words="nothing") == []


def test_the_wanted_tuning_where_it_fits_else_the_fullest_that_does(found: ModelList) -> None:
    by_name = {row.name.split("/")[1]: row for row in found.rows}
    small, large = by_name["Qwen3-0.6B"], by_name["Qwen3-32B"]
    assert getattr(small.best("qlora"), "tuning", "") == "qlora"
    assert getattr(small.best(), "tuning", "") == "full"
    assert getattr(large.best("lora"), "tuning", "") == "qlora"
    assert by_name["Llama-3.1-405B"].best("qlora") is None


def test_choosing_a_model_changes_the_tuning_only_where_it_has_to(found: ModelList) -> None:
    by_name = {row.name.split("/")[1]: row for row in found.rows}
    draft = {"model": "a/b", "tuning": {"type": "lora", "rank": 8}, "epochs": 2}
    small = on_model(draft, by_name["Qwen3-0.6B"])
    assert small == {"model": "Qwen/Qwen3-0.6B", "tuning": {"type": "lora", "rank": 8}, "epochs": 2}
    large = on_model(draft, by_name["Qwen3-32B"])
    assert large["tuning"] == {"type": "qlora", "rank": 8}
    assert on_model({"model": "a/b", "tuning": "vera"}, by_name["Qwen3-32B"])["tuning"] == "vera"  # not reckoned here


def test_a_tight_fit_is_marked(found: ModelList) -> None:
    for row in found.rows:
        for fit in row.fits.values():
            expected = "✘" if not fit.fits else "!" if fit.high_gib > fit.memory_gib else "✔"
            assert glyph(fit) == expected


@pytest.mark.parametrize(("text", "length"), [("auto", LENGTH), ("4096", 4096), (512, 512), ("long", LENGTH)])
def test_the_length_of_rows_is_that_of_the_draft(text: object, length: int) -> None:
    assert length_of({"model": "a/b", "sequence_length": text}) == length
