"""Parse, make one library call, print. The only place that turns a ProbeError into a message and an exit code.

Commands are imported when they are asked for, so that ``gmprobe --help`` and ``gmprobe correlate`` never wait
for torch.
"""

import importlib
import io
import logging
import os
import sys
import traceback
import warnings
from contextlib import suppress
from typing import Any, NoReturn

import click

from gm_probe.cli.limits import require_room_for_torch
from gm_probe.errors import ProbeError, did_you_mean, first_line, out_of_memory, printable
from gm_probe.runtime.signals import INTERRUPTED, TERMINATED, Terminated, ending_in_order, last_words

COMMANDS = {
    "quickstart": "Train, measure and correlate a small sweep on bundled real digits.",
    "measure": "Measure how well checkpoints will generalize, from unlabeled data.",
    "estimate": "Estimate how accurate checkpoints are on unlabeled data, and rank them.",
    "train": "Train one model with SGD, SAM, ASAM, IAM-D or IAM-S.",
    "tune": "Choose ρ and β by the error on a held-out tenth of the training part.",
    "sweep": "Train and measure every run of a recipe.",
    "run-one": "Train and measure one run of a sweep folder; for job arrays.",
    "status": "Show how far a sweep is, and what failed.",
    "collect": "Write one table of all runs: settings, errors, measures with uncertainties.",
    "pairs": "Compare models pair by pair over unlabeled data: disagreement, inconsistency, instability.",
    "correlate": "Correlate each measure with the generalization gap over many runs.",
    "report": "Write one self-contained HTML page about many runs.",
    "reproduce": "Reproduce the paper's tables and figures, and say whether each claim shows.",
    "models": "List the models that --model takes.",
    "datasets": "List the data that --data and --unlabeled take.",
    "measures": "List the measures, what each needs and what it costs.",
    "recipes": "List the built-in recipes of `gmprobe sweep`.",
    "doctor": "Check what this machine has, and say how to fix what is missing.",
}
LIGHT = ("status", "collect", "correlate", "report")
"""Commands that do without torch."""
LISTINGS = ("models", "datasets", "measures", "recipes")


class LazyGroup(click.Group):
    """A click group whose commands live in modules of this package, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        if name not in LIGHT:
            require_room_for_torch()
        own = name.replace("-", "_")
        module = importlib.import_module(f"{__name__}.{'listings' if name in LISTINGS else own}")
        command = getattr(module, own)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # before click prints an empty line for it
            raise click.Abort from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            raise click.UsageError(f"no command {name!r}; {did_you_mean(name, COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="gm_probe", prog_name="gmprobe")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Tell how well a trained classifier will generalize, from its checkpoint and unlabeled data.

    \b
    Start with:  gmprobe quickstart
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Codes: 0 ok, 1 internal, 2 usage, 3 checkpoint, 4 data, 5 diverged, 6 resources, 7 I/O, 130 interrupted,
    143 terminated.
    """
    with ending_in_order(for_good=args is None):
        try:
            _run(sys.argv[1:] if args is None else args)
        except KeyboardInterrupt:  # a second interrupt, while the first was reported
            _fail("interrupted; finished results are kept", INTERRUPTED)
        except Terminated as stop:
            _fail(stop.message, TERMINATED)


def _run(args: list[str]) -> None:
    # in this order, so that each takes its own number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller closed it and wants no output there
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123  for good
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where ρ or λ cannot be shown
    # gmprobe itself says in one line what is wrong with an image; the library's own lines would repeat it
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would complain about a read-only home
    _pass_over_settings_here()
    try:
        cli.main(args=args, prog_name="gmprobe", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        message = " ".join(error.format_message().split()).rstrip(".")
        _fail(f"{message}{hint}", error.exit_code)
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except BrokenPipeError:  # the reader (head, less) closed early, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _debug(args)
        _fail(f"{error.strerror or error}: {str(error.filename or 'the output')[:200]}", 7)
    except ProbeError as error:
        _debug(args)
        _fail(str(error), error.exit_code)
    except UnicodeEncodeError as error:
        _debug(args)
        _fail(f"a name that is not {error.encoding} cannot be used here: {error.object[:200]}. Rename it", 2)
    except (MemoryError, RuntimeError, ImportError) as error:
        _debug(args)
        if out_of_memory(error):
            _fail(f"out of memory ({first_line(error)}); lower --batch-size or --max-examples", 6)
        _internal(error)
    except Exception as error:  # noqa: BLE001  the last resort: a stranger gets a line, --debug gets the rest
        _debug(args)
        _internal(error)


def _internal(error: Exception) -> NoReturn:
    kind = type(error).__name__
    _fail(f"internal error: {kind}: {first_line(error)}; run again as `gmprobe --debug ...` to report it", 1)


def _pass_over_settings_here() -> None:
    """Import matplotlib from elsewhere where the current folder has settings for it, which it would take unasked."""
    name = "matplotlibrc"
    if not os.path.lexists(name):  # a link to nothing, too
        return
    here = os.getcwd()  # noqa: PTH109
    os.chdir(os.path.dirname(__file__))  # noqa: PTH120
    try:
        importlib.import_module("matplotlib")
    finally:
        os.chdir(here)


def _debug(args: list[Any]) -> None:
    if "--debug" in args:
        with suppress(OSError):
            for line in traceback.format_exc().splitlines():
                print(printable(line), file=sys.stderr)


def _fail(message: str, code: int) -> NoReturn:
    with last_words():
        try:
            print(f"gmprobe: {printable(message)}", file=sys.stderr, flush=True)
        except OSError:
            # only the exit code is left, which Python would change if its last flush failed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(code)
