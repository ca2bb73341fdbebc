"""A setting is a field of a dataclass that carries all that is known of it: default, group, help and bounds.

The options of the command line, their help, the checks of files and of Python callers derive from it.
"""

from collections.abc import Mapping
from dataclasses import field, fields
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gm_probe.checks import instance, one_of, real, truth, whole
from gm_probe.errors import UsageError


def setting(
    default: Any,
    group: str = "",
    text: str = "",
    *,
    unset: str | None = None,
    flag: str = "",
    metavar: str = "",
    grid: str = "",
    **rule: Any,
) -> Any:
    """Return a dataclass field for one setting.

    Args:
        group: section of ``--help`` that shows it.
        text: what it does, in whole sentences, with its unit. Without a text it is no option of the command line.
        unset: what happens by default, where the value does not say it.
        flag: the option's name where it is not the field's.
        metavar: what the help shows for its value.
        grid: name of the field for the further values, of a number whose option takes several.
        rule: ``choices`` of a text; or of a number the bounds ``least``, ``above``, ``most`` and ``below``, and
            ``smallest``: it is 0 or at least this.
    """
    option = {"group": group, "help": text, "unset": unset, "flag": flag, "metavar": metavar, "grid": grid}
    return field(default=default, metadata={**option, "rule": rule})


def validate(settings: Any) -> None:
    """Check every field of a frozen dataclass by its type and rule, and store numbers as Python's own.

    Raises:
        UsageError: a field has another type or lies outside of its bounds.
    """
    kind: Any = type(settings)
    hints = type_hints(kind)
    for each in fields(settings):
        value = _checked(each.name, getattr(settings, each.name), hints[each.name], each.metadata["rule"])
        object.__setattr__(settings, each.name, value)


@cache
def type_hints(settings: Any) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields; finding them is slow."""
    return get_type_hints(settings)


def kind_of(hint: Any) -> Any:
    """Return the type of a setting, without its None."""
    optional = get_origin(hint) in (Union, UnionType)
    return next(part for part in (get_args(hint) if optional else [hint]) if part is not type(None))


def _checked(name: str, value: Any, hint: Any, rule: Mapping[str, Any]) -> Any:
    kind = kind_of(hint)
    if value is None and kind is not hint:
        return None
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise UsageError(f"{name} = {value!r} must be a tuple")
        return tuple(_checked(name, each, get_args(kind)[0], rule) for each in value)
    if get_origin(kind) is Literal:
        return one_of(name, value, get_args(kind))
    if "choices" in rule:
        return one_of(name, value, rule["choices"])
    if kind is bool:
        return truth(name, value)
    if kind is int:
        return whole(name, value, **rule)
    if kind is float:
        bounds = {key: bound for key, bound in rule.items() if key != "smallest"}
        found = real(name, value, **bounds)
        if 0 < abs(found) < rule.get("smallest", 0):
            raise UsageError(f"{name} = {value!r} must be 0 or at least {rule['smallest']:g}")
        return found
    instance(name, value, kind)
    return value
