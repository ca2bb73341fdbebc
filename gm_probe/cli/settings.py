"""Options made from the fields of a settings class, and help that shows the main ones first."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from gm_probe.cli.param_types import PATH, Parsed, floats, share, wholes
from gm_probe.errors import UsageError, did_you_mean
from gm_probe.files.atomic import read_toml
from gm_probe.setting import kind_of, type_hints

MAIN, ADVANCED = "Main options", "Advanced options"
"""Sections of a command that names its ``first`` options."""
OTHERS = "Output"
"""Section of the options that belong to no group."""
PERCENT = "PERCENT"
"""The metavar of a share that may be given in percent."""


class GroupedOption(click.Option):
    """An option that stands in a named section of its command's help."""

    def __init__(self, *args: Any, group: str = OTHERS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help shows its options in sections, in the order in which their groups come first.

    Args:
        first: names of the parameters that most people need. They come first; others stand in their own group or, if
            they have none, among the advanced ones.
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
        if parameter.name in self.first:
            return MAIN
        return getattr(parameter, "group", ADVANCED if self.first else OTHERS)


def setting_options(settings: type, names: Collection[str] = ()) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for every field of a dataclass that has a help text, or those named.

    The fields are made by ``setting``. An option that is not given is None, so that the settings class, a file or a
    run's record decides.
    """
    hints = type_hints(settings)

    def decorate(command: Any) -> Any:
        for each in reversed(fields(settings)):
            if each.metadata["help"] and (each.name in names or not names):
                command = _option(each, kind_of(hints[each.name]))(command)
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


def config_option(command: Any) -> Any:
    """Add ``--config``: a TOML file that gives the options of the command line, by their names."""
    return click.option(
        "--config",
        type=PATH,
        is_eager=True,
        expose_value=False,
        callback=_from_file,
        metavar="FILE",
        help="Take options from this TOML file, such as rho = 0.3. Options on the command line replace the file's.",
    )(command)


def _from_file(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take the defaults of the command's options from ``path``.

    Raises:
        UsageError: a key is no option of the command.
        StorageError: the file cannot be read.
    """
    if path is None:
        return
    flags = {flag.lstrip("-").replace("-", "_"): p.name for p in context.command.params for flag in p.opts}
    chosen: dict[str, Any] = {}
    for key, value in read_toml(path, follow=True).items():
        name = flags.get(key.replace("-", "_"))
        if name is None:
            raise UsageError(f"{path}: no option {key!r}; {did_you_mean(key, flags)}")
        several = isinstance(value, list) and not _takes_several(context.command, name)
        chosen[name] = ",".join(map(str, value)) if several else value
    context.default_map = chosen


def _takes_several(command: click.Command, name: str) -> bool:
    return any(p.name == name and (getattr(p, "multiple", False) or p.nargs != 1) for p in command.params)


def pop_settings(settings: type, options: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of ``settings`` out of a command's ``options``; what was not given is left out.

    Where an option took several values for one number, the first is the number and the others its ``grid``.
    """
    found: dict[str, Any] = {}
    for each in fields(settings):
        value = options.pop(each.name, None)
        if value is None or value == ():
            continue
        if grid := each.metadata["grid"]:
            value, found[grid] = value[0], value[1:]
        found[each.name] = value
    return found


def _option(each: Field[Any], kind: Any) -> Callable[[Any], Any]:
    known = each.metadata
    text, rule = known["help"], known["rule"]
    chosen: dict[str, Any] = {"type": kind, "default": None, "metavar": known["metavar"] or None}
    if kind is bool:
        chosen = {"is_flag": True, "default": None}
    elif kind == tuple[str, ...]:
        chosen |= {"type": str, "multiple": True, "default": ()}
    elif kind == tuple[int, ...]:
        chosen |= {"type": Parsed(wholes), "metavar": "N1,N2,..."}
    elif known["grid"]:
        chosen["type"] = Parsed(wholes if kind is int else floats)
    elif known["metavar"] == PERCENT:
        chosen["type"] = Parsed(share)
    elif kind is Path:
        chosen["type"] = PATH
    elif "choices" in rule:
        chosen["metavar"] = "|".join(rule["choices"])
    default = known["unset"] or each.default
    if default is not None and default is not False and default != ():
        text += f"  [default: {default:g}]" if isinstance(default, float) else f"  [default: {default}]"
    flag = known["flag"] or f"--{each.name.replace('_', '-')}"
    return click.option(flag, each.name, cls=GroupedOption, group=known["group"], help=text, **chosen)
