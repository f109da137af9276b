"""Distillation as a run: against plain torch, packed, resumed, measured, and by teachers of all kinds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import torch
from torch.nn.functional import cross_entropy, kl_div

from finetui.engine.data.prepare import prepare
from finetui.engine.evaluate import data_cache, data_settings
from finetui.engine.models.load import load_tokenizer
from finetui.engine.run import Run
from finetui.engine.trainers.order import Order
from finetui.engine.worker import attempt

from .conftest import events, losses, pairs
from .test_method_ranks import on_two_ranks

STEPS, MICRO, RATE = 10, 4, 1e-2
MakeRun = Callable[..., Run]
PowerCut = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Path:
    """A wider model with the student's tokenizer, a vocabulary that is padded further, and sure of what it says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    target = tmp_path_factory.mktemp("teachers") / "qwen3"
    shutil.copytree(model_folder("llama"), target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = AutoConfig.for_model(
        "qwen3", vocab_size=322, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    model.save_pretrained(target)
    return target


def chats() -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]


@pytest.fixture
def distil(method_run: MakeRun, teacher_folder: Path) -> MakeRun:
    """A run of distill over :func:`chats`."""

    def make(tuning: str = "lora", wanted: dict[str, Any] | None = None, **more: Any) -> Run:
        recipe = {"distillation": {"teacher": str(teacher_folder), **(wanted or {})}, **more.pop("recipe", {})}
        return method_run("distill", tuning, recipe, rows=chats(), **{"learning_rate": RATE, "steps": 4, **more})

    return make


def done(run: Run) -> Run:
    assert attempt(run) == 0, run.events_path.read_text()
    return run


def told(run: Run, name: str) -> list[float]:
    return [e["values"][name] for e in events(run, "metrics") if name in e["values"]]


def prepared(run: Run) -> Any:
    """The rows of a run that is over."""
    tokenizer, _ = load_tokenizer(Path(run.recipe.model))
    return prepare(run.recipe, data_settings(run.plan.resolved), tokenizer, data_cache(run))


def plainly(run: Run, teacher: Path, tuning: str, wanted: dict[str, Any], accumulation: int) -> tuple[Any, Any]:
    """Losses of ten steps in plain torch over whole logits, and the weights that come out."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from finetui.engine.data.packing import Collator

    student: Any = AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=torch.float32)
    master: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    if tuning == "lora":
        torch.manual_seed(0)
        student = get_peft_model(student, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    rows, collate = prepared(run).train, Collator(0)
    batches = iter(Order(rows=len(rows), steps=STEPS, micro_batch=MICRO, accumulation=accumulation, seed=0,
                         lengths=[len(row["input_ids"]) for row in rows] if accumulation > 1 else None))  # fmt: skip
    heat, weight = wanted.get("temperature", 1.0), wanted.get("weight", 0.5)
    losses = []
    for _ in range(STEPS):
        step = [collate([rows[i] for i in next(batches)]) for _ in range(accumulation)]
        items = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in step)
        total = 0.0
        for batch in step:
            labels = batch.pop("labels")[:, 1:]
            kept = labels >= 0
            mine = student(**batch).logits[:, :-1][kept]
            with torch.no_grad():
                theirs = (master(**batch).logits[:, :-1][kept][:, :320] / heat).log_softmax(-1)
            ours = (mine / heat).log_softmax(-1)
            if wanted.get("divergence") == "reverse-kl":
                divergence = kl_div(theirs, ours, reduction="sum", log_target=True)
            else:
                divergence = kl_div(ours, theirs, reduction="sum", log_target=True)
            loss = weight * divergence + (1 - weight) * cross_entropy(mine, labels[kept], reduction="sum")
            (loss / items).backward()
            total += loss.item() / items
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, student


@pytest.mark.parametrize(("tuning", "wanted", "accumulation"), [
    ("full", {}, 2),
    ("full", {"divergence": "reverse-kl", "temperature": 2.0, "weight": 0.8}, 1),
    ("lora", {"weight": 1.0}, 1),
])  # fmt: skip
def test_ten_steps_are_those_of_plain_torch(
    distil: MakeRun, teacher_folder: Path, tuning: str, wanted: dict[str, Any], accumulation: int
) -> None:
    """Micro-batches of unequal length make a step, whose mean is over its tokens; so are the weights that come out."""
    from safetensors.torch import load_file

    run = done(distil(tuning, wanted, steps=STEPS, accumulation=accumulation))
    theirs, model = plainly(run, teacher_folder, tuning, wanted, accumulation)
    assert losses(run) == pytest.approx(theirs, rel=2e-5)
    if tuning == "full":
        made = load_file(run.output_path / "model.safetensors")
        weights = dict(model.named_parameters())
        for name, tensor in made.items():
            torch.testing.assert_close(tensor.float(), weights[name].detach(), rtol=0, atol=2e-4)


def test_figures_tell_both_parts_of_the_loss(distil: MakeRun) -> None:
    run = done(distil(wanted={"weight": 0.3}, recipe={"evaluation": {"holdout": 0.25, "every": 2}}))
    parts = zip(told(run, "divergence"), told(run, "cross_entropy"), strict=True)
    assert losses(run) == pytest.approx([0.3 * d + 0.7 * c for d, c in parts], rel=1e-5)
    held_out = zip(told(run, "eval_divergence"), told(run, "eval_cross_entropy"), strict=True)
    assert [e["loss"] for e in events(run, "eval")] == pytest.approx([0.3 * d + 0.7 * c for d, c in held_out], rel=1e-5)
    assert told(run, "eval_divergence")[-1] < told(run, "eval_divergence")[0]
    assert all(0 <= share <= 1 for share in told(run, "token_accuracy"))


def test_held_out_figures_are_those_of_the_model_before_training(distil: MakeRun, teacher_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = done(distil("full", recipe={"evaluation": {"holdout": 0.25, "every": 2}}, steps=2))
    student: Any = AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=torch.float32)
    master: Any = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    divergence = cross = count = 0.0
    for row in prepared(run).evaluation:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        kept = labels >= 0
        with torch.no_grad():
            mine, theirs = student(ids).logits[0, :-1][kept], master(ids).logits[0, :-1][kept][:, :320]
        divergence += kl_div(mine.log_softmax(-1), theirs.softmax(-1), reduction="sum").item()
        cross += cross_entropy(mine, labels[kept], reduction="sum").item()
        count += int(kept.sum())
    assert told(run, "eval_divergence")[0] == pytest.approx(divergence / count, rel=1e-4)
    assert told(run, "eval_cross_entropy")[0] == pytest.approx(cross / count, rel=1e-4)


def test_packed_rows_teach_the_same(distil: MakeRun) -> None:
    """One step over all rows: documents of a row see each other neither in the student nor in the teacher."""
    plain = done(distil(steps=1, micro_batch=24))
    packed = done(distil(steps=1, micro_batch=1, packing=True, accumulation=_packed_rows(distil)))
    for name in ("divergence", "cross_entropy"):
        assert told(packed, name) == pytest.approx(told(plain, name), rel=1e-5), name


def _packed_rows(distil: MakeRun) -> int:
    """How many rows all chats fill."""
    return len(prepared(done(distil(steps=1, micro_batch=1, packing=True))).train)


@pytest.mark.parametrize(("tuning", "wanted"), [("lora", {}), ("full", {"divergence": "jsd", "beta": 0.3})])
def test_a_run_that_is_cut_goes_on_exactly(
    distil: MakeRun, power_cut: PowerCut, tuning: str, wanted: dict[str, Any]
) -> None:
    whole, cut = done(distil(tuning, wanted, steps=6)), distil(tuning, wanted, steps=6)
    with power_cut():
        assert attempt(cut) == 1
    done(cut)
    assert losses(cut) == losses(whole)
    name = "adapter_model.safetensors" if tuning == "lora" else "model.safetensors"
    assert (cut.output_path / name).read_bytes() == (whole.output_path / name).read_bytes()


def test_a_student_learns_what_its_teacher_says(distil: MakeRun) -> None:
    run = done(distil("full", {"weight": 1.0}, steps=30))
    first, *_, last = told(run, "divergence")
    assert last < 0.5 * first


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_and_its_adapter_teach(method_run: MakeRun, distil: MakeRun, quantization: str) -> None:
    """The teacher is the base with the adapter on it: a student that is that base is as far from it as SFT went."""
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    elder = done(method_run("sft", "lora", rows=chats(), steps=4, learning_rate=RATE))
    for folder in (elder.path, elder.output_path):
        run = done(distil(wanted={"teacher": str(folder), "quantization": quantization}, steps=1))
        (far,) = told(run, "divergence")
        assert 0.01 < far < 5
    base = done(distil(wanted={"teacher": elder.recipe.model}, steps=1))
    assert told(base, "divergence")[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_two_ranks_train_like_one(distil: MakeRun) -> None:
    recipe = {"evaluation": {"holdout": 0.3, "every": 2}}
    one = done(distil(recipe=recipe, micro_batch=2, accumulation=4))
    two = distil(recipe=recipe, micro_batch=2, accumulation=2, gpus=[0, 1], strategy="ddp")
    on_two_ranks(two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert events(two, "step")[-1]["tokens"] == events(one, "step")[-1]["tokens"]
    for name in ("divergence", "cross_entropy", "token_accuracy", "eval_divergence", "eval_cross_entropy"):
        assert told(two, name) == pytest.approx(told(one, name), rel=1e-4), name


def test_a_teacher_of_other_words_is_refused_before_it_is_loaded(distil: MakeRun, teacher_folder: Path) -> None:
    other = teacher_folder.parent / "other"
    shutil.copytree(teacher_folder, other, dirs_exist_ok=True)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["Ġred"], words["Ġblue"] = words.get("Ġblue", 318), words.get("Ġred", 319)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    run = distil(wanted={"teacher": str(other)})
    assert attempt(run) == 1
    (failure,) = events(run, "failure")
    assert "does not share the student's vocabulary" in failure["message"]
    assert "'Ġred'" in failure["message"] or "'Ġblue'" in failure["message"]
    assert not any(event["phase"] == "loading the model" for event in events(run, "phase"))


def test_a_loss_that_is_no_number_is_told_as_such() -> None:
    from finetui.engine.trainers.distill import _counted, _nats
    from finetui.engine.trainers.distilled_head import DistilledLoss

    def counted(divergence: float) -> list[float]:
        tensors = (torch.tensor(value, dtype=torch.float64) for value in (1.0, divergence, 2.5, 3.0))
        return [int(part) for part in _counted(DistilledLoss(*tensors))]

    right, parts, cross = counted(1 / 3)
    assert (right, _nats(cross)) == (3, 2.5)
    assert _nats(parts) == pytest.approx(1 / 3, abs=1e-6)
    assert math.isnan(_nats(counted(math.nan)[1] + parts))
    assert math.isnan(_nats(counted(math.inf)[1]))
