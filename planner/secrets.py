"""Secrets: how they get to whoever needs them, and how they are kept out of everything else.

Tokens and passwords live in the environment. A recipe names them (``https://host/rows.jsonl?token=${DATA_TOKEN}``), so
that what is written down, shown and compared never holds one; the value is put in at the moment an address is opened.
Whatever else a program may quote by accident, as an exception with its URL does, is struck out by :func:`redact`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import quote

from .errors import UserError

#: What stands for a secret.
STRUCK = "***"
#: Names of variables whose values are secrets: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, PGPASSWORD …
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(?:API|ACCESS|PRIVATE|ACCOUNT|STORAGE)_?KEY", re.IGNORECASE)
#: … and those that look alike and are none.
_NO_SECRET = re.compile(r"TOKENIZERS?_|_FILE$|_PATH$|_DIR$|TOKEN_LIMIT", re.IGNORECASE)
#: Shorter values are words that stand in other places too.
_SHORTEST = 6
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
#: Tokens that can be told by their form: Hugging Face, GitHub, OpenAI and Anthropic, AWS, Slack, Google.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|(?:gh[opsur]|github_pat)_[A-Za-z0-9_]{20,}|sk-[A-Za-z0-9_-]{20,}|A[KS]IA[0-9A-Z]{16}"
    r"|xox[abpors]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35})(?![A-Za-z0-9])"
)
_USER = re.compile(r"(?<=://)(?:[^\s/@:?#'\"\\]*:[^\s/@'\"\\]+)(?=@)|(?<=http://)[^\s/@:'\"\\]+(?=@)"
                   r"|(?<=https://)[^\s/@:'\"\\]+(?=@)")  # fmt: skip
_QUERY = re.compile(
    r"([?&;](?:[\w-]*(?:token|secret|password|passwd|signature|credential)|sig|key|auth|api-?key|apikey|api_key)=)"
    r"([^&;#\s'\"\\]+)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9+/._~-]{12,}=*", re.IGNORECASE)

#: Variables that an address has named in this process: secrets by that alone, whatever they are called.
_named: set[str] = set()


def expand(address: str) -> str:
    """An address with the values of the variables that it names.

    Raises:
        UserError: the environment lacks one.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if not os.environ.get(name):
            do = f"Set {name} before finetui starts; a run keeps the environment that it was started or resumed with."
            raise UserError(f"the environment has no {name}", where=address, do=do)
        _named.add(name)
        return os.environ[name]

    return _VARIABLE.sub(value, address)


def variables_of(address: str) -> list[str]:
    """Names of the variables that an address names."""
    return _VARIABLE.findall(address)


def conceal(text: str, address: str) -> str:
    """Text with the names of an address's variables again where their values have come to stand."""
    for name in variables_of(address):
        for value in _spellings(os.environ.get(name, "")):
            text = text.replace(value, f"${{{name}}}")
    return text


def secret_in(text: str) -> str:
    """What secret a text holds, in words; empty if none can be seen. A variable's name in its place is none."""
    without = _VARIABLE.sub("", text)
    if _TOKEN.search(without):
        return "an access token"
    if "://" not in without:
        return ""
    if _USER.search(without):
        return "a user name and password"
    found = _QUERY.search(without)
    return f"a secret ({found[1].strip('?&;=')}=…)" if found else ""


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Text without the secrets of the environment, and without what looks like one."""
    for value in secrets_of(os.environ if environment is None else environment):
        if value in text:
            text = text.replace(value, STRUCK)
    if "://" in text:
        text = _USER.sub(lambda found: found[0] if "${" in found[0] else STRUCK, text)
        text = _QUERY.sub(lambda found: found[0] if found[2].startswith("${") else found[1] + STRUCK, text)
    return _HEADER.sub(rf"\1 {STRUCK}", _TOKEN.sub(STRUCK, text))


def is_secret(name: str) -> bool:
    """Whether a variable of the environment holds a secret, by its name."""
    return name in _named or (_SECRET_NAME.search(name) is not None and _NO_SECRET.search(name) is None)


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """The secrets of an environment in each way in which text may hold them, the longest first."""
    found = {spelt for name, value in environment.items() if is_secret(name) for spelt in _spellings(value)}
    return sorted(found, key=len, reverse=True)


def without_secrets(environment: Mapping[str, str], keep: tuple[str, ...] = ()) -> dict[str, str]:
    """An environment for a process that has no business with any of them, but for those named in ``keep``."""
    kept = {name: value for name, value in environment.items() if name in keep or not is_secret(name)}
    return {name: value if name in keep else redact(value, environment) for name, value in kept.items()}


def _spellings(value: str) -> set[str]:
    return {value, quote(value, safe=""), quote(value)} if len(value) >= _SHORTEST else set()
