"""Axolotl's ``datasets``: sources with a type, which says both how a row is read and how it is written
(``prompt_strategies`` of axolotl 0.19)."""

from __future__ import annotations

from typing import Any

from ..objective import PREFERENCE_METHODS
from .job import Job, is_file, split
from .ledger import Ledger

#: Names of ``chat_template`` to ours; ``auto`` is the tokenizer's own.
TEMPLATES: dict[str, str] = {
    "tokenizer_default": "auto", "chatml": "chatml", "gemma": "gemma", "gemma3": "gemma3", "llama3": "llama3",
    "phi_3": "phi3", "phi_35": "phi3_5", "qwen_25": "qwen2_5", "qwen3": "qwen3", "cohere": "cohere",
    "deepseek_v3": "deepseekv3",
}  # fmt: skip

_ALPACA = "as a chat in the model's template, not under '### Instruction:'"
#: First part of ``type`` to our format, the columns that it reads where they have other names, and what is different.
_TYPES: dict[str, tuple[str, dict[str, str], str]] = {
    "alpaca": ("alpaca", {}, _ALPACA),
    "alpaca_instruct": ("alpaca", {}, _ALPACA),
    "alpaca_chat.load_concise": ("alpaca", {}, _ALPACA),
    "alpaca_chat.load_no_prompt": ("alpaca", {}, _ALPACA),
    "alpaca_chat": ("alpaca", {}, _ALPACA),
    "alpaca_chat.load_qa": ("question-answer", {}, _ALPACA),
    "alpaca_chat.load_camel_ai": ("question-answer", {"question": "message_1", "answer": "message_2"}, _ALPACA),
    "alpaca_w_system": ("alpaca", {}, _ALPACA),
    "alpaca_w_system.load_open_orca": (
        "question-answer", {"question": "question", "answer": "response", "system": "system_prompt"}, _ALPACA),
    "alpaca_w_system.load_open_orca_chatml": (
        "question-answer", {"question": "question", "answer": "response", "system": "system_prompt"}, ""),
    "gpteacher": ("alpaca", {"output": "response"}, _ALPACA),
    "oasst": ("alpaca", {"instruction": "INSTRUCTION", "output": "RESPONSE"}, _ALPACA),
    "context_qa": ("question-answer", {}, _ALPACA),
    "context_qa.load_v2": ("question-answer", {}, _ALPACA),
    "sharegpt": ("sharegpt", {}, "in the model's chat template"),
    "llama2_chat": ("sharegpt", {}, "in the model's chat template"),
    "chat_template": ("messages", {}, ""),
    "completion": ("text", {}, ""),
    "pretrain": ("text", {}, ""),
    "stepwise_supervised": ("stepwise", {}, ""),
}  # fmt: skip
_NO_EFFECT = "it has no effect on this type"


def sources(job: Job, method: str, too_long: str) -> None:
    """Carry all of ``datasets``, ``pretraining_dataset`` and ``test_datasets``.

    Args:
        too_long: what becomes of rows longer than sequence_len, ``cut`` or ``drop``.
    """
    ledger, place = job.ledger, 0
    for key in ("datasets", "pretraining_dataset", "test_datasets"):
        if isinstance(ledger.raw(key), str):  # a hub id alone
            ledger.carry(key, f"data.{place}.path", job.local(str(ledger.raw(key))))
            place += 1
            continue
        for index in range(ledger.items(key)):
            source, to = ledger.at(key, index), f"data.{place}"
            path = source.text("path")
            if path is None:
                raise source.wrong("path", "the file or hub dataset to read")
            _source(job, source, to, path, method, trained=key != "test_datasets")
            form = str(source.raw("type")).partition(".")[0]
            if method in PREFERENCE_METHODS and form in ("chatml", "llama3") and not ledger.has("chat_template"):
                ledger.default("chat_template", form, f"type {form}.… writes turns so, whatever the model")
            if key == "pretraining_dataset" and not is_file(path):
                ledger.default(f"{to}.streaming", True, "pretraining_dataset is read as a stream")
            if key == "test_datasets":
                ledger.default(f"{to}.split", "eval", "test_datasets are never trained on")
            elif too_long == "drop":
                ledger.default(f"{to}.too_long", "drop", "rows that are too long are left out, not cut")
            place += 1


def raw_text(ledger: Ledger) -> bool:
    """Whether all that is trained on is plain text."""
    lists = [ledger.raw(key) for key in ("datasets", "pretraining_dataset")]
    trained = [item for found in lists if isinstance(found, list) for item in found]
    texts = [isinstance(item, dict) and item.get("type") in ("completion", "pretrain") for item in trained]
    return ledger.has("pretraining_dataset") or (bool(texts) and all(texts))


def _source(job: Job, source: Ledger, to: str, path: str, method: str, *, trained: bool) -> None:
    files = source.names("data_files") if not isinstance(source.raw("data_files"), dict) else None
    if files and len(files) == 1 and is_file(files[0]) and not is_file(path):
        whole = files[0] if path in ("json", "csv", "parquet", "text") else f"hf://datasets/{path}/{files[0]}"
        source.carry(["path", "data_files"], f"{to}.path", job.local(whole), "that file alone")
        path = whole
    else:
        source.carry("path", f"{to}.path", job.local(path), "" if job.local(path) == path else "found here")
        source.lose("data_files", "would read these files alone", "Give each file as a source of its own.")
    if source.text("ds_type") is not None:
        source.idle("ds_type", "a file's kind is known by its name")
    _kind(source, to, path, method)
    split(source, "split", to, path, trained=trained)
    if (subset := source.text("name")) is not None:
        if is_file(path):
            source.idle("name", "a file has no subsets")
        else:
            source.carry("name", f"{to}.subset", subset)
    _turns(source, to)
    source.table(_IDLE, _LOST)


def _kind(source: Ledger, to: str, path: str, method: str) -> None:
    """What ``type`` stands for."""
    kind = source.raw("type")
    if isinstance(kind, dict):
        _own(source, to, method)
        return
    name = source.text("type") or ""
    first = name.partition(":")[0]
    if method in ("dpo", "ipo", "orpo", "simpo", "reward"):
        source.carry("type", f"{to}.format", "preference", "its usual columns are found by name")
        columns = {"chosen": "field_chosen", "rejected": "field_rejected"}
    elif method == "kto":
        source.carry("type", f"{to}.format", "unpaired-preference", "its usual columns are found by name")
        columns = {}
    elif method in ("grpo", "rloo"):
        source.lose("type", "would make rows with a function of yours", "Rows need a prompt, and what rewards compare.")
        columns = {}
    elif first in _TYPES:
        ours, renamed, why = _TYPES[first]
        source.carry("type", f"{to}.format", ours if ours != "messages" else _chat_format(source), why)
        for part, column in renamed.items():
            source.carry("type", f"{to}.columns.{part}", column)
        columns = {"text": "field"} if ours == "text" else {}
        if ours == "text" and source.has("text_column"):
            columns = {"text": "text_column"}
    else:
        source.lose("type", f"would read and write rows as {name!r}", "format: auto looks at them; see finetui data.")
        columns = {}
    for part, key in columns.items():
        if (named := source.text(key)) is not None:
            source.carry(key, f"{to}.columns.{part}", named)


def _chat_format(source: Ledger) -> str:
    """``sharegpt`` where messages have from and value."""
    properties = source.raw("message_property_mappings")
    role = properties.get("role") if isinstance(properties, dict) else source.raw("message_field_role")
    return "sharegpt" if role == "from" else "messages"


def _own(source: Ledger, to: str, method: str) -> None:
    """A type that the user made up: columns are carried, the words around them are not."""
    own = source.at("type")
    if method in ("dpo", "ipo", "orpo", "simpo", "kto"):
        names = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected",
                 "field_completion": "completion", "field_label": "label", "field_system": "system"}  # fmt: skip
    else:
        names = {"field_instruction": "instruction", "field_input": "input", "field_output": "output",
                 "field_system": "system"}  # fmt: skip
        own.carry(["field_instruction", "field_output"], f"{to}.format", "alpaca")
    for key, part in names.items():
        if (column := own.text(key)) is not None:
            own.carry(key, f"{to}.columns.{part}", column)
    words = "would put these words around the columns"
    left = [key for key in own.here() if not own.settled(key)]
    own.lose(left, words, "The model's chat template is used; finetui data shows it.")
    own.idle(left, "it is empty")


def _turns(source: Ledger, to: str) -> None:
    """How turns of a chat are called."""
    held = source.text("field_messages")
    usual = {"messages": ("messages", "conversations", "conversation"), "sharegpt": ("conversations", "messages")}
    ours = str(_at(source.recipe, to).get("format", "auto"))
    if held is not None and held in usual.get(ours, ()):
        source.idle("field_messages", "it is found by its name")
    elif held is not None:
        source.carry("field_messages", f"{to}.columns.messages", held)
    properties = source.at("message_property_mappings")
    for part in ("role", "content"):
        for view, key in ((properties, part), (source, f"message_field_{part}")):
            called = view.text(key)
            if called in {"role", "content", "from", "value"}:
                view.idle(key, "it is found by its name")
            elif called is not None:
                view.carry(key, f"{to}.columns.{part}", called)
    for key in properties.here():
        if not properties.settled(key):
            properties.lose(key, "would hand this part of a message to the template", "Usual names are known.")
    roles = source.raw("roles")
    if isinstance(roles, dict):
        named = {str(name): role for role, names in roles.items() if isinstance(names, list) for name in names}
        usual_names = {"human", "user", "gpt", "assistant", "model", "system", "tool"}
        if set(named.values()) <= {"system", "user", "assistant", "tool"}:
            ours_only = {name: role for name, role in named.items() if name not in usual_names}
            if ours_only:
                source.carry("roles", f"{to}.roles", ours_only)
            source.idle("roles", "these names are usual")
        else:
            source.lose("roles", "would know other roles", "roles has system, user, assistant and tool.")
    learned = source.names("roles_to_train") if source.has("roles_to_train") else None
    if learned is not None and set(learned) <= {"assistant", "gpt", "model"}:
        source.idle("roles_to_train", "what the assistant says is what is trained on")
    else:
        source.lose("roles_to_train", "would train on what these say", "train_on: all trains on everything.")
    for key in ("train_on_eos", "train_on_eot"):
        if source.raw(key) in ("turn", None):
            source.idle(key, "the end of each answer is always trained on")


def _at(recipe: dict[str, Any], to: str) -> dict[str, Any]:
    found = recipe["data"][int(to.rpartition(".")[2])]
    assert isinstance(found, dict)
    return found


_IDLE = {
    "trust_remote_code": "a dataset that is a program is never run",
    "preprocess_shards": "data is read as a stream",
    "field_tools": "tools is its usual name",
    "field_thinking": "reasoning beside an answer is found by its usual names",
    "template_thinking_key": "reasoning is handed to the template by its usual name",
    "field_chosen": _NO_EFFECT,
    "field_rejected": _NO_EFFECT,
    "field": _NO_EFFECT,
    "max_completion_length": "sequence_length holds for all",
}
_LOST = {
    "input_transform": "would run Python code of yours on each row||Write the rows as you want them.",
    "shards": "would read one shard of several||Use limit or hub_split.",
    "shards_idx": "would read one shard of several||Use limit or hub_split.",
    "revision": "would take this revision of the dataset||Download it, and give the file as path.",
    "conversation": "would write chats in the form of FastChat||Give chat_template.",
    "chat_template": "would have a template for this source alone||chat_template of the recipe is for all sources.",
    "chat_template_jinja": "would have a template for this source alone||chat_template is for all sources.",
    "message_field_training": "would read from each message whether it counts||A key train of a message does.",
    "message_field_training_detail": "would read from each message which part counts||A key train of a part does.",
    "split_thinking": "would take the reasoning out of answers||Put it into reasoning_content.",
    "logprobs_field": "would read the teacher's probabilities||method: distill asks the teacher itself.",
    "temperature": "would soften the teacher's probabilities||distillation.temperature does, of method: distill.",
    "train_on_eos": "would choose which ends of turns count||The end of each answer is trained on.",
    "train_on_eot": "would choose which ends of turns count||The end of each answer is trained on.",
    "drop_system_message": "would leave out system messages||Leave them out of the rows.",
    "input_format": "would put these words around the input||Write them into the rows.",
    "field_human": "would name the column of the question||Use columns: {question: …}.",
    "field_model": "would name the column of the answer||Use columns: {answer: …}.",
    "step_separator": "would put this between steps||Steps are told apart as they are.",
    "train_on_last_step_only": "would judge the last step alone||All steps are judged.",
    "skip": "would leave out the first rows||Leave them out of the file.",
    "length": "would make up rows||finetui bench measures without data.",
    "sequence_length": "would make up rows||finetui bench measures without data.",
    "min_input_id": "would make up rows||finetui bench measures without data.",
    "max_input_id": "would make up rows||finetui bench measures without data.",
    "seed": "would make up rows||finetui bench measures without data.",
}
