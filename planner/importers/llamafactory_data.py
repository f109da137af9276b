"""LLaMA-Factory's data: names of a ``dataset_info.json`` (``data/parser.py`` and ``data/README.md`` of 0.9.5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .job import Job, is_file

_INFO = "dataset_info.json"
#: Bytes of that file, and entries of one training that anybody would write.
_LARGEST, _MOST = 8 << 20, 200
#: Their names of columns to ours, by formatting; those that are the usual ones need no mention.
_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "sharegpt": {"messages": "messages"},
    "openai": {"messages": "messages"},
}
_SHARED = {"system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}
_USUAL = {
    "instruction": "instruction", "question": "instruction", "input": "input", "output": "output",
    "history": "history", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected",
    "label": "kto_tag",
}  # fmt: skip
_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool"}
_USUAL_TAGS = {"human", "user", "gpt", "assistant", "model", "system", "observation", "tool", "function"}


def sources(job: Job) -> None:
    """Carry ``dataset`` and ``eval_dataset``."""
    ledger = job.ledger
    ledger.idle("media_dir", "it is empty")
    folder = ledger.text("dataset_dir") or "data"
    info, place = None, 0
    for key in ("dataset", "eval_dataset"):
        names = ledger.names(key) or []
        if len(names) > _MOST:
            raise ledger.wrong(key, f"at most {_MOST} names")
        if not names:
            ledger.idle(key, "it is empty")
            continue
        if folder == "ONLINE":
            info = {name: {"hf_hub_url": name} for name in (*names, *(info or ()))}
        if info is None and not all(is_file(name) for name in names):
            info = _read(job, folder)
        if info is None and not any(is_file(name) for name in names):
            do = "Import it where dataset_info.json is (or its dataset_dir), or write data: yourself."
            ledger.lose(key, f"would train on {', '.join(names)}, which {folder}/{_INFO} explains", do)
            continue
        lost = []
        for name in names:
            entry = _source((info or {}).get(name), folder, "eval" if key == "eval_dataset" else "train")
            if entry is None and is_file(name):  # no entry, but a file by itself
                entry = {"path": job.local(name), **({"split": "eval"} if key == "eval_dataset" else {})}
            if entry is None:
                lost.append(name)
                continue
            ledger.carry(key, f"data.{place}", entry, f"{name} of {_INFO}" if folder != "ONLINE" else "")
            place += 1
        if lost:
            do = "Write them into data: yourself, as files or hub datasets."
            ledger.lose(key, f"{', '.join(lost)}: not in {_INFO}, or nothing that finetui reads", do)
    ledger.idle("dataset_dir", "its entries are written out under data")
    limit = ledger.integer("max_samples")
    for index, source in enumerate(ledger.recipe.get("data", [])):
        if limit is not None and limit >= 1:
            ledger.carry("max_samples", f"data.{index}.limit", min(limit, source.get("limit", limit)))
        if ledger.flag("streaming") and not source["path"].startswith("/"):
            ledger.carry("streaming", f"data.{index}.streaming", True)
    ledger.idle("max_samples", "there is no data for it, or it is off")
    ledger.idle("streaming", "files are read as a stream in any case" if ledger.flag("streaming") else "it is off")


def _read(job: Job, folder: str) -> dict[str, Any] | None:
    """The entries of dataset_info.json: of its folder from here or beside the file, of a folder above, or beside it."""
    if folder.startswith("REMOTE:"):
        return None
    places = [Path.cwd() / folder, *(base / folder for base in (job.folder, *job.folder.parents)), job.folder]
    try:
        found = next((place / _INFO for place in places if (place / _INFO).is_file()), None)
    except (OSError, ValueError):  # no folder can have this name
        return None
    if found is None:
        return None
    try:
        with found.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            what = f"this is longer than {_LARGEST >> 20} MiB"
            raise RecipeError(what, where=str(found), do="Set dataset_dir to the folder of your dataset_info.json.")
        entries = json.loads(raw.decode("utf-8-sig"))
    except OSError as error:
        do = "Make it readable, or set dataset_dir to another folder."
        raise RecipeError(f"it can't be read ({error})", where=str(found), do=do) from None
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0][:80]
        raise RecipeError(f"this is not valid JSON ({why})", where=f"{found}{line}", do="Mend it.") from None
    if not isinstance(entries, dict):
        raise RecipeError("this is no object of datasets by name", where=str(found), do="See its data/README.md.")
    whole = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    return {name: {**entry, "__folder__": str(found.parent)} for name, entry in whole.items()}


def _source(entry: Any, folder: str, split: str) -> dict[str, Any] | None:
    """One source of a recipe; None if there is nothing that finetui reads."""
    if not isinstance(entry, dict) or entry.get("script_url"):
        return None
    path = entry.get("hf_hub_url") or entry.get("cloud_file_name")
    if not isinstance(path, str) and isinstance(entry.get("file_name"), str):
        path = str((Path(entry.get("__folder__", folder)) / entry["file_name"]).absolute())
    if not isinstance(path, str) or not path:
        return None
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _COLUMNS:
        return None
    source: dict[str, Any] = {"path": path}
    named, tags = _mapping(entry, "columns"), _mapping(entry, "tags")
    source["format"] = _format(formatting, entry, named, tags)
    columns = {
        ours: named[theirs]
        for theirs, ours in {**_COLUMNS[formatting], **_SHARED}.items()
        if isinstance(named.get(theirs), str)
    }
    if source["format"] == "text":
        columns = {"text": named["prompt"]}
    if source["format"] == "preference":  # its question has another name, and its answers are two
        columns = {"question" if part == "instruction" else part: columns[part] for part in columns if part != "output"}
    columns = {part: name for part, name in columns.items() if not _usual(part, name, source["format"])}
    roles = {name: role for tag, role in _TAGS.items() if isinstance(name := tags.get(tag), str)}
    keys = {"role": tags.get("role_tag"), "content": tags.get("content_tag")}
    columns |= {part: name for part, name in keys.items() if isinstance(name, str) and name not in _KEYS}
    source |= {"columns": columns} if columns else {}
    roles = {name: role for name, role in roles.items() if name.lower() not in _USUAL_TAGS}
    source |= {"roles": roles} if roles else {}
    for theirs, ours in (("subset", "subset"), ("split", "hub_split")):
        if isinstance(entry.get(theirs), str) and entry.get("hf_hub_url") and entry[theirs] != "train":
            source[ours] = entry[theirs]
    if isinstance(entry.get("num_samples"), int) and entry["num_samples"] >= 1:
        source["limit"] = entry["num_samples"]
    return source if split == "train" else {**source, "split": "eval"}


_KEYS = {"role", "content", "from", "value"}


def _mapping(entry: dict[str, Any], key: str) -> dict[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def _format(formatting: str, entry: dict[str, Any], named: dict[str, Any], tags: dict[str, Any]) -> str:
    if entry.get("ranking"):
        return "preference"
    if isinstance(named.get("kto_tag"), str):
        return "unpaired-preference"
    if formatting == "alpaca":
        return "text" if set(named) == {"prompt"} else "alpaca"  # a column alone is what stage pt reads
    openai = formatting == "openai" or tags.get("role_tag") == "role"
    return "messages" if openai else "sharegpt"


def _usual(part: str, name: str, form: str) -> bool:
    if part == "messages":
        return name in ("messages", "conversations")
    if form == "text":
        return name == "text"
    return _USUAL.get(part) == name
