"""Prompts for reinforcement learning on disk: text or messages, their tokens, and every column a reward may ask for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...planner.errors import DataError
from ...planner.rollout import SHIPPED_REWARDS, Reward, column_of


def write_prompts(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as an Arrow stream, and give a mark of all they hold. Tools are kept as JSON text, which is how TRL
    reads them. Where some rows have several right answers, all have a list of them.

    Raises:
        DataError: the values of a column are of different types, so that no reward could rely on them.
    """
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    fields, arrays = [], []
    for name in names:
        values = [row.get(name) for row in rows]
        if name == "tools":
            values = [None if value is None else json.dumps(value) for value in values]
        if name == "answer" and any(isinstance(value, list) for value in values):
            values = [[value] if isinstance(value, str) else value for value in values]
        try:
            array = pa.array(values, type=pa.list_(pa.int32()) if name == "prompt_ids" else None)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            what = f"column {name!r} holds values of different types ({str(error).splitlines()[0]})"
            raise DataError(what, where="data", do="Make them all of one type, for example text.") from None
        fields.append(pa.field(name, array.type))
        arrays.append(array)
    schema = pa.schema(fields)
    with pa.ipc.new_stream(str(path), schema) as stream:
        stream.write_table(pa.Table.from_arrays(arrays, schema=schema), max_chunksize=4096)
    mark = hashlib.sha256()
    for row in rows:
        mark.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return mark.hexdigest()[:24]


def unjudged(rewards: Sequence[Reward], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A warning for each shipped reward that can say nothing about some of the prompts, since these rows have nothing
    to compare with; where that is all of them, the run ends with an error of its own."""
    for reward in rewards:
        if reward.function not in SHIPPED_REWARDS or reward.function == "regex" or reward.json_schema is not None:
            continue
        column = column_of(reward)
        bare = sum(row.get(column) in (None, []) for row in rows)
        if 0 < bare < len(rows):
            count = f"{bare:,} of {len(rows):,} prompts"
            yield f"{count} have nothing in column {column!r}, so {reward.name} can't judge their answers"
