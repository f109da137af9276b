"""YAML from anyone: plain values only, of bounded size, with the line of every key.

A few hundred bytes of YAML can stand for billions of values by naming one list from many places ("billion laughs",
https://en.wikipedia.org/wiki/Billion_laughs_attack), nest deeper than any stack, or contain themselves. All of that is
counted on the parsed nodes, which share what they repeat, before any value is made of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError

if TYPE_CHECKING:
    import yaml

#: Bytes of a file, values that it may stand for, and levels of nesting. Recipes have some hundred bytes and 100 values.
LONGEST, MOST, DEEPEST = 256 << 10, 20_000, 40


def read_text(path: Path) -> str:
    """A recipe's text.

    Raises:
        RecipeError: the file is missing, no file, too long to be a recipe, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST + 1)
        if len(raw) > LONGEST:
            what = f"the file is longer than {LONGEST >> 10} KiB, which no recipe is"
            raise RecipeError(what, where=str(path), do="Give a recipe, or the folder or config.json of a model.")
        return raw.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError("there is no such recipe", where=str(path), do="Check the path.") from None
    except (OSError, ValueError) as error:
        what, do = f"the recipe can't be read ({error})", "Give a text file in UTF-8 that you may read."
        raise RecipeError(what, where=str(path), do=do) from None


def parse(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and its node, from which lines are read.

    Raises:
        RecipeError: it is not YAML, names a key twice, or is too large, too deep or endless.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _bound(node, source)
        return loader.construct_document(node), node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or "it is not YAML"
        raise RecipeError(f"this is not valid YAML ({problem})", where=where, do="Check the indentation.") from None
    except (RecursionError, ValueError, OverflowError) as error:  # of dates and numbers that no type can hold
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise RecipeError(f"this is not valid YAML ({why})", where=source, do="Check its values.") from None


def _bound(root: yaml.Node, source: str) -> None:
    """Refuse what stands for too many values, for none that ends, or for a key twice."""
    import yaml

    sizes: dict[int, int] = {}  # of nodes that are measured
    open_nodes: set[int] = set()  # of nodes that are being measured: to meet one again is to contain itself

    def size(node: yaml.Node, depth: int) -> int:
        place = id(node)
        where = f"{source}:{node.start_mark.line + 1}"
        if place in open_nodes:
            raise RecipeError("this contains itself", where=where, do="Remove the alias (*).")
        if depth > DEEPEST:
            raise RecipeError(f"this is nested deeper than {DEEPEST} levels", where=where, do="No recipe is.")
        if place not in sizes:
            if isinstance(node, yaml.ScalarNode) and not _is_text(node.value):
                raise RecipeError("this holds characters that no file can hold", where=where, do="Write it anew.")
            open_nodes.add(place)
            if isinstance(node, yaml.MappingNode):
                _refuse_twice(node, source)
                parts = [part for pair in node.value for part in pair]
            else:
                parts = node.value if isinstance(node, yaml.SequenceNode) else []
            total = 1
            for part in parts:
                total += size(part, depth + 1)
                if total > MOST:
                    what = f"this stands for more than {MOST:,} values, which no recipe does"
                    raise RecipeError(what, where=where, do="Write out what the aliases (*) repeat.")
            open_nodes.discard(place)
            sizes[place] = total
        return sizes[place]

    size(root, 0)


def _is_text(value: str) -> bool:
    """Whether text can be encoded and named: no halves of surrogate pairs, which escapes can make, and no null."""
    return "\0" not in value and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _refuse_twice(node: yaml.MappingNode, source: str) -> None:
    import yaml

    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in seen:
                where = f"{source}:{key.start_mark.line + 1}"
                raise RecipeError(f"{key.value!r} is set twice", where=where, do="Keep one of them.")
            seen.add(key.value)
