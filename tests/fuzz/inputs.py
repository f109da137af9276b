"""Inputs near valid ones: trees and texts in which a few places hold what nobody expects there."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

#: Words that have hurt parsers before.
HOSTILE = (
    "", " ", "\0", "../../etc/passwd", "/etc/passwd", "~root", "C:\\x", "\x1b]0;x\x07", "\x9b31m", "\u202e", "\ud800",
    "nan", "inf", "-0", "1e999", "9" * 5000, "x" * 300, "${HOME}", "{{ 7 * 7 }}", "*", "<<", "&a [*a]", "!!python/none",
    "2024-99-99", "auto", "null", "true", "%s%n", "file:///etc/passwd", "http://[::1", "a.b.c", "__class__", "-1", "(",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-10, 10_000),
    st.floats(),
    st.sampled_from(HOSTILE),
    st.text(max_size=12),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all parts of a tree."""
    found = [path]
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in parts:
        found += places(part, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, seeds: list[Any]) -> Any:
    """A seed with up to three parts replaced, removed, doubled, wrapped or renamed."""
    tree: Any = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(tree)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                tree = draw(values)
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        key, how = path[-1], draw(st.sampled_from(("replace", "replace", "remove", "double", "wrap", "rename")))
        if how == "remove":
            del parent[key]
        elif how == "double" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif how == "wrap":
            parent[key] = draw(st.sampled_from([[parent[key]], {"a": parent[key]}, [[parent[key]] * 3]]))
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(HOSTILE) | st.text(max_size=5))] = parent.pop(key)
        else:
            parent[key] = draw(values)
    return tree


@st.composite
def garbled(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with up to four pieces overwritten, cut, repeated or inserted."""
    raw = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw)))
        piece = draw(st.binary(max_size=6) | st.sampled_from(HOSTILE).map(lambda text: text.encode(errors="replace")))
        how = draw(st.sampled_from(("overwrite", "insert", "cut", "repeat", "end")))
        if how == "overwrite":
            raw[at : at + len(piece)] = piece
        elif how == "insert":
            raw[at:at] = piece
        elif how == "cut":
            del raw[at : at + draw(st.integers(1, 40))]
        elif how == "repeat":
            raw[at:at] = raw[max(0, at - 20) : at] * draw(st.integers(1, 5))
        else:
            del raw[at:]
    return bytes(raw)
