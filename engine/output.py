"""What a run leaves behind: an adapter or a full model that plain ``from_pretrained`` loads, written atomically."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..planner.errors import RunError
from .durable import flush, flush_all, is_disk_error, reported_as_disk_error


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` to write into; it takes the name when the block ends well, else it goes.

    All of it is on the disk by then. An older folder of that name is replaced at that moment and not before.

    Raises:
        RunError: there is no place for a folder: what should hold it is a file, or not this user's to write to.
        TrainingError: the disk is full (cause ``disk``).
    """
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with reported_as_disk_error("the result can't be written", target.parent):
            _make(partial, target)
            yield partial
            flush_all(partial)
            old = target.with_name(f".old-{target.name}")
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                os.rename(target, old)
            os.rename(partial, target)
            flush(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _make(partial: Path, target: Path) -> None:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        if is_disk_error(error):
            raise
        do = "Choose a folder that you may write to."
        raise RunError(f"the folder can't be made ({error.strerror})", where=str(target), do=do) from None


def set_generation(model: Any, tokenizer: Any) -> None:
    """Make the model stop where it was trained to stop: at the end token, and at what ends a turn of the template.

    A wrong list here is how a well-trained model comes to talk without end in whatever serves it. A model that does not
    generate, as a reward model, stays as it is.
    """
    if not model.can_generate():
        return
    from transformers import GenerationConfig

    from .data.template import stop_token_ids

    stops = stop_token_ids(tokenizer)
    before = model.generation_config
    known = before.eos_token_id if isinstance(before.eos_token_id, list) else [before.eos_token_id]
    stops += [token for token in known if token is not None and token not in stops]
    config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else before.bos_token_id,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    for name in ("temperature", "top_p", "top_k", "do_sample"):
        value = getattr(before, name, None)
        if value is not None:
            setattr(config, name, value)
    model.generation_config = config


def write_output(target: Path, save: Callable[[Path], None], model: Any) -> None:
    """Fill ``target`` with what ``save`` writes and, of a model that generates, the generation config."""
    with written_whole(target) as partial:
        save(partial)
        if model.can_generate():
            model.generation_config.save_pretrained(str(partial))
