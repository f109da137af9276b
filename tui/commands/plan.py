"""``finetui plan``: what a fine-tune will need, take and cost, with the terms and the reasons."""

from __future__ import annotations

from ...engine.planning import plan_for
from .options import (
    CheckpointingFlag,
    DataFlag,
    FrameworkFlag,
    GpuFlag,
    GpusFlag,
    JsonFlag,
    MethodFlag,
    MicroBatchFlag,
    OptimizerFlag,
    RankFlag,
    SeqLenFlag,
    SetFlag,
    Target,
    TargetsFlag,
    TuningFlag,
    recipe_from,
)


def plan(
    target: Target = None,
    method: MethodFlag = None,
    tuning: TuningFlag = None,
    rank: RankFlag = None,
    targets: TargetsFlag = None,
    data: DataFlag = None,
    gpu: GpuFlag = None,
    gpus: GpusFlag = None,
    seq_len: SeqLenFlag = None,
    micro_batch: MicroBatchFlag = None,
    checkpointing: CheckpointingFlag = None,
    optimizer: OptimizerFlag = None,
    framework: FrameworkFlag = "finetui",
    overrides: SetFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Memory, speed, time and cost of a fine-tune, before anything is downloaded."""
    recipe = recipe_from(
        target,
        method=method,
        tuning=tuning,
        rank=rank,
        targets=targets,
        data=data,
        gpu=gpu,
        gpus=gpus,
        seq_len=seq_len,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        optimizer=optimizer,
        overrides=overrides,
    )
    result = plan_for(recipe, framework=framework)
    if as_json:
        print(result.to_json())
        return
    from ..plan_view import print_plan

    print_plan(result)
