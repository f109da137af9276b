"""Preferences: what one user wants of finetui whatever the recipe, kept in ``$XDG_CONFIG_HOME/finetui/settings.yaml``.

A mistake in that file must not stand between a user and a run: whatever is wrong with it is told, in words, and has its
default meanwhile. The app and ``finetui settings`` write the file whole or not at all, and leave comments alone.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from .errors import SettingsError, UserError

Value = str | float | bool | tuple[str, ...] | dict[str, str]
THEMES = ("auto", "dark", "light", "high-contrast", "colour-blind", "16-colours", "16-colours-light")


@dataclass(frozen=True)
class Setting:
    """One setting: what it is for, what it may be, and the environment variable that comes before the file."""

    name: str
    help: str
    kind: Literal["choice", "number", "flag", "text", "names", "keys"]
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    environment: str = ""


SETTINGS: tuple[Setting, ...] = (
    Setting("theme", "Colours of the app; auto goes by what the terminal can show", "choice", THEMES),
    Setting(
        "charset", "What is drawn with; auto goes by the locale", "choice", ("auto", "unicode", "ascii"),
        environment="FINETUI_CHARSET",
    ),
    Setting("memory_unit", "Memory in GiB (2**30 bytes), or in GB (10**9) as cards are sold", "choice", ("GiB", "GB")),
    Setting("refresh_hz", "How often Monitor and Runs look again, per second", "number", low=0.1, high=4.0),
    Setting("mouse", "Whether the app listens to the mouse", "flag", environment="FINETUI_MOUSE"),
    Setting("bell", "Ring the terminal when a run ends, fails or loses a GPU", "flag"),
    Setting("alert_command", "A command to run when a run ends, fails or loses a GPU", "text"),
    Setting("prices", "The prices that GPUs and finetui gpus begin with", "choice", ("on-demand", "spot")),
    Setting("providers", "Only offers of these providers; none named is all", "names"),
    Setting("runs", "The folder for new runs; empty is ./runs", "text", environment="FINETUI_RUNS"),
    Setting("keys", "Keys of your own, such as plan.save: S", "keys"),
)  # fmt: skip
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Preferences:
    """The settings with their values. ``problems`` says what of the file could not be used, a sentence each."""

    theme: str = "auto"
    charset: str = "auto"
    memory_unit: str = "GiB"
    refresh_hz: float = 1.0
    mouse: bool = True
    bell: bool = True
    alert_command: str = ""
    prices: str = "on-demand"
    providers: tuple[str, ...] = ()
    runs: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


DEFAULTS = Preferences()


def settings_path() -> Path:
    """Where the file is, or would be."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "finetui" / "settings.yaml"


def load(path: Path | None = None) -> Preferences:
    """The user's preferences; never raises, see :attr:`Preferences.problems`. Without a file all are defaults."""
    path = path or settings_path()
    try:
        tree = _tree(_text(path), path)
    except FileNotFoundError:
        return DEFAULTS
    except (OSError, UnicodeDecodeError) as error:
        return replace(DEFAULTS, problems=(f"{path} can't be read ({error}); every setting has its default.",))
    except SettingsError as error:
        return replace(DEFAULTS, problems=(f"{error} Every setting has its default.",))
    found: dict[str, Any] = {}
    problems = []
    for name, value in tree.items():
        try:
            found[_known(name).name] = checked(name, value)
        except SettingsError as error:
            problems.append(f"{path}: {error}")
    return Preferences(**found, problems=tuple(problems))


def checked(name: str, value: Any) -> Value:
    """A value as it is kept.

    Raises:
        SettingsError: there is no such setting, or it can't have this value.
    """
    setting = _known(name)
    if setting.kind == "choice":
        if value not in setting.choices:
            near = difflib.get_close_matches(str(value), setting.choices, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"It can be {', '.join(setting.choices)}."
            raise SettingsError(f"{value!r} is no {name}", where=name, do=hint)
        return str(value)
    if setting.kind == "number":
        if isinstance(value, bool) or not isinstance(value, int | float) or not setting.low <= value <= setting.high:
            raise SettingsError(
                f"{value!r} is out of range", where=name, do=f"Use {setting.low:g} to {setting.high:g}."
            )
        return float(value)
    if setting.kind == "flag":
        if not isinstance(value, bool):
            raise SettingsError(f"{value!r} is neither true nor false", where=name, do="Use true or false.")
        return value
    if setting.kind == "names":
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
            raise SettingsError(f"{value!r} is no list of names", where=name, do="Write [runpod, lambda].")
        return tuple(value)
    if setting.kind == "keys":
        if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
            raise SettingsError("this is no table of keys", where=name, do="Write {plan.save: S}.")
        return dict(value)
    if value is None:
        return ""
    if not isinstance(value, str) or "\n" in value:
        raise SettingsError(f"{value!r} is no line of text", where=name, do="Put it into quotes.")
    return value


def parsed(name: str, text: str) -> Value:
    """What was typed for a setting, as it is kept.

    Raises:
        SettingsError: as :func:`checked`.
    """
    setting = _known(name)
    text = text.strip()
    if setting.kind == "number":
        try:
            return checked(name, float(text))
        except ValueError:
            return checked(name, text)
    if setting.kind == "flag":
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        return checked(name, words.get(text.lower(), text))
    if setting.kind == "names":
        return checked(name, [word for word in text.replace(",", " ").split() if word])
    if setting.kind == "keys":
        pairs = [pair.partition("=") for pair in text.split()]
        return checked(name, {key: keys for key, _, keys in pairs})
    return checked(name, text)


def shown(name: str, value: Value) -> str:
    """A value as :func:`parsed` reads it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, Mapping):
        return " ".join(f"{key}={keys}" for key, keys in value.items())
    return str(value)


def source(name: str, preferences: Preferences) -> str:
    """Where a setting's value comes from: the name of an environment variable, ``file`` or ``default``."""
    variable = _known(name).environment
    if variable and os.environ.get(variable):
        return f"${variable}"
    return "file" if getattr(preferences, name) != getattr(DEFAULTS, name) else "default"


def save(name: str, value: Value, path: Path | None = None) -> Preferences:
    """Write one setting into the file, made if need be, and give back all of them. A default is taken out of the file.

    Comments and all other lines stay as they are.

    Raises:
        SettingsError: the setting can't have this value, or the file can't be written or is broken.
    """
    path, value = path or settings_path(), checked(name, list(value) if isinstance(value, tuple) else value)
    try:
        text = _text(path) if path.exists() else _HEAD
        wanted = _tree(text, path)
        wanted[name] = list(value) if isinstance(value, tuple) else value
        default = value == getattr(DEFAULTS, name)
        if default:
            del wanted[name]
        new = _with(text, name, None if default else value)
        if not _means(new, wanted, path):
            do = "Write it as lines of 'name: value', without braces around them."
            raise SettingsError("this file is written in a way that can't be changed here", where=str(path), do=do)
        _write(path, new)
    except (OSError, UnicodeDecodeError) as error:
        what, do = f"the settings can't be written ({error})", "Name a folder that can be: XDG_CONFIG_HOME=FOLDER."
        raise SettingsError(what, where=str(path), do=do) from None
    return load(path)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_LONGEST).decode("utf-8")


#: Bytes that are read of the file: whatever lies there instead of it, a gigabyte or a device, can't hold anyone up.
_LONGEST = 64 << 10
_HEAD = "# Settings of finetui. What each is for: finetui settings\n"


def _known(name: Any) -> Setting:
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(str(name), _BY_NAME, n=1, cutoff=0.5)
    do = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(_BY_NAME)}."
    raise SettingsError(f"there is no setting {str(name)!r}", do=do)


def _tree(text: str, path: Path) -> dict[Any, Any]:
    from .yaml_text import parse

    try:
        tree, _ = parse(text, str(path))
    except UserError as error:
        raise SettingsError(error.what, where=error.where, do="Correct the file or remove it.") from None
    if tree is not None and not isinstance(tree, dict):
        raise SettingsError("settings are lines of 'name: value'", where=str(path), do="Correct the file or remove it.")
    return tree or {}


def _means(text: str, wanted: dict[Any, Any], path: Path) -> bool:
    try:
        return _tree(text, path) == wanted
    except SettingsError:
        return False


def _with(text: str, name: str, value: Value | None) -> str:
    """The file with one setting replaced, added, or taken out (None)."""
    import yaml

    plain: Any = list(value) if isinstance(value, tuple) else value
    written = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    line = "" if value is None else f"{name}: {written.removesuffix('...' + chr(10)).strip()}\n"
    node = yaml.compose(text)
    for key, old in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == name:
            end = _end(old)
            rest = text[end:].split("\n", 1)[0]  # a comment
            start, stop = key.start_mark.index, end + len(rest)
            if value is None:
                stop += text[stop : stop + 1] == "\n"
                return text[:start] + text[stop:]
            return text[:start] + line.rstrip("\n") + rest + text[stop:]
    return text + ("" if not text or text.endswith("\n") else "\n") + line


def _end(node: Any) -> int:
    """Where a value ends; a block by its own account ends only where the next key begins, comments and all."""
    if not isinstance(node.value, str) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _write(path: Path, text: str) -> None:
    """Whole or not at all; through a link, so that a file kept elsewhere stays there."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".settings-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


assert {f.name for f in fields(Preferences)} == {*_BY_NAME, "problems"}
