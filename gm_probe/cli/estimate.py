"""``gmprobe estimate``: how accurate checkpoints are on unlabeled data, and which one to ship."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.accuracy.report import CLASS_SHARES, MIRRORED
from gm_probe.cli.data import DataOptions, opened_aloud
from gm_probe.cli.options import format_options, head_option
from gm_probe.cli.output import (
    csv_text,
    note,
    notes_console,
    number,
    print_as,
    results_console,
    say,
    short_names,
    table,
)
from gm_probe.cli.param_types import PATH, SEED, split
from gm_probe.cli.progress import progress_bar
from gm_probe.cli.settings import GroupedCommand, config_option, setting_options
from gm_probe.data.names import require_data_name
from gm_probe.errors import CheckpointError, DataError, DivergedError, UsageError
from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.names import check_names, expanded
from gm_probe.measuring.trained_runs import checkpoints_in

if TYPE_CHECKING:
    from gm_probe.accuracy.evidence import Evidence
    from gm_probe.accuracy.report import EstimateReport, ModelEstimate
    from gm_probe.data.examples import Examples

NARROW = 76
"""Columns of a terminal below which the table leaves out agreement and the range of the estimators."""


@click.command(
    cls=GroupedCommand,
    first=(
        *("unlabeled", "validation", "few_labels", "suggest", "measures", "class_shares", "model_names"),
        *("mean", "std", "no_normalize", "max_examples", "device", "output"),
    ),
    epilog="Example:  gmprobe estimate a.pt b.pt --unlabeled data/ --validation val/",
)
@click.argument("checkpoints", nargs=-1, type=PATH, required=True)
@click.option(
    "--unlabeled",
    metavar="DATA",
    required=True,
    help="Estimate the accuracy on this data: an image folder (its labels are not read), an array file, "
    "or a data set name.",
)
@click.option(
    "--validation",
    metavar="DATA",
    help="Calibrate the estimates on this labeled data: from the training distribution, and unseen in "
    "training.",
)
@click.option(
    "--few-labels",
    metavar="DATA",
    help="Use this labeled random sample of the unlabeled data. It gives a confidence interval under any "
    "shift.",
)
@click.option(
    "--class-shares",
    metavar="|".join((*CLASS_SHARES, "FILE")),
    default="auto",
    show_default=True,
    help="Class shares of the unlabeled data; FILE holds one number per class. With auto, a test decides "
    "whether they changed.",
)
@click.option(
    "--suggest",
    metavar="FILE.csv",
    type=PATH,
    help="Write a list of the images on which the leading checkpoints disagree, in random order, for "
    "labeling.",
)
@click.option(
    "--measures",
    metavar="A,B",
    default="",
    help="Also show these measures or groups of them (see `gmprobe measures`). effective_invariance becomes an "
    "estimator, which doubles the number of passes.",
)
@click.option(
    "--level", type=float, default=0.9, show_default=True, help="Confidence level of the intervals."
)
@head_option("classifier", "binary")
@setting_options(DataOptions)
@config_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of all random draws.")
@format_options
def estimate(
    checkpoints: tuple[Path, ...],
    unlabeled: str,
    validation: str | None,
    few_labels: str | None,
    class_shares: str,
    suggest: Path | None,
    measures: str,
    level: float,
    head: str,
    seed: int,
    output: str | None,
    quiet: bool,
    **options: Any,
) -> EstimateReport | None:
    """Estimate how accurate CHECKPOINTS are on unlabeled data, best first.

    A checkpoint is anything that `gmprobe measure` takes. The labeled data that you give decides what is
    claimed:

    \b
    nothing        no accuracy, because it is not identifiable; a ranking by agreement and confidence
    --validation   an estimate, with an interval learned on synthetic shifts of the validation images
    --few-labels   a confidence interval that needs no assumption about the shift
    """
    if os.environ.get("RANK", "0") != "0":  # only the first of torchrun's processes works
        return None
    data = DataOptions.of(options)
    names, paths = _asked(data, checkpoints, [unlabeled, validation, few_labels], measures)
    shares = _shares(class_shares)
    from gm_probe.accuracy.sets import examine
    from gm_probe.accuracy.verdict import EstimateRequest, judge

    request = EstimateRequest.of(shares, level, seed)
    data.prepare_process()
    loading = data.loading() | {"head": head}
    opened = opened_aloud(data, unlabeled, False, quiet)[0]
    target = opened.subset(data.max_examples, seed)
    sets: list[Examples | None] = [target]
    for source in (validation, few_labels):
        labeled = None if source is None else opened_aloud(data, source, True, quiet)[0]
        sets.append(None if labeled is None else labeled.subset(data.max_examples, seed))
    notes = examine(*sets)
    models = {path: {**loading, **own} for path, own in data.of_each(paths).items()}
    evidence, rows, chosen = _all_evidence(models, sets, names, seed, quiet)
    report = judge(evidence, request, rows, [*notes, *chosen])
    settings = {"class_shares": class_shares, "level": level, **data.recorded(seed)}
    settings |= {} if head == "classifier" else {"head": head}
    sources = [None if one is None else one.source for one in sets]
    named = dict(zip(("unlabeled", "validation", "few_labels"), sources, strict=True))
    if suggest is not None:
        _write_suggestions(suggest, report, _files(opened, data.max_examples, seed), quiet)
    _show(report, report.as_dict(**named, settings=settings), names, output, quiet)
    return report


# ---- what is read


def _asked(
    data: DataOptions, checkpoints: Sequence[Path], sources: Sequence[str | None], measures: str
) -> tuple[list[str], list[Path]]:
    """Check what can be checked before torch is imported; return the measures and the checkpoints.

    Raises:
        CheckpointError, DataError, UsageError: what is missing, unknown or cannot be used.
    """
    data.require_use(sources[0])
    for path in checkpoints:
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint")
    for source in filter(None, sources[1:]):
        require_data_name(source, here=True)
    names = expanded(split(measures), labeled=False, validation=sources[1] is not None)
    check_names(names, labeled=False)
    return names, list(checkpoints_in(checkpoints))


def _shares(given: str) -> str | list[float]:
    """Return one of the words of ``CLASS_SHARES``, or the numbers in a file.

    Raises:
        UsageError: it is neither, or the file holds no numbers.
    """
    if given in CLASS_SHARES:
        return given
    path = Path(given)
    try:
        text = path.read_text(encoding="utf-8")
        return [float(part) for part in text.replace(",", " ").split()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--class-shares {given} is neither {', '.join(CLASS_SHARES)} nor a readable text file"
        ) from error
    except ValueError as error:
        raise UsageError(f"--class-shares {given} must hold one number per class ({error})") from error


def _files(examples: Examples, size: int | None, seed: int) -> list[Path]:
    """Return the image files that a subset takes; none for an array file."""
    files = getattr(examples.x, "files", None)
    return [] if files is None else [files[i] for i in examples.chosen(size, seed).tolist()]


def _all_evidence(
    models: Mapping[Path, Mapping[str, Any]],
    sets: Sequence[Examples | None],
    names: Sequence[str],
    seed: int,
    quiet: bool,
) -> tuple[list[Evidence], dict[str, dict[str, Any]], list[str]]:
    """Run each checkpoint over the sets; one model is in memory at a time."""
    from gm_probe.accuracy.estimate import of_model
    from gm_probe.accuracy.evidence import num_passes
    from gm_probe.measures.settings import Settings
    from gm_probe.measuring.opening import open_checkpoint
    from gm_probe.models.loading import check_classes

    unlabeled, *labeled = sets
    assert unlabeled is not None
    evidence: list[Evidence] = []
    rows: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    total = num_passes(unlabeled, *labeled) * len(models)
    with progress_bar("outputs", total, unit="images", quiet=quiet) as bar:
        for path, loading in models.items():
            loaded = open_checkpoint(path, unlabeled, **loading)
            notes += loaded.notes
            for one in filter(None, labeled):
                check_classes(one, loaded.classes, loaded.num_classes, path)
            own = [loaded.batches, *(None if one is None else loaded.batches.over(one) for one in labeled)]
            name, settings = str(path), Settings(seed=seed)
            try:
                found, rows[name] = of_model(
                    name, loaded.model, own, names, settings, loaded.outputs, bar.advance
                )
            except (DataError, DivergedError, UsageError) as error:  # these errors do not name the checkpoint
                raise type(error)(f"{path}: {error}") from error
            evidence.append(found)
    return evidence, rows, notes


# ---- what is shown


def _show(
    report: EstimateReport, result: dict[str, Any], names: Sequence[str], output: str | None, quiet: bool
) -> None:
    if output is None:
        _print(report, names)
        return
    print_as(output, result, [_flat(row) for row in result["checkpoints"]])
    for line in report.notes:
        note(notes_console(quiet), f"note: {line}")


def _print(report: EstimateReport, names: Sequence[str]) -> None:
    console = results_console()
    wide = console.width >= NARROW
    compared = wide and report.num_labels is None
    shown = [name for name in names if name != MIRRORED]
    paths = [model.name for model in report.models]
    short = dict(zip(paths, short_names(paths), strict=True))
    rows = [
        [("checkpoint", short[model.name]), *_row(model, shown, wide and len(paths) > 1, compared)]
        for model in report.models
    ]
    sizes = [f"N = {report.num_unlabeled:,}"]
    if report.num_validation is not None:
        sizes.append(f"validation = {report.num_validation:,}")
    if report.num_labels is not None:
        sizes.append(f"labels = {report.num_labels:,}")
    seconds = f"{sum(model.seconds for model in report.models):.1f} s"
    title = f"accuracy on unlabeled data in %  {'  '.join(sizes)}  {seconds}"
    console.print(table(title, [head for head, _ in rows[0]], [[cell for _, cell in row] for row in rows]))
    conclusion = report.conclusion
    for path in sorted(paths, key=len, reverse=True):  # one path may be the beginning of another
        conclusion = conclusion.replace(path, short[path])
    say(console, conclusion, "bold")
    first = report.models[0].accuracy
    if first is not None:
        say(console, f"Estimate: {first.method}. It assumes that {first.assumption}.", "dim")
        if compared:
            say(
                console,
                "The column estimators shows the range over those whose mean error on synthetic shifts is at most "
                "twice the smallest; agreement is the mean share of images on which another model predicts the same "
                "class.",
                "dim",
            )
        if len(first.readings) > 1:
            read = [f"{name} {_points(value)}" for name, (value, _, _) in first.readings.items()]
            say(console, f"Class shares: {', '.join(read)}; the interval spans both readings.", "dim")
    for line in report.notes:
        say(console, f"note: {line}")


def _row(
    model: ModelEstimate, shown: Sequence[str], several: bool, compared: bool
) -> Iterator[tuple[str, str]]:
    """Yield each column's head and the model's cell in it, without its name."""
    found = model.accuracy
    if found is None:
        yield "confidence", _points(model.estimators["average_confidence"]["score"])
    else:
        yield "accuracy", _points(found.value)
        yield "interval", f"{_points(found.low)} to {_points(found.high)}"
        if compared:
            values = _good(model.estimators)
            yield "estimators", f"{_points(min(values))} to {_points(max(values))}"
    if several:
        yield "agreement", _points(model.agreement)
    for name in shown:
        row = model.measures[name]
        error = row["stderr_examples"] if row["stderr"] is None else row["stderr"]
        yield MEASURES[name].symbol, f"{number(row['value'])} ± {number(error, 2)}"


def _good(estimators: Mapping[str, Mapping[str, float | None]]) -> list[float]:
    """Return the accuracies by the estimators whose mean error is at most twice the smallest."""
    known = [(one["mean_error"], one["value"]) for one in estimators.values()]
    found = [(error, value) for error, value in known if error is not None and value is not None]
    least = min((error for error, _ in found), default=0.0)
    return [value for error, value in found if error <= 2 * least]


def _points(share: float | None) -> str:
    """Return a share in percent with one digit."""
    return "—" if share is None else f"{100 * share:.1f}"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint as a row of CSV."""
    accuracy = row["accuracy"] or {}
    flat = {key: row[key] for key in ("checkpoint", "rank")}
    flat |= {key: accuracy.get(key) for key in ("value", "low", "high", "method")}
    flat |= {
        name: one["value"] if row["accuracy"] else one["score"] for name, one in row["estimators"].items()
    }
    return flat | {"agreement": row["agreement"], "seconds": row["seconds"]}


def _write_suggestions(path: Path, report: EstimateReport, files: Sequence[Path], quiet: bool) -> None:
    """Write the suggested images: position, file where there is one, and each leader's class."""
    from gm_probe.files.atomic import write_atomic

    models = list(report.suggestions[0].predicted) if report.suggestions else []
    rows = []
    for one in report.suggestions:
        rows.append([one.index, *([str(files[one.index])] if files else []), *one.predicted.values()])
    text = csv_text(["index", *(["file"] if files else []), *models], rows)
    write_atomic(path, text.encode())
    if not rows:
        note(notes_console(quiet), f"note: {path} is empty: there are no leaders that disagree")
