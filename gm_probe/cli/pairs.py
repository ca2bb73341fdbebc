"""``gmprobe pairs``: how far models of one training procedure differ from each other over unlabeled data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.data import DataOptions
from gm_probe.cli.options import format_options, head_option, unlabeled_option
from gm_probe.cli.output import (
    note,
    note_reading,
    notes_console,
    number,
    print_as,
    results_console,
    say,
    table,
)
from gm_probe.cli.param_types import PATH, SEED
from gm_probe.cli.progress import progress_bar
from gm_probe.cli.settings import setting_options
from gm_probe.errors import CheckpointError, DataError, DivergedError, UsageError
from gm_probe.runs.records import RUNS, find_runs

if TYPE_CHECKING:
    import torch

    from gm_probe.data.examples import Examples
    from gm_probe.measuring.opening import LoadedCheckpoint


@click.command(epilog="Example:  gmprobe pairs runs/")
@click.argument("checkpoints", nargs=-1, type=PATH)
@unlabeled_option
@head_option("classifier", "binary", "multilabel")
@setting_options(DataOptions)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random subset.")
@format_options
def pairs(
    checkpoints: tuple[Path, ...],
    unlabeled: str | None,
    head: str,
    seed: int,
    output: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Compare CHECKPOINTS with each other, pair by pair.

    A checkpoint is a run folder, a folder of runs (its finished runs are used; runs/ unless given), or a
    file that `gmprobe measure` takes. Without --unlabeled the runs' own unlabeled part is used; it must be
    the same for all runs.

    \b
    disagreement                how often two models predict different classes
    conditional_inconsistency   C_θ: KL between two models of one training set
    inconsistency               C_P: the same, averaged over training sets
    instability                 S_P: KL between the mean predictions of two training sets

    The runs' records say which of them share a training set. A file does not record its training set, so
    all files are assumed to share one. Undefined values, such as S_P of a single training set, are shown
    with the reason. --json also has every pair; --csv prints one row per pair.
    """
    data = DataOptions.of(options)
    data.require_use(unlabeled)
    paths, excluded, notes = _checkpoints(checkpoints, unlabeled)
    own_loading = data.of_each(paths)
    from gm_probe.measures.pairwise import compare
    from gm_probe.sweep.data_identity import described, doubts, training_sets_of

    data.prepare_process()
    loading = data.loading() | {"head": head}
    training_sets = training_sets_of(paths)
    notes += doubts(paths, training_sets)
    examples, part = _examples(paths, unlabeled, data, notes, quiet)
    examples = examples.subset(data.max_examples, seed)
    outputs, models, chosen = _all_outputs(paths, examples, own_loading, quiet=quiet, **loading)
    notes += [*chosen, *_same_twice(paths, outputs)]
    with progress_bar("pairs", len(paths) * (len(paths) - 1) // 2, unit="pairs", quiet=quiet) as bar:
        report = compare(outputs, training_sets, names=[str(path) for path in paths], notify=bar.update)
    result = {
        "checkpoints": [row | {"training_set": s} for row, s in zip(models, training_sets, strict=True)],
        "training_sets": described(paths, training_sets),
        "excluded": [{"run": str(path), "reason": reason} for path, reason in excluded],
        "num_examples": report.num_examples,
        "num_classes": report.num_classes,
        "skipped": list(examples.skipped),
        "settings": _settings(examples, part, data, loading, seed),
        "measures": {name: row.as_dict() for name, row in report.rows.items()},
        "pairs": [asdict(pair) | {"a": str(paths[pair.a]), "b": str(paths[pair.b])} for pair in report.pairs],
        "notes": notes,
    }
    _show(result, output, quiet)


# ---- what is compared


def _checkpoints(
    checkpoints: Sequence[Path], unlabeled: str | None
) -> tuple[list[Path], list[tuple[Path, str]], list[str]]:
    """Return two or more checkpoints, those left out with the reason, and notes."""
    for path in checkpoints:
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint")
    if not checkpoints:
        find_runs(RUNS)
    from gm_probe.sweep.data_identity import find_checkpoints, is_run, reasons

    paths, excluded, notes = find_checkpoints(checkpoints or (RUNS,))
    if len(paths) < 2:
        left_out = f" ({len(excluded)} left out: {reasons(excluded)})" if excluded else ""
        raise UsageError(
            f"{paths[0]} is one checkpoint{left_out}; a pair needs two: give more, or their folder"
        )
    if unlabeled is None:
        for path in paths:
            if not is_run(path):
                raise UsageError(f"{path} is not a gmprobe run. Add --unlabeled DATA")
    return paths, excluded, notes


def _examples(
    paths: Sequence[Path], unlabeled: str | None, data: DataOptions, notes: list[str], quiet: bool
) -> tuple[Examples, str | None]:
    """Return the examples, and the part of a data set that they are; adds to ``notes`` what was read how."""
    if unlabeled is None:
        from gm_probe.sweep.data_identity import common_unlabeled
        from gm_probe.training.run_splits import OWN_UNLABELED

        return common_unlabeled(paths, data.permissions()), OWN_UNLABELED
    examples, used_part, hint = data.open(unlabeled, labeled=False)
    notes += [*([hint] if hint else []), *examples.notes]
    note_reading(notes_console(quiet), (), examples.skipped)
    return examples, used_part


def _settings(
    examples: Examples, part: str | None, data: DataOptions, loading: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    from gm_probe.measuring.opening import output_settings

    chosen = {"data": examples.source, "part": part, "passed_over": dict(examples.passed_over)}
    outputs = {key: value for key, value in output_settings(loading).items() if value is not None}
    return chosen | outputs | data.recorded(seed)


# ---- outputs


def _all_outputs(
    paths: Sequence[Path],
    examples: Examples,
    own_loading: Mapping[Path, Mapping[str, Any]],
    *,
    quiet: bool,
    **options: Any,
) -> tuple[list[torch.Tensor], list[dict[str, Any]], list[str]]:
    """Return (N, C) logits of each checkpoint, what it is, and notes; one that does not fit the others ends it."""
    from gm_probe.measures.pairwise import check_outputs

    outputs: list[torch.Tensor] = []
    models: list[dict[str, Any]] = []
    notes: list[str] = []
    named: tuple[Path, tuple[str, ...]] | None = None
    with progress_bar("outputs", len(paths), unit="models", quiet=quiet) as bar:
        for index, path in enumerate(paths):
            bar.update(index, label=path.name)
            logits, model, loaded = _outputs(path, examples, **options, **own_loading[path])
            classes = loaded.classes
            notes += loaded.notes
            check_outputs(str(path), logits, str(paths[0]), outputs[0] if outputs else logits)
            if classes and named is not None and classes != named[1]:
                raise DataError(
                    f"{path} and {named[0]} were trained on classes of different names or order "
                    f"({_first_difference(classes, named[1])}); their outputs cannot be compared"
                )
            named = named or ((path, classes) if classes else None)
            outputs.append(logits)
            models.append(model)
    return outputs, models, notes


def _first_difference(classes: Sequence[str], others: Sequence[str]) -> str:
    for index, (one, other) in enumerate(zip(classes, others, strict=False)):
        if one != other:
            return f"class {index}: {one!r} and {other!r}"
    return f"{len(classes)} and {len(others)} names"


def _outputs(
    path: Path, examples: Examples, **loading: Any
) -> tuple[torch.Tensor, dict[str, Any], LoadedCheckpoint]:
    """Return (N, C) logits of one checkpoint in eval mode, its row of the result, and the checkpoint as opened."""
    from gm_probe.linalg.work import Work
    from gm_probe.measures.context import MeasurementContext
    from gm_probe.measures.settings import Settings
    from gm_probe.measuring.opening import open_checkpoint
    from gm_probe.models.parameters import evaluating
    from gm_probe.runtime.precision import float32_products

    loaded = open_checkpoint(path, examples, **loading)
    try:
        with evaluating(loaded.model), float32_products():
            work = Work(len(examples))
            context = MeasurementContext(
                loaded.model, loaded.batches, Settings(), work, outputs=loaded.outputs
            )
            logits = context.logits
    except (DataError, DivergedError, UsageError) as error:  # these errors do not name the checkpoint
        raise type(error)(f"{path}: {error}") from error
    used = loaded.batches.normalization
    row = {"checkpoint": str(path), "model": loaded.name, "mean": list(used.mean), "std": list(used.std)}
    return logits, row | ({"key": loaded.key} if loaded.key else {}), loaded


def _same_twice(paths: Sequence[Path], outputs: Sequence[torch.Tensor]) -> list[str]:
    """Return a note for each checkpoint with the same outputs as an earlier one, which counts as another model."""
    first: dict[bytes, Path] = {}
    notes = []
    for path, logits in zip(paths, outputs, strict=True):
        before = first.setdefault(sha256(logits.cpu().numpy().tobytes()).digest(), path)
        if before is not path:
            notes.append(f"{path} has the same outputs as {before}. Is one model listed twice?")
    return notes


# ---- what is shown


def _show(result: dict[str, Any], output: str | None, quiet: bool) -> None:
    if not output:
        _print_result(result)
        return
    print_as(output, result, result["pairs"])
    for line in result["notes"]:
        note(notes_console(quiet), f"note: {line}")


def _print_result(result: dict[str, Any]) -> None:
    """Print the numbers on stdout, and below them how to read them."""
    from gm_probe.measures.catalogue import PAIR_MEASURES

    console = results_console()
    # the numbers' columns and the frame take 48; symbols replace names that do not fit beside them
    narrow = console.width < 48 + max(map(len, PAIR_MEASURES))
    rows, lines = [], []
    for name, row in result["measures"].items():
        symbol, _ = PAIR_MEASURES[name]
        values = (number(row["value"]), number(row["stderr"], 2), number(row["stderr_examples"], 2))
        rows.append((symbol if narrow else name, *values, str(row["num_pairs"])))
        if row["value"] is None:
            lines.append(f"{name} is undefined: {row['reason']}")
        elif row["stderr"] is None:
            lines.append(f"{name}, ± pairs: {row['reason_stderr']}")
    models, sets = len(result["checkpoints"]), len(result["training_sets"])
    title = (
        f"{models} models of {sets} training set{'s' * (sets > 1)}  N = {result['num_examples']:,}  "
        f"C = {result['num_classes']}"
    )
    console.print(table(title, ("measure", "value", "± pairs", "± examples", "n"), rows))
    for line in (*lines, *(f"note: {line}" for line in result["notes"])):
        say(console, line)
    legend = "".join(f"{symbol}: {name}; " for name, (symbol, _) in PAIR_MEASURES.items()) if narrow else ""
    say(
        console,
        f"{legend}KL in nats, mean of both directions. ± pairs: jackknife over models or training sets; "
        "± examples: standard error from the probe set's size; n: pairs of models (S_P: of training sets). "
        "BatchNorm in eval mode.",
        "dim",
    )
