"""What the model of a run makes of its own held-out rows, measured anew from what the run left behind.

The figure that a run tells while it trains, and the one that ``finetui eval`` tells afterwards, have to be this one.
"""

from __future__ import annotations

from finetui.engine.chat import load_tuned
from finetui.engine.data.packing import Collator
from finetui.engine.data.prepare import prepare
from finetui.engine.evaluate import HeldOut, data_cache, data_settings, held_out_loss
from finetui.engine.models.load import Numerics
from finetui.engine.run import Run


def evaluate_run(run: Run, *, base: bool = False) -> HeldOut:
    """Loss of a run's model on its held-out rows; ``base``: that of the untouched base model instead."""
    plan, tuned = run.plan, load_tuned(run)
    prepared = prepare(run.recipe, data_settings(plan.resolved), tuned.tokenizer, data_cache(run))
    assert prepared.evaluation is not None, "no rows were held out"
    with tuned.voice(base=base) as model:
        return held_out_loss(
            model, prepared.evaluation, Collator(tuned.tokenizer.pad_token_id), batch_size=plan.resolved.micro_batch,
            device=tuned.device, context=Numerics.of(plan.resolved).context(tuned.device),
        )  # fmt: skip
