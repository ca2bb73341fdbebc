"""Options made from the fields of a settings class, and help that shows the main ones first."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, get_args, get_origin, get_type_hints

import click

from gm_probe.errors import UsageError

MAIN, ADVANCED = "Main options", "Advanced options"
"""Sections of a command that names its ``first`` options."""
OTHERS = "Output"
"""Section of the options that belong to no group."""


class GroupedOption(click.Option):
    """An option that stands in a named section of its command's help."""

    def __init__(self, *args: Any, group: str = OTHERS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help shows its options in sections, in the order in which their groups come first.

    Args:
        first: names of the parameters that most people need. Where they are named, the others are advanced.
    """

    def __init__(self, *args: Any, first: Collection[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = first

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {MAIN: []} if self.first else {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if isinstance(parameter, click.Option) and record is not None:
                sections.setdefault(self._section(parameter), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)

    def _section(self, parameter: click.Parameter) -> str:
        if self.first:
            return MAIN if parameter.name in self.first else ADVANCED
        return getattr(parameter, "group", OTHERS)


def setting_options(settings: type) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for every field of a dataclass.

    A field's metadata has its ``group``, ``help``, ``unset`` and ``rule``, as ``TrainConfig``'s do. An option that is
    not given is None, so that the settings class, a file or a run's record decides.
    """
    hints = get_type_hints(settings)

    def decorate(command: Any) -> Any:
        for each in reversed(fields(settings)):
            command = _option(each, hints[each.name])(command)
        return command

    return decorate


def set_option(command: Any) -> Any:
    """Add ``--set KEY=VALUE``, which gives the command a dict ``assigned``."""
    return click.option(
        "--set",
        "assigned",
        cls=GroupedOption,
        group=MAIN,
        multiple=True,
        metavar="KEY=VALUE",
        callback=_assignments,
        help="Set a setting by its name in config.toml, with a value as in a recipe. Repeatable.",
    )(command)


def given_settings(options: Mapping[str, Any], assigned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, and what ``--set`` assigned.

    Raises:
        UsageError: both give one setting.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in assigned:
        if name in given:
            raise UsageError(f"--set {name}=... and --{name.replace('_', '-')} are both given. Keep one")
    return {**given, **assigned}


def _assignments(_: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name or name in found:
            reason = "names the setting a second time" if name in found else "is not KEY=VALUE"
            raise UsageError(f"--set {text!r} {reason}. Write each setting once, such as --set lr=0.1")
        found[name] = _toml_value(value)
    return found


def _toml_value(text: str) -> Any:
    """Return what ``text`` stands for in a TOML file; a word needs no quotes."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def _option(each: Field[Any], hint: Any) -> Callable[[Any], Any]:
    alternatives = [hint] if get_origin(hint) is tuple else [*get_args(hint), hint]
    kind = next(part for part in alternatives if part is not type(None))
    text = each.metadata["help"]
    chosen: dict[str, Any] = {"type": kind}
    if kind is bool:
        chosen = {"is_flag": True}
    elif kind not in (int, float, str):
        chosen = {"callback": _whole_numbers, "metavar": "N1,N2,..."}
    else:
        default = each.metadata["unset"] or each.default
        if default is not None:
            text += f"  [default: {default:g}]" if isinstance(default, float) else f"  [default: {default}]"
        if "choices" in each.metadata["rule"]:
            chosen["metavar"] = "|".join(each.metadata["rule"]["choices"])
    flag = f"--{each.name.replace('_', '-')}"
    return click.option(
        flag, cls=GroupedOption, group=each.metadata["group"], default=None, help=text, **chosen
    )


def _whole_numbers(_: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{parameter.opts[0]} {text!r} must be whole numbers with commas between, such as 60,120,160"
        ) from error
