"""Checks of what a file on disk says: kinds of values, and tables whose keys each have one. Imports no torch."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from gm_probe.errors import printable

Check = Callable[[Any, str], None]
"""Given a value and its place in the file, raises Unfit where the value is of another kind."""
DEEPEST = 16
"""Levels of tables and lists; the tool's own files have six at most."""
LONGEST_NAME, LONGEST_TEXT = 200, 10_000
"""Characters of a key, and of a text."""
MOST_KEYS = 500
"""Keys of one table, unless its schema says otherwise."""


class Unfit(ValueError):
    """A value that its file may not hold; the message begins with the value's place."""


def bounded(value: Any, *, nan: bool = True) -> None:
    """Refuse what no record needs and what would exhaust its reader: depth, long names and texts, huge integers.

    Args:
        nan: let NaN and infinity pass.

    Raises:
        Unfit: naming the place.
    """
    waiting: list[tuple[Any, str, int]] = [(value, "", 0)]
    while waiting:  # not by recursion: the depth is the file's choice
        item, place, depth = waiting.pop()
        if depth > DEEPEST:
            raise Unfit(f"{_start(place)} is nested in more than {DEEPEST} levels")
        if isinstance(item, dict):
            _check_keys(item, place)
            waiting += [(each, inside(place, key), depth + 1) for key, each in item.items()]
        elif isinstance(item, list):
            deeper = [
                each for each in item if not _passes(each, nan)
            ]  # plain numbers need no look of their own
            waiting += [(each, place, depth + 1) for each in deeper]
        elif isinstance(item, str):
            if len(item) > LONGEST_TEXT:
                raise Unfit(f"{_start(place)} has {len(item):,} characters, more than {LONGEST_TEXT:,}")
        elif item is not None and not _passes(item, nan):
            kinds = {int: "an integer beyond 64 bits", float: "not finite"}
            raise Unfit(f"{_start(place)} is {kinds.get(type(item), f'a {type(item).__name__}')}")


def _passes(value: Any, nan: bool) -> bool:
    """Return whether it is a number, or true or false, within bounds."""
    if isinstance(value, float):
        return nan or math.isfinite(value)
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _check_keys(table: Mapping[Any, Any], place: str) -> None:
    odd = next((key for key in table if not key.isprintable()), None)
    if odd is not None:
        raise Unfit(f"{_start(place)} has the key {_start(odd)}, with unprintable characters")
    long = next((key for key in table if len(key) > LONGEST_NAME), None)
    if long is not None:
        raise Unfit(f"{_start(place)} has the key {_start(long)} of {len(long):,} characters")


def inside(place: str, key: str) -> str:
    """Return the place of ``key`` in the table at ``place``, such as 'a.b'."""
    return f"{place}.{key}" if place else key


def _start(place: str) -> str:
    """Return ``place`` on one line, cut to what a reader needs."""
    return printable(place if len(place) <= 80 else f"{place[:60]}…") or "its content"


def _unfit(value: Any, place: str, needed: str) -> Unfit:
    found = printable(reprlib.repr(value))
    return Unfit(f"{_start(place)} is {found}, which is not {needed}")


# ---- kinds


def _kind(needed: str, fits: Callable[[Any], bool]) -> Check:
    """Return the check of values for which ``fits`` holds; ``needed`` says in words what they are."""

    def checked(value: Any, place: str) -> None:
        if not fits(value):
            raise _unfit(value, place, needed)

    return checked


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


number = _kind("a number", _is_number)  # NaN and infinity, too
finite = _kind("a finite number", lambda value: _is_number(value) and math.isfinite(value))
count = _kind("a whole number ≥ 0", lambda value: type(value) is int and value >= 0)
text = _kind("text", lambda value: isinstance(value, str))
flag = _kind("true or false", lambda value: isinstance(value, bool))
scalar = _kind("a number, a text, true or false", lambda value: isinstance(value, bool | int | float | str))
anything = _kind("anything", lambda _: True)


def between(least: float, most: float) -> Check:
    """Return the check of a number within these bounds."""
    return _kind(
        f"between {least:g} and {most:g}", lambda value: _is_number(value) and least <= value <= most
    )


def one_of(*choices: str) -> Check:
    """Return the check of one of these texts."""
    return _kind(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


# ---- kinds made of kinds


def optional(check: Check) -> Check:
    """Return a check that takes None, too."""

    def checked(value: Any, place: str) -> None:
        if value is not None:
            check(value, place)

    return checked


def either(needed: str, *checks: Check) -> Check:
    """Return the check of what one of ``checks`` takes; ``needed`` says it in words."""

    def checked(value: Any, place: str) -> None:
        for check in checks:
            try:
                return check(value, place)
            except Unfit:
                continue
        raise _unfit(value, place, needed)

    return checked


def listed(check: Check) -> Check:
    """Return the check of a list of such values."""

    def checked(value: Any, place: str) -> None:
        if not isinstance(value, list):
            raise _unfit(value, place, "a list")
        for position, each in enumerate(value):
            check(each, f"{place}[{position}]")

    return checked


def mapping(check: Check, *, refused: Collection[str] = (), most: int = MOST_KEYS) -> Check:
    """Return the check of a table of such values under any names but ``refused``, which readers use otherwise."""
    return table({}, others=check, refused=refused, most=most)


def table(
    kinds: Mapping[str, Check],
    *,
    required: Collection[str] = (),
    others: Check = anything,
    refused: Collection[str] = (),
    most: int = MOST_KEYS,
) -> Check:
    """Return the check of a table whose keys in ``kinds`` are of these kinds.

    Args:
        required: keys that must be there.
        others: kind of all other keys.
        refused: keys that must not be there.
        most: how many keys there may be.
    """

    def checked(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise _unfit(value, place, "a table")
        if len(value) > most:
            raise Unfit(f"{_start(place)} has {len(value):,} keys, more than {most:,}")
        for key in required:
            if key not in value:
                raise Unfit(f"{_start(inside(place, key))} is missing")
        for key, each in value.items():
            if key in refused:
                raise Unfit(f"{_start(inside(place, key))} has a name that is reserved")
            kinds.get(key, others)(each, inside(place, key))

    return checked
