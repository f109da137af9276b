"""Text of others inside a shell script: words that stay words, and files that stay text."""

from __future__ import annotations

import shlex

from ...planner.errors import UserError


def word(text: str) -> str:
    """A text as one word of a shell, whatever it holds.

    Raises:
        UserError: it holds a line break or another control character, which no job file can name.
    """
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in text):
        raise UserError(f"{text!r} holds a line break or another control character", do="Choose another name.")
    return shlex.quote(text)


def words(*texts: str) -> str:
    """Texts as the words of one command."""
    return " ".join(word(text) for text in texts)


def here_document(target: str, text: str) -> str:
    """A command that writes a text to a file, byte for byte: the shell expands nothing in it.

    Args:
        target: the file, as the shell is to read it: quoted already.
    """
    end = "FINETUI_RECIPE"
    while end in text:
        end += "_"
    text = text if text.endswith("\n") else f"{text}\n"
    return f"cat > {target} <<'{end}'\n{text}{end}\n"


def comment(text: str) -> str:
    """A text as lines of comment."""
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())
