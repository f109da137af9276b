"""What a teacher adds to a plan: its weights, its pass, its download; and which recipes can have one."""

from __future__ import annotations

import json

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.errors import ModelError, RecipeError
from finetui.planner.hardware import Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.plan import Plan, Workload
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan
from finetui.planner.teacher import find_teacher, teacher_of
from finetui.planner.terms import explain_terms

STUDENT, TEACHER = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"


def recipe(student=STUDENT, **keys):
    wanted = {"teacher": TEACHER, **keys.pop("distillation", {})}
    return Recipe.build({"model": student, "method": "distill", "tuning": "lora", "distillation": wanted, **keys})


def shape(name):
    return Architecture.from_config(find_config(name)[1], name)


def planned(asked, gpu="H200", count=1, **more):
    return make_plan(asked, shape(asked.model), Node(find_gpu(gpu), count), **more)


def alike(asked, method):
    """The same plan without its teacher: micro-batch and checkpointing are said, so that nothing else differs."""
    tree = {key: value for key, value in asked.to_dict().items() if key not in ("distillation", "method")}
    return planned(Recipe.build({**tree, "method": method}))


FIXED = {"micro_batch": 4, "batch_size": 16, "sequence_length": 1024, "hardware": {"checkpointing": "full"}}


def test_weights_are_those_of_both():
    with_teacher, alone = planned(recipe(**FIXED)), alike(recipe(**FIXED), "sft")
    added = with_teacher.memory.terms["weights"] - alone.memory.terms["weights"]
    assert added == pytest.approx(2 * shape(TEACHER).parameters / 2**30, rel=1e-6)


def test_four_bits_take_a_third_of_it():
    packed = planned(recipe(**FIXED, distillation={"quantization": "nf4"})).memory.terms["weights"]
    whole = planned(recipe(**FIXED)).memory.terms["weights"]
    linear, every = shape(TEACHER).linear_weights, shape(TEACHER).parameters
    stored = linear * 0.516 + 2 * (every - linear)
    assert whole - packed == pytest.approx((2 * every - stored) / 2**30, rel=1e-3)


def test_a_step_takes_the_teachers_pass_longer():
    with_teacher, alone = planned(recipe(**FIXED)), alike(recipe(**FIXED), "sft")
    gpu = find_gpu("H200")
    least = 16 * 1024 * 2 * shape(TEACHER).layer_matmul_weights / (gpu.bf16_tflops * 1e12)
    assert least < with_teacher.speed.terms["teacher"] < 4 * least
    for name in ("forward", "backward", "recompute", "attention", "elementwise", "optimizer"):
        assert with_teacher.speed.terms[name] == pytest.approx(alone.speed.terms[name]), name
    # While the device is busy with the teacher, the host is ahead with the student's kernels.
    assert with_teacher.speed.terms["launch"] < alone.speed.terms["launch"]


def test_no_logits_stand_whole():
    one, four = (planned(recipe(**{**FIXED, "micro_batch": n})).memory.terms["logits"] for n in (1, 4))
    words = shape(STUDENT).vocab + shape(TEACHER).vocab
    assert four < 4 * 1024 * words * 4 / 2**30
    assert four - one < 3 * 1024 * 10_000 / 2**30 + 0.01  # hidden states alone


def test_what_was_measured_is_what_is_planned():
    """LoRA of a 1B from an 8B, 4 rows of 2,048 tokens, on an H200: 22,294 tokens/s and 24.87 GiB allocated."""
    student, elder = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"
    hardware = {"precision": "bf16", "checkpointing": "none"}
    asked = recipe(
        student, distillation={"teacher": elder}, sequence_length=2048, batch_size=4, micro_batch=4, hardware=hardware
    )
    plan = planned(asked, workload=Workload(72, 72 * 2048, 2048, basis="counted"))
    assert plan.speed.tokens_per_s == pytest.approx(22_294, rel=0.05)
    assert plan.memory.allocated_gib == pytest.approx(24.87, rel=0.02)
    assert plan.speed.low_tokens_per_s < 0.9 * plan.speed.tokens_per_s  # one run was measured, and no other shape


@pytest.mark.parametrize("wanted", [{"divergence": "jsd"}, {"temperature": 2.0}])
def test_other_divergences_hold_and_move_more(wanted):
    plain, more = planned(recipe(**FIXED)), planned(recipe(**FIXED, distillation=wanted))
    assert more.memory.terms["logits"] > plain.memory.terms["logits"]
    assert more.speed.terms["teacher"] > plain.speed.terms["teacher"]


def test_both_models_are_downloaded():
    asked = recipe(**FIXED)
    _, terms = explain_terms(asked, shape(STUDENT), Node(find_gpu("H200"), 1, local=False))
    downloaded = next(part for part in terms["time"].parts if part.what == "download")
    both = 2 * (shape(STUDENT).parameters + shape(TEACHER).parameters)
    assert downloaded.sum.startswith(f"{both / 1e9:,.1f} GB")
    (told,) = [reason for reason in planned(asked).reasons if reason.setting == "teacher"]
    assert told.value == TEACHER
    assert "GB to download" in told.why


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_every_figure_is_made_of_its_parts(quantization):
    asked = recipe(**FIXED, distillation={"quantization": quantization})
    plan, terms = explain_terms(asked, shape(STUDENT), Node(find_gpu("A100-40GB"), 1))
    assert any(part.what == "the frozen teacher" for part in terms["weights"].parts)
    assert len(terms["teacher"].parts) >= 4
    assert plan.memory.moment in ("loss", "teacher", "backward")
    for term in terms.values():
        assert sum(part.amount for part in term.parts) == pytest.approx(term.amount, rel=0.01, abs=2e-3), term.name
        assert not [part for part in term.parts if part.what == "other"], term.name


def test_several_gpus_hold_it_each_and_the_model_is_not_split():
    two = planned(recipe(**FIXED), count=2)
    assert two.resolved.strategy == "ddp"
    assert two.memory.terms["weights"] == pytest.approx(planned(recipe(**FIXED)).memory.terms["weights"])
    with pytest.raises(RecipeError, match="the models of distill are not split"):
        planned(recipe(**{**FIXED, "hardware": {"strategy": "fsdp", "gpus": 2}}), count=2)


def test_what_lowers_memory_is_the_teacher_where_it_is_the_larger():
    assert planned(recipe(**FIXED)).memory.lever == "distillation.quantization: nf4"


def test_a_plan_keeps_its_teacher(tmp_path):
    asked = recipe(**FIXED, distillation={"quantization": "nf4"})
    plan = planned(asked)
    told = plan.to_dict()["teacher"]
    assert (told["name"], told["parameters"], told["quantization"]) == (TEACHER, shape(TEACHER).parameters, "nf4")
    assert told["weights_gib"] < told["download_gib"] == pytest.approx(2 * shape(TEACHER).parameters / 2**30)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").teacher.name == TEACHER
    assert alike(asked, "sft").to_dict()["teacher"] is None


def test_a_teacher_that_is_too_large_is_packed():
    large = planned(recipe(**FIXED, distillation={"teacher": "Qwen/Qwen2.5-72B"}), "H100-80GB")
    assert not large.fits
    assert large.warnings[0].startswith("distillation.quantization: nf4 with micro_batch: 1 would fit")
    packed = {"teacher": "Qwen/Qwen2.5-72B", "quantization": "nf4"}
    assert planned(recipe(**FIXED, distillation=packed), "H100-80GB").fits


def test_padded_vocabularies_go_together_and_others_do_not():
    assert (shape(STUDENT).vocab, shape(TEACHER).vocab) == (151_936, 152_064)
    teacher_of(recipe(), shape(STUDENT))
    with pytest.raises(RecipeError, match="128,256 words and the student 151,936") as error:
        planned(recipe(distillation={"teacher": "meta-llama/Llama-3.1-8B"}))
    assert error.value.where == "distillation.teacher"
    assert "family" in error.value.do


def test_other_programs_are_not_guessed_at():
    with pytest.raises(RecipeError, match="what distill takes in trl is not known"):
        planned(recipe(), framework="trl")


def test_a_teacher_is_a_model_a_run_or_an_adapter(tmp_path):
    assert find_teacher(TEACHER).base == TEACHER
    output = tmp_path / "run" / "output"
    output.mkdir(parents=True)
    (output / "config.json").write_text("{}")
    assert find_teacher(str(tmp_path / "run")).base == str(output)
    (output / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": TEACHER}))
    found = find_teacher(str(tmp_path / "run"))
    assert (found.base, found.adapter) == (TEACHER, output)
    (output / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base model"):
        find_teacher(str(output))


def test_a_teacher_that_is_not_there_is_told_by_its_own_field(tmp_path):
    with pytest.raises(ModelError, match="there is no folder or model") as error:
        planned(recipe(distillation={"teacher": str(tmp_path / "nowhere")}))
    assert error.value.where == "distillation.teacher"


def test_weights_that_can_not_be_read_so_are_refused(tmp_path):
    config = find_config(TEACHER)[1]
    packed = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": packed}))
    with pytest.raises(ModelError) as error:
        planned(recipe(distillation={"teacher": str(tmp_path)}))
    assert error.value.do == "Set distillation.quantization: nf4."
    assert planned(recipe(distillation={"teacher": str(tmp_path), "quantization": "nf4"})).fits


@pytest.mark.parametrize(("keys", "what"), [
    ({"distillation": {}}, "method distill needs a teacher"),
    ({"distillation": {"teacher": "a/b", "beta": 0.3}}, "acts on divergence jsd alone"),
    ({"distillation": {"teacher": "a/b", "weight": 0}}, "weight"),
    ({"distillation": {"teacher": "a/b", "divergence": "jsd", "beta": 1.0}}, "beta"),
    ({"distillation": {"teacher": "a/b"}, "loss": "dft"}, "distill has a teacher for that"),
    ({"distillation": {"teacher": "a/b"}, "tuning": {"type": "lora", "new_tokens": ["<x>"]}}, "does not know"),
    ({"distillation": {"teacher": "a/b"}, "tuning": "prompt"}, "can't be trained with distill"),
    ({"method": "sft", "distillation": {"teacher": "a/b"}}, "distillation has no effect when method is sft"),
])  # fmt: skip
def test_options_that_can_not_act_are_refused(keys, what):
    with pytest.raises(RecipeError, match=what):
        Recipe.build({"model": STUDENT, "method": "distill", **keys})


def test_paths_of_teachers_are_those_of_the_recipes_folder(tmp_path):
    (tmp_path / "elder").mkdir()
    text = "model: a/b\nmethod: distill\ndistillation: {{teacher: {}}}\n"
    (tmp_path / "near.yaml").write_text(text.format("./elder"))
    assert Recipe.load(tmp_path / "near.yaml").distillation.teacher == str(tmp_path / "elder")
    (tmp_path / "far.yaml").write_text(text.format(TEACHER))
    assert Recipe.load(tmp_path / "far.yaml").distillation.teacher == TEACHER
