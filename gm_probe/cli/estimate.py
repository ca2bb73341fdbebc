"""``gmprobe estimate``: how accurate checkpoints are on unlabeled data, and which one to ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.data import DataOptions, data_options
from gm_probe.cli.output import (
    format_options,
    note,
    note_reading,
    notes_console,
    number,
    print_csv,
    print_json,
    results_console,
    say,
    table,
)
from gm_probe.cli.param_types import PATH, SEED
from gm_probe.cli.progress import progress_bar
from gm_probe.cli.settings import GroupedCommand
from gm_probe.data.sources import require_source
from gm_probe.errors import CheckpointError, DataError, UsageError
from gm_probe.measures.catalogue import check_names
from gm_probe.measuring.trained import checkpoints_in
from gm_probe.runs.catalogue import CATALOGUE

if TYPE_CHECKING:
    from gm_probe.accuracy.evidence import Evidence
    from gm_probe.accuracy.report import EstimateReport
    from gm_probe.data.datasets import Examples

EXTRA = "effective_invariance"


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
    metavar="auto|validation|uniform|estimated|FILE",
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
    help="Also show these measures (see `gmprobe measures`), or effective_invariance, which doubles the "
    "number of passes.",
)
@click.option(
    "--level", type=float, default=0.9, show_default=True, help="Confidence level of the intervals."
)
@data_options
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
    seed: int,
    output: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Estimate how accurate CHECKPOINTS are on unlabeled data, best first.

    A checkpoint is anything that `gmprobe measure` takes. The labeled data that you give decides what is
    claimed:

    \b
    nothing        no accuracy, because it is not identifiable; a ranking by agreement and confidence
    --validation   an estimate, with an interval learned on synthetic shifts of the validation images
    --few-labels   a confidence interval that needs no assumption about the shift
    """
    data = DataOptions(**options)
    data.require_use(unlabeled)
    for path in checkpoints:
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint")
    for name in filter(None, (validation, few_labels)):
        require_source(name, here=True)
    shares = _shares(class_shares)
    names = [name.strip() for name in measures.split(",") if name.strip()]
    check_names([name for name in names if name != EXTRA], labeled=False, batch_dependent=False)
    paths = checkpoints_in(checkpoints)
    from gm_probe.accuracy.sets import examine
    from gm_probe.accuracy.verdict import Request, judge
    from gm_probe.runtime.devices import environment

    request = Request.of(shares, level, seed)
    loading, own_loading = data.loading(), data.of_each(paths)
    opened = _opened(data, unlabeled, False, quiet)
    target = opened.subset(data.max_examples, seed)
    labeled = [
        None if source is None else _opened(data, source, True, quiet).subset(data.max_examples, seed)
        for source in (validation, few_labels)
    ]
    notes = examine(target, *labeled)
    evidence, rows, chosen = _all_evidence(
        paths, [target, *labeled], names, seed, quiet, loading, own_loading
    )
    report = judge(evidence, request, rows, [*notes, *chosen])
    result = report.as_dict(
        unlabeled=target.source,
        validation=None if labeled[0] is None else labeled[0].source,
        few_labels=None if labeled[1] is None else labeled[1].source,
        settings={
            "class_shares": class_shares,
            "level": level,
            "seed": seed,
            "max_examples": data.max_examples,
            **data.reading(),
            "dtype": data.dtype,
            "batchnorm": "eval (running statistics)",
            **environment(loading["device"]),
        },
    )
    if suggest is not None:
        _write_suggestions(suggest, report, _files(opened, data.max_examples, seed))
        if not report.suggestions and not quiet:
            note(notes_console(), f"note: {suggest} is empty: there are no leaders that disagree")
    if output == "json":
        print_json(result)
    elif output == "csv":
        print_csv([_flat(row) for row in result["checkpoints"]])
    else:
        _print(report, names)
    if output is not None and not quiet:
        for line in report.notes:
            note(notes_console(), f"note: {line}")


# ---- what is read


def _shares(given: str) -> str | list[float]:
    """One of the words, or the numbers in a file.

    Raises:
        UsageError: it is neither, or the file holds no numbers.
    """
    if given in ("auto", "validation", "uniform", "estimated"):
        return given
    path = Path(given)
    try:
        text = path.read_text(encoding="utf-8")
        return [float(part) for part in text.replace(",", " ").split()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--class-shares {given} is neither auto, validation, uniform, estimated nor a readable text file"
        ) from error
    except ValueError as error:
        raise UsageError(f"--class-shares {given} must hold one number per class ({error})") from error


def _opened(data: DataOptions, source: str, labeled: bool, quiet: bool) -> Examples:
    examples, _, hint = data.open(source, labeled=labeled)
    note_reading(notes_console(quiet), [*([hint] if hint else []), *examples.notes], examples.skipped)
    return examples


def _files(examples: Examples, size: int | None, seed: int) -> list[Path]:
    """The files of the images that a subset takes; none of an array file."""
    files = getattr(examples.x, "files", None)
    return [] if files is None else [files[i] for i in examples.chosen(size, seed).tolist()]


def _all_evidence(
    paths: Sequence[Path],
    sets: Sequence[Examples | None],
    names: Sequence[str],
    seed: int,
    quiet: bool,
    loading: Mapping[str, Any],
    own_loading: Mapping[Path, Mapping[str, Any]],
) -> tuple[list[Evidence], dict[str, dict[str, Any]], list[str]]:
    """Run each checkpoint over the sets; one model is in memory at a time."""
    from gm_probe.accuracy.evidence import gather, num_passes
    from gm_probe.measures.measure import measure
    from gm_probe.measures.settings import Settings
    from gm_probe.measuring.checkpoint import open_checkpoint

    unlabeled, *labeled = sets
    assert unlabeled is not None
    evidence: list[Evidence] = []
    rows: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    wanted = [name for name in names if name != EXTRA]
    total = num_passes(unlabeled, *labeled) * len(paths)
    with progress_bar("outputs", total, unit="images", quiet=quiet) as bar:
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            bar.update(done)

        for path in paths:
            loaded = open_checkpoint(path, unlabeled, **{**loading, **own_loading[path]})
            notes += loaded.notes
            batches = loaded.batches
            for one in labeled:
                if one is not None:
                    _require_classes(path, one, loaded.classes, loaded.num_classes)
            others = [None if one is None else batches.over(one) for one in labeled]
            how: dict[str, Any] = {"outputs": loaded.outputs}
            try:
                evidence.append(
                    gather(
                        str(path),
                        loaded.model,
                        batches,
                        *others,
                        mirror=EXTRA in names,
                        seed=seed,
                        notify=tick,
                        **how,
                    )
                )
                if wanted:
                    report = measure(loaded.model, batches, wanted, Settings(seed=seed), **how)
                    rows[str(path)] = {name: row.as_dict() for name, row in report.rows.items()}
            except (DataError, UsageError) as error:  # which know of no path
                raise type(error)(f"{path}: {error}") from error
    return evidence, rows, notes


def _require_classes(path: Path, examples: Examples, recorded: tuple[str, ...], classes: int) -> None:
    """Raise DataError where labels are of other classes than the checkpoint's."""
    if examples.classes and recorded and examples.classes != recorded:
        odd = sorted(set(examples.classes) ^ set(recorded))
        differ = f"they differ in {odd[0]}" if odd else "their order differs"
        raise DataError(
            f"{examples.source} has other classes than {path} was trained on: {differ}. Rename the class "
            "folders"
        )
    if examples.classes and len(examples.classes) != classes:
        raise DataError(
            f"{examples.source} has {len(examples.classes)} classes but {path} has {classes} outputs. Give "
            "each class a folder with images"
        )


# ---- what is shown


def _print(report: EstimateReport, names: Sequence[str]) -> None:
    console = results_console()
    known = report.models[0].accuracy is not None
    several = len(report.models) > 1
    shown = [name for name in names if name != EXTRA]
    compared = report.num_labels is None
    accuracy = ["accuracy", "interval", *(["estimators"] if compared else [])]
    head = ["checkpoint", *(accuracy if known else ["confidence"])]
    head += ["agreement"] if several else []
    head += [*(CATALOGUE[name].symbol for name in shown), "seconds"]
    rows = []
    for model in report.models:
        cells = [model.name]
        if model.accuracy is not None:
            found = model.accuracy
            values = _good(model.estimators)
            cells += [_points(found.value), f"{_points(found.low)} to {_points(found.high)}"]
            if compared:
                cells += [f"{_points(min(values))} to {_points(max(values))}"]
        else:
            cells += [_points(model.estimators["average_confidence"]["score"])]
        cells += [_points(model.agreement)] if several else []
        for name in shown:
            row = model.measures[name]
            error = row["stderr_examples"] if row["stderr"] is None else row["stderr"]
            cells.append(f"{number(row['value'])} ± {number(error, 2)}")
        rows.append([*cells, f"{model.seconds:.1f}"])
    sizes = [f"N = {report.num_unlabeled:,}"]
    if report.num_validation is not None:
        sizes.append(f"validation = {report.num_validation:,}")
    if report.num_labels is not None:
        sizes.append(f"labels = {report.num_labels:,}")
    console.print(table(f"accuracy on unlabeled data in %  {'  '.join(sizes)}", head, rows))
    say(console, report.conclusion, "bold")
    first = report.models[0].accuracy
    if first is not None:
        say(console, f"Estimate: {first.method}. It assumes that {first.assumption}.", "dim")
        if compared:
            say(
                console,
                "Estimators: range over those whose mean error on synthetic shifts is at most twice the "
                "smallest.",
                "dim",
            )
        if len(first.readings) > 1:
            read = [f"{name} {_points(value)}" for name, (value, _, _) in first.readings.items()]
            say(console, f"Class shares: {', '.join(read)}; the interval spans both readings.", "dim")
    for line in report.notes:
        say(console, f"note: {line}")


def _good(estimators: Mapping[str, Mapping[str, float | None]]) -> list[float]:
    """The accuracies by estimators whose mean error is at most twice the smallest."""
    known = [(one["mean_error"], one["value"]) for one in estimators.values()]
    found = [(error, value) for error, value in known if error is not None and value is not None]
    least = min((error for error, _ in found), default=0.0)
    return [value for error, value in found if error <= 2 * least]


def _points(share: float | None) -> str:
    """A share in percent with one digit."""
    return "—" if share is None else f"{100 * share:.1f}"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint as a row of CSV."""
    accuracy = row["accuracy"] or {}
    flat = {key: row[key] for key in ("checkpoint", "rank")}
    flat |= {key: accuracy.get(key) for key in ("value", "low", "high", "method")}
    flat |= {
        name: one["value"] if row["accuracy"] else one["score"] for name, one in row["estimators"].items()
    }
    return flat | {"agreement": row["agreement"], "seconds": row["seconds"]}


def _write_suggestions(path: Path, report: EstimateReport, files: Sequence[Path]) -> None:
    """Write the suggested images: position, file where there is one, and each leader's class."""
    import csv
    import io

    from gm_probe.analysis.cells import cell
    from gm_probe.files.atomic import write_atomic

    models = list(report.suggestions[0].predicted) if report.suggestions else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", *(["file"] if files else []), *map(cell, models)])
    for one in report.suggestions:
        place = [cell(str(files[one.index]))] if files else []
        writer.writerow([one.index, *place, *one.predicted.values()])
    write_atomic(path, text.getvalue().encode())
