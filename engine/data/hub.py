"""Rows of a hub dataset, through the ``datasets`` library, with its failures told in plain words.

``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are honoured by that library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...planner.datasource import DataSource
from ...planner.errors import DataError, HubError, MissingExtraError, UserError
from .files import Row

#: Names under which datasets keep the rows that are not for training, in the order we look for them.
EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")


def load_hub(source: DataSource, *, streaming: bool = False) -> Any:
    """The ``datasets.Dataset`` (or ``IterableDataset``) of a source's split.

    Raises:
        HubError: gated, not found, or out of reach.
        DataError: no such split, or the subset has to be named.
        MissingExtraError: the ``train`` extra is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(f"reading the hub dataset {source.path}", "train") from None
    try:
        _probe(source.path, datasets.config)
        if source.hub_split is not None:
            return datasets.load_dataset(source.path, name=source.subset, split=source.hub_split, streaming=streaming)
        splits = datasets.load_dataset(source.path, name=source.subset, streaming=streaming)
    except Exception as error:
        raise explain(error, source.path) from error
    wanted = ("train",) if source.split == "train" else EVAL_SPLITS
    name = next((name for name in wanted if name in splits), None)
    if name is None:
        found = ", ".join(splits)
        do = "Choose another dataset for this split." if source.split == "train" else "Leave it out: rows are held out."
        raise DataError(f"the dataset has no {source.split} split, only {found}", where=source.path, do=do)
    return splits[name]


def hub_mark(source: DataSource) -> str:
    """What changes when a hub dataset does: its commit if it is never stored whole, else the fingerprint of that."""
    if not source.streaming and source.limit is None:
        return str(load_hub(source)._fingerprint)
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source.path, timeout=15).sha)
    except Exception as error:
        raise explain(error, source.path) from error


def _probe(path: str, config: Any) -> None:
    """Ask for the dataset once: ``datasets`` alone retries for half a minute before it says that the hub is away."""
    if config.HF_HUB_OFFLINE or (Path(config.HF_DATASETS_CACHE) / path.replace("/", "___")).exists():
        return
    from huggingface_hub import HfApi

    HfApi().dataset_info(path, timeout=15)


def read_hub(source: DataSource, *, streaming: bool) -> Iterator[Row]:
    """Yield the rows of a hub dataset; ``where`` is ``id/split:row``."""
    dataset = load_hub(source, streaming=streaming)
    rows = enumerate(dataset, 1)
    number = 0
    while True:
        try:
            number, values = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _broken_off(error, source.path, number) from error
        yield Row(values, f"{source.path}/{dataset.split}:{number}")


def _broken_off(error: Exception, path: str, rows: int) -> UserError:
    """An error in the middle of a stream, which the client has tried to go on with many times."""
    why = explain(error, path)
    if not isinstance(why, HubError):
        return why
    do = "Start again when the network is steady, or set a limit."
    return HubError(f"the stream broke off after {rows:,} rows: {why.what}", where=path, do=do)


def explain(error: Exception, path: str) -> UserError:
    """What an exception of ``datasets`` or the hub client means, and what to do about it."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    text = " ".join(str(item) for item in chain)
    kinds = {kind.__name__ for item in chain for kind in type(item).__mro__}
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if "scripts are no longer supported" in text or "trust_remote_code" in text:
        do = "Look for a version of it with .parquet or .jsonl files, such as its refs/convert/parquet branch."
        return DataError("the dataset is a program that makes it, and finetui runs none", where=path, do=do)
    missing = f"there is neither a file nor a hub dataset called {path!r}"
    if "GatedRepoError" in kinds or "is a gated dataset" in text:
        do = f"Accept its terms at {endpoint}/datasets/{path}, then set HF_TOKEN."
        return HubError("the dataset is gated", where=path, do=do)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"} or "OfflineModeIsEnabled" in kinds:
        do = "Unset HF_HUB_OFFLINE, or give a local file."
        return HubError("the dataset is not in the cache, and the hub is switched off", where=path, do=do)
    if configs := re.search(r"pick one among the available configs: (\[.*?\])", text):
        what = "a subset of the dataset must be named"
        return DataError(what, where=path, do=f"Set subset: to one of {configs.group(1)}.")
    if configs := re.search(r"BuilderConfig '(.*?)' not found. Available: (\[.*?\])", text):
        what = f"the dataset has no subset {configs.group(1)!r}"
        return DataError(what, where=path, do=f"Set subset: to one of {configs.group(2)}.")
    if (unknown := re.search(r'Unknown split "(.*?)"\. Should be one of (\[.*?\])', text)) or (
        unknown := re.search(r"Bad split: (.*?)\. Available splits: (\[.*?\])", text)
    ):
        what = f"the dataset has no split {unknown.group(1)!r}"
        return DataError(what, where=path, do=f"Set hub_split: to one of {unknown.group(2)}.")
    if kinds & {"ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "Timeout", "TimeoutException"}:
        do = f"There is no such file here; for a hub dataset, check the network and HF_ENDPOINT ({endpoint})."
        return HubError("the hub can't be reached", where=path, do=do)
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return HubError(missing, where=path, do="Check the name; a private dataset needs HF_TOKEN.")
    what = f"the dataset can't be loaded ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return DataError(what, where=path, do="Check the name, or give a local file.")
