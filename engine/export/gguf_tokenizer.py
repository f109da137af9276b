r"""A tokenizer as llama.cpp has it: the list of tokens, how they are merged, and by what rule text is cut before that.

llama.cpp knows rules for cutting text by name and has each written down in C++ (src/llama-vocab.cpp). The name is found
here by the rule itself, as tokenizer.json spells it out: one that llama.cpp does not have can't be written, as text
would be cut otherwise than in training, which nothing would tell.

Two kinds are written. Byte-level BPE takes its merges along. SentencePiece's BPE (``model: llama``) has a score per
token instead of merges: the two neighbours are merged whose union has the highest. Tokenizers of transformers keep only
merges, in the order of those scores, so that a score is the place of a token's first merge. Whether both ways give the
same tokens is tried out on text made to break it.

That special tokens swallow white space beside them has no place in the file. llama.cpp knows it of Phi-3 alone, by the
name of the model (``general.name``).
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...planner.errors import DataError, ModelError
from ..data.examples import Message
from ..data.template import render
from .gguf_model import ELSEWHERE

#: Types of tokens (``gguf.TokenType``).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_O200K_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_O200K_REST}"
_O200K = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_O200K_REST}"
)
#: How text is cut, and whether whole words that are tokens are taken without merging, to llama.cpp's name for it.
_RULES: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digit", "gpt2"), False): "smollm",
    ((_CL100K,), True): "llama-bpe",
    ((_CL100K,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_O200K,), False): "gpt-4o",
}
#: Text that tells tokenizers apart.
NASTY = (
    "Hello world", "  two  spaces   three\t\ttabs", "line\nline\n\nline\r\n", "I'm you'LL they've", "3 33 333 3333.14",
    "naïve café — “quotes”…", "日本語のテキスト 中文", "🚀👩‍👩‍👧 🇩🇪", "a_b-c/d\\e{}[]()<>",
    "    def f(x):\n        return x",
    "Ünïcödé ﬁ ½ ①", "\u200bzero\u00a0width", "aaaaaaaaaaaaaaa", "ABCdefGHI", " ", "\n", "trailing ",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer: keys without ``tokenizer.``; ``notes`` tell where llama.cpp differs.

    ``phi3`` is set where the name of the model has to say so.
    """

    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()
    phi3: bool = False


def describe(tokenizer: Any, rows: int, stops: Iterable[int]) -> Vocabulary:
    """What to write for a tokenizer.

    Args:
        tokenizer: of transformers, ready for use.
        rows: of the embedding; ids beyond it are left out, and rows without a token get a name of their own.
        stops: the tokens that end an answer, the end of sequence first.

    Raises:
        ModelError: llama.cpp would make other tokens of the same text; ``do`` says what can be done.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _strange(tokenizer, "the tokenizer is no 'fast' one, so that its rules can't be read")
    told: dict[str, Any] = json.loads(backend.to_str())
    model = told["model"]
    if model["type"] != "BPE":
        raise _strange(tokenizer, f"the tokenizer is of the kind {model['type']}; BPE is written here")
    texts, types = _tokens(told, rows)
    pairs = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    notes: list[str] = []
    if model.get("byte_fallback"):
        metadata = _sentencepiece(tokenizer, told, texts, types, pairs, notes)
    else:
        metadata = _byte_level(tokenizer, told, pairs, notes)
    metadata |= {"ggml.tokens": texts, "ggml.token_type": types, **_special(tokenizer, rows, list(stops))}
    if tokenizer.chat_template:
        metadata["chat_template"] = plain_template(tokenizer.get_chat_template())
    if tokenizer.chat_template and tokenizer.bos_token_id is not None:
        plain = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        if plain != begins_with_bos(tokenizer):
            begin = f"begins with {tokenizer.bos_token}"
            both = (f"text {begin} as conversations do", f"text {begin} no more, as conversations do not")
            notes.append(f"in llama.cpp {both[plain]}")
    phi3 = _strips(told, rows, set(texts), notes)
    return Vocabulary(metadata, tuple(notes), phi3)


def plain_template(template: str) -> str:
    """A chat template without the tag that marks what is trained on, which not every Jinja knows."""
    opened = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", opened)


def _strange(tokenizer: Any, what: str) -> ModelError:
    return ModelError(what, where=str(tokenizer.name_or_path), do=ELSEWHERE)


def _tokens(told: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    texts = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    byte = re.compile(r"<0x[0-9A-F]{2}>")
    pieces = bool(told["model"].get("byte_fallback"))
    for text, number in told["model"]["vocab"].items():
        if number < rows:
            texts[number], types[number] = text, BYTE if pieces and byte.fullmatch(text) else NORMAL
    unknown = told["model"].get("unk_token")
    for added in told["added_tokens"]:
        number, text = added["id"], added["content"]
        if number >= rows:
            continue
        if not added["special"] and pieces:
            text = text.replace("▁", " ")  # SentencePiece's own are written as the text that they stand for
        texts[number] = text
        types[number] = CONTROL if added["special"] else USER_DEFINED
        if pieces and text == unknown:
            types[number] = UNKNOWN
    return texts, types


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether llama.cpp is to put a begin of sequence before text: if conversations have one, before which it puts it
    too; where there are none, if text has."""
    if tokenizer.bos_token_id is None:
        return False
    opening = _opening(tokenizer)
    if tokenizer.chat_template:
        return opening == str(tokenizer.bos_token)
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _special(tokenizer: Any, rows: int, stops: list[int]) -> dict[str, Any]:
    """Ids with a meaning, and whether text gets a begin and an end: found by doing it."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for kind, number in zip(("eot", "eom"), [stop for stop in stops if stop != ids["eos"]], strict=False):
        ids[kind] = number
    coded = tokenizer("a")["input_ids"]
    found: dict[str, Any] = {
        f"ggml.{kind}_token_id": int(number) for kind, number in ids.items() if number is not None and number < rows
    }
    found["ggml.add_bos_token"] = begins_with_bos(tokenizer)
    found["ggml.add_eos_token"] = ids["eos"] is not None and coded[-1:] == [ids["eos"]]
    return found


def _strips(told: dict[str, Any], rows: int, texts: set[str], notes: list[str]) -> bool:
    """Whether special tokens swallow white space as those of Phi-3 do; if they do so otherwise, that is told."""
    special = [token for token in told["added_tokens"] if token["id"] < rows]
    swallowing = {token["content"] for token in special if token["rstrip"] or token["lstrip"]}
    kept = {"<unk>", "<s>", "<|endoftext|>"}
    if kept | {"</s>"} <= texts and swallowing == {token["content"] for token in special} - kept:
        return not any(token["lstrip"] for token in special)
    if swallowing:
        some = ", ".join(sorted(swallowing)[:3])
        notes.append(f"llama.cpp keeps white space beside {some}, which this tokenizer drops")
    return False


# --- byte-level BPE


def _byte_level(tokenizer: Any, told: dict[str, Any], pairs: list[tuple[str, ...]], notes: list[str]) -> dict[str, Any]:
    model = told["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _strange(tokenizer, "the tokenizer marks the inside or the end of words, which llama.cpp does not")
    rule = (tuple(_cuts(tokenizer, told["pre_tokenizer"])), bool(model.get("ignore_merges")))
    if rule not in _RULES:
        what = f"llama.cpp has no name for how this tokenizer cuts text ({' then '.join(rule[0])[:200]})"
        raise _strange(tokenizer, what)
    normalizer = told.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        raise _strange(tokenizer, f"the tokenizer changes text first ({normalizer['type']}), which llama.cpp does not")
    if normalizer:
        notes.append("llama.cpp leaves text as it is, where this tokenizer brings it to Unicode's form NFC first")
    return {"ggml.model": "gpt2", "ggml.pre": _RULES[rule], "ggml.merges": [" ".join(pair) for pair in pairs]}


def _cuts(tokenizer: Any, step: dict[str, Any] | None) -> list[str]:
    """How text is cut, in order: regular expressions, ``digit`` for each digit alone, ``gpt2`` for that of GPT-2."""
    if step is None:
        return []
    kind = step["type"]
    if kind == "Sequence":
        return [cut for part in step["pretokenizers"] for cut in _cuts(tokenizer, part)]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return ["gpt2"] if step["use_regex"] else []
    if kind == "Digits" and step["individual_digits"]:
        return ["digit"]
    whole = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    if kind == "Split" and whole and "Regex" in step["pattern"]:
        return [str(step["pattern"]["Regex"])]
    raise _strange(tokenizer, f"the tokenizer cuts text in a way that llama.cpp does not have ({kind})")


# --- SentencePiece's BPE


def _sentencepiece(
    tokenizer: Any,
    told: dict[str, Any],
    texts: list[str],
    types: list[int],
    pairs: list[tuple[str, ...]],
    notes: list[str],
) -> dict[str, Any]:
    first: dict[str, int] = {}
    for place, pair in enumerate(pairs):
        first.setdefault("".join(pair), place)
    last = len(pairs)
    scores = [-float(first.get(text, last)) if kind == NORMAL else 0.0 for text, kind in zip(texts, types, strict=True)]
    scheme = _space_before(told)
    begin = _opening(tokenizer) if scheme == "first" else ""
    prefix = scheme != "never" and not begin
    _refuse_others(tokenizer, texts, types, scores, prefix, begin)
    if prefix and _starts_otherwise(tokenizer):
        notes.append("llama.cpp puts a space before text that begins with one, which this tokenizer does not")
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": scores,
        "ggml.add_space_prefix": prefix,
    }


def _space_before(told: dict[str, Any]) -> str:
    """Where text gets a space before it: ``never``, ``first`` (at the very beginning) or ``always`` (and after each
    special token, as llama.cpp does it)."""
    steps = _steps(told.get("normalizer"), "normalizers") + _steps(told.get("pre_tokenizer"), "pretokenizers")
    scheme = "never"
    for step in steps:
        if step["type"] == "Prepend":
            scheme = "always"
        elif step["type"] == "Metaspace":
            scheme = str(step.get("prepend_scheme", "always"))
    return scheme


def _opening(tokenizer: Any) -> str:
    """The special token that conversations begin with; empty if there is none.

    After it, a tokenizer that puts a space at the very beginning puts none: then llama.cpp is told to do it nowhere, as
    conversations are what the model was trained on.
    """
    if not tokenizer.chat_template:
        return ""
    try:
        text = render(tokenizer, [Message("user", "a")], "chat template", prompt=True)
    except DataError:
        return ""
    special = (str(token) for token in tokenizer.added_tokens_decoder.values())
    return next((token for token in special if text.startswith(token)), "")


def _starts_otherwise(tokenizer: Any) -> bool:
    """Whether text that begins with a space does without another."""
    encode = tokenizer.backend_tokenizer.encode
    return bool(encode(" a", add_special_tokens=False).ids == encode("a", add_special_tokens=False).ids)


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [one for part in step[inner] for one in _steps(part, inner)] if step["type"] == "Sequence" else [step]


def _refuse_others(
    tokenizer: Any, texts: list[str], types: list[int], scores: list[float], prefix: bool, begin: str
) -> None:
    """Make sure that merging by scores gives the tokens that the tokenizer gives, after ``begin``."""
    ids = {text: i for i, (text, kind) in enumerate(zip(texts, types, strict=True)) if kind in (NORMAL, BYTE)}
    for text in NASTY:
        pieces = tokenizer.backend_tokenizer.encode(begin + text, add_special_tokens=False).ids[bool(begin) :]
        if prefix and text.startswith(" "):
            continue  # told of, not refused
        if any(types[i] not in (NORMAL, BYTE) for i in pieces):
            continue  # text with a user's token in it is cut there first, by both alike
        written = (" " if prefix else "") + text
        if merge_by_score(written.replace(" ", "▁"), ids, scores) != pieces:
            what = f"llama.cpp would make other tokens of {text!r} than this tokenizer does"
            raise _strange(tokenizer, what)


def merge_by_score(text: str, ids: dict[str, int], scores: list[float]) -> list[int]:
    """SentencePiece's BPE (Kudo and Richardson 2018, arXiv:1808.06226): ever the pair whose union scores highest.

    Args:
        text: with ▁ for spaces.
        ids: of the tokens that text is made of, those for single bytes (``<0x0A>``) among them.
        scores: by id.
    """
    parts: list[str | None] = list(text)
    after = list(range(1, len(text) + 1))
    before = list(range(-1, len(text) - 1))
    waiting: list[tuple[float, int, int, str]] = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right < len(parts):
            union = f"{parts[left]}{parts[right]}"
            if union in ids:
                heapq.heappush(waiting, (-scores[ids[union]], left, right, union))

    for place in range(len(text) - 1):
        consider(place, place + 1)
    while waiting:
        _, left, right, union = heapq.heappop(waiting)
        if parts[left] is None or parts[right] is None or f"{parts[left]}{parts[right]}" != union:
            continue  # one of them has become part of another token meanwhile
        parts[left], parts[right] = union, None
        after[left] = after[right]
        if after[left] < len(parts):
            before[after[left]] = left
        consider(before[left], left)
        consider(left, after[left])
    found: list[int] = []
    for part in parts:
        if part is not None and part in ids:
            found.append(ids[part])
        elif part is not None:
            found += [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found
