"""``gmprobe measure``: one checkpoint or many, over unlabeled or labeled data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.data import DataOptions, opened_aloud
from gm_probe.cli.executors import ExecutorOptions, executor_options
from gm_probe.cli.measure_many import measure_all, opened_once
from gm_probe.cli.measure_options import MeasureOptions
from gm_probe.cli.measure_relevance import idle, quadrature, require_use_of_grids
from gm_probe.cli.options import format_options, head_option, unlabeled_option
from gm_probe.cli.output import note, notes_console
from gm_probe.cli.param_types import PATH, num_bytes
from gm_probe.cli.settings import GroupedCommand, config_option, pop_settings, setting_options
from gm_probe.errors import CheckpointError, UsageError
from gm_probe.measures.names import LAYER_MEASURES
from gm_probe.measures.settings import Protocol, Settings

if TYPE_CHECKING:
    from gm_probe.measuring.many import Request


@dataclass(frozen=True, slots=True)
class _Task:
    """What one command asks for; everything that can be wrong with its options has been checked."""

    wanted: MeasureOptions
    settings: Settings
    data: DataOptions
    unlabeled: str | None
    head: str
    names: tuple[str, ...]
    memory: float | None

    @classmethod
    def of(cls, unlabeled: str | None, head: str, options: dict[str, Any]) -> _Task:
        """Read a command's ``options``; imports no torch.

        Raises:
            UsageError, DataError: an option that is wrong by itself or beside another.
        """
        wanted = MeasureOptions(**pop_settings(MeasureOptions, options))
        wanted.require_consistent(unlabeled, head)
        protocol: Protocol = "converged" if wanted.protocol == "converged" else "paper"
        settings = Settings(**pop_settings(Settings, options), protocol=protocol)
        chosen = wanted.chosen(head)
        require_use_of_grids(chosen, settings)
        memory = None if wanted.memory is None else num_bytes("--memory", wanted.memory)
        task = cls(wanted, settings, DataOptions.of(options), unlabeled, head, tuple(chosen), memory)
        task.data.require_use(task.source)
        return task

    @property
    def source(self) -> str | None:
        """Return the data that is measured over; None means each run's own."""
        return self.unlabeled if self.wanted.labeled is None else self.wanted.labeled

    @property
    def labeled(self) -> bool:
        return self.wanted.labeled is not None

    def note_idle(self) -> None:
        """Name the options that were given and change nothing of what is measured."""
        context = click.get_current_context()
        given = _given(context)
        options = {str(p.name): p.opts[0] for p in context.command.params if p.name in given}
        measured = [*self.names, *(LAYER_MEASURES if self.wanted.by_layer else ())]
        for option in idle(measured, self.settings, options, density=self.wanted.density is not None):
            note(notes_console(), f"note: {option} has no effect on what is measured")

    def loading(self, quiet: bool, *, here: bool) -> dict[str, Any]:
        """Return how each checkpoint is loaded and measured, with the device by its name.

        Args:
            here: in this process. Else each looks for its device where it is measured: Ray's workers alone may have a
                GPU.
        """
        data, wanted = self.data, self.wanted
        loading = (data if here else replace(data, device="cpu")).loading() | {
            "device": data.device,
            "memory": self.memory,
            "head": self.head,
            "temperature": wanted.temperature,
            "quadrature": None if wanted.density is None else quadrature(self.settings),
            "per_layer": wanted.by_layer,
        }
        if wanted.validation is not None:
            loading["validation"] = opened_aloud(data, wanted.validation, True, quiet)[0].in_memory()
        return loading

    def request(
        self, loading: dict[str, Any], own_loading: Mapping[Path, Mapping[str, Any]], quiet: bool
    ) -> Request:
        """Return the request; the data that it names is opened, and what is to be known of it is said."""
        from gm_probe.measuring.many import Request
        from gm_probe.measuring.setup import Setup
        from gm_probe.training.run_splits import OWN_UNLABELED, own_unlabeled

        data, source = self.data, self.source
        scope: dict[str, Any] = {"part": OWN_UNLABELED, "max_examples": data.max_examples}
        examples = partial(own_unlabeled, permissions=data.permissions())
        if source is not None:
            opened, scope["part"] = opened_aloud(data, source, self.labeled, quiet)
            scope |= {"data": opened.source, "labeled": self.labeled, **data.reading()}
            examples = partial(opened_once, data, source, self.labeled)
        setup = Setup(self.settings, scope, loading, own_loading)
        return Request(self.names, examples, setup, self.wanted.save, _given(click.get_current_context()))


@click.command(
    cls=GroupedCommand,
    first=(
        *("unlabeled", "labeled", "model_names", "mean", "std", "no_normalize", "max_examples", "measures"),
        *("protocol", "rho", "device", "save", "output"),
    ),
    epilog="Example:  gmprobe measure ckpt.pt --unlabeled data/",
)
@click.argument("checkpoints", nargs=-1, type=PATH)
@unlabeled_option
@setting_options(MeasureOptions)
@setting_options(Settings)
@head_option("classifier", "binary", "multilabel", "simclr")
@setting_options(DataOptions)
@config_option
@executor_options("local", "ray")
@format_options
def measure(
    checkpoints: tuple[Path, ...],
    unlabeled: str | None,
    head: str,
    output: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure how well CHECKPOINTS will generalize.

    A checkpoint is a run folder, a file that gmprobe wrote, or any .pt/.pth/.th/.ckpt/.safetensors with a
    state dict. For the last, --model names the network, and --mean/--std give its normalisation. Unlabeled
    data is enough for local inconsistency and the Fisher matrix. The Hessian then uses predicted labels,
    and its row says so. Labeled data gives the Hessian with true labels, the error and the cross-entropy. A
    run folder, or a file in one, needs no data option: its own unlabeled part is used.

    For a SimCLR encoder, --head simclr measures the NT-Xent logits of two seeded views of every image.
    NT-Xent compares all views of a batch, so results depend on the batch size. Images that do not fill a
    batch are left out, and F is a mean over batches.

    A folder of runs stands for its finished runs. --save keeps the results in each run folder, and does not
    repeat measurements that are there with the same settings. Without CHECKPOINTS the run in runs/ that
    finished last is measured.
    """
    placing = ExecutorOptions.of(options)
    task = _Task.of(unlabeled, head, options)
    given, checkpoints = _checkpoints(checkpoints, task, quiet)
    own_loading = task.data.of_each(checkpoints)
    task.wanted.require_figures(len(checkpoints) if placing.here else 0)
    # with --save a run's own record gives the omitted options; only one of torchrun's processes prints
    if not (quiet or task.wanted.save) and os.environ.get("RANK", "0") == "0":
        task.note_idle()
    # all errors in the options have been reported; torch takes seconds to import
    from gm_probe.runs.records import run_of
    from gm_probe.runtime import processes
    from gm_probe.runtime.devices import named_device, pick_device

    # torchrun's processes share the examples of one checkpoint after another
    together = processes.launched() > 1
    if together and not placing.here:
        raise UsageError(
            "under torchrun, checkpoints are measured one by one; leave out --jobs and --executor"
        )
    device = task.data.device
    named_device(device)
    task.data.prepare_process()
    loading = task.loading(quiet, here=placing.here)
    with processes.joined(pick_device(device)) if together else nullcontext():
        speaks = processes.rank() == 0
        request = task.request(loading, own_loading, quiet or not speaks)
        engine = placing.engine(run_of(given[0]), device, task.data.threads)
        outcomes = measure_all(checkpoints, request, engine, output, quiet=quiet, speaks=speaks)
        if speaks and (task.wanted.density or task.wanted.layer_figure):
            task.wanted.draw(outcomes[0].result, checkpoints[0].name)


def _given(context: click.Context) -> frozenset[str]:
    """Return the names of settings that the command line gives, and of the grids around them."""
    default = click.core.ParameterSource.DEFAULT
    names = {name for name in context.params if context.get_parameter_source(name) is not default}
    grids = {each.metadata["grid"] for each in fields(Settings) if each.name in names}
    return frozenset(names | grids - {""})


def _checkpoints(
    given: tuple[Path, ...], task: _Task, quiet: bool
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the checkpoints that are ``given``, or else the last run, and the same with folders as their runs.

    Raises:
        CheckpointError: one does not exist.
        UsageError: one has no data of its own, and no other is given; or one that is to be saved into is no folder.
    """
    from gm_probe.measuring.trained_runs import checkpoints_in, last_finished
    from gm_probe.runs.records import CONFIG, RUNS

    if not given:
        if not RUNS.is_dir():
            raise UsageError(
                f"no checkpoint given, and there is no {RUNS}/ here; name a file or a run folder"
            )
        given = (last_finished(RUNS),)
        if not quiet:
            note(notes_console(), f"no checkpoint given: measuring {given[0]}, the last run that finished")
    found = tuple(checkpoints_in(given))
    if task.wanted.save and not all(path.is_dir() for path in found):
        raise UsageError("--save writes into run folders; give folders, or use --json > file")
    if not any(path.exists() for path in found):  # of several, one that is missing does not stop the others
        raise CheckpointError(f"{found[0]}: no such checkpoint")
    for path in found:
        if task.source is None and path.exists() and not (path.is_dir() or (path.parent / CONFIG).exists()):
            raise UsageError(f"{path} is not a gmprobe run. Add --unlabeled DATA or --labeled DATA")
    return given, found
