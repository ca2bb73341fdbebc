"""What ``gmprobe measure`` shows of a result: a table, warnings, CSV rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gm_probe.cli.output import note, notes_console, number, results_console, say, short_names, table
from gm_probe.measures.catalogue import MEASURES


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """Print one checkpoint's measures in full, or one table of several checkpoints."""
    if len(results) == 1:
        _print_one(results[0])
    elif results:
        _print_several(results)


def _print_several(results: Sequence[dict[str, Any]]) -> None:
    """Print each measure of each checkpoint with its standard error; the longer list runs down."""
    names = list(dict.fromkeys(name for result in results for name in result["measures"]))
    remarks = [f"{_labels(results, name)}{_better(name)}" for name in names]
    checkpoints = short_names([result["checkpoint"] for result in results])
    cells = [[_value(result["measures"].get(name)) for name in names] for result in results]
    sizes = {f"N = {result['num_examples']:,}" for result in results}
    title = f"{len(results)} checkpoints{'  ' + sizes.pop() if len(sizes) == 1 else ''}"
    console = results_console()
    if len(names) > len(results):
        widths = [max(map(len, (name, *row))) + 3 for name, row in zip(checkpoints, cells, strict=True)]
        room = console.width - sum(widths) - 4 - max(map(len, remarks))
        heads = [
            f"{label}{remark}" for label, remark in zip(measure_labels(names, room), remarks, strict=True)
        ]
        rows = [[head, *row] for head, row in zip(heads, zip(*cells, strict=True), strict=True)]
        console.print(table(title, ["measure", *checkpoints], rows))
    else:
        heads = [f"{_symbol(name)}{remark}" for name, remark in zip(names, remarks, strict=True)]
        rows = [[name, *row] for name, row in zip(checkpoints, cells, strict=True)]
        console.print(table(title, ["checkpoint", *heads], rows))
    captions = {f"{_batch_dependent(result)}{_ascents(result, spread=False)}" for result in results}
    same = captions.pop() if len(captions) == 1 else "Settings differ between the checkpoints (see --json). "
    say(
        console,
        f"{same}↓: a smaller value is expected to go with better generalization, ↑: a larger one. "
        "±: standard error over random draws and examples together. !: not converged. "
        "--json has every number; a single checkpoint is shown with both errors and the cost.",
        "dim",
    )
    for result in results:
        if "layers" in result:
            _print_layers(result["layers"], result["checkpoint"])


def measure_labels(names: Sequence[str], room: int) -> list[str]:
    """Return names with symbols, or names, or symbols of measures: the fullest that ``room`` columns hold."""
    symbols = [_symbol(name) for name in names]
    both = [
        name if symbol == name else f"{name} ({symbol})" for name, symbol in zip(names, symbols, strict=True)
    ]
    fit = (labels for labels in (both, list(names)) if max(map(len, labels), default=0) <= room)
    return next(fit, symbols)


def _labels(results: Sequence[dict[str, Any]], name: str) -> str:
    """Return which labels a measure took, where it took any."""
    labels = {result["measures"].get(name, {}).get("labels", "none needed") for result in results} - {
        "none needed"
    }
    return f" ({' or '.join(sorted(labels))} labels)" if labels else ""


def _better(name: str) -> str:
    """Return an arrow that says which values are expected to go with better generalization."""
    direction = MEASURES[name].direction if name in MEASURES else None
    return {"worse": " ↓", "better": " ↑"}.get(direction or "", "")


def _value(row: dict[str, Any] | None) -> str:
    """Return a value with its standard error over draws and examples, and ``!`` where it did not converge."""
    if row is None or row["value"] is None:
        return "—"
    errors = [row[key] for key in ("stderr", "stderr_examples") if row[key] is not None]
    error = f" ± {number(math.hypot(*errors), 2)}" if errors else ""
    return f"{number(row['value'])}{error}{'' if row['converged'] else ' !'}"


def _print_one(result: dict[str, Any]) -> None:
    """Print one checkpoint's table on stdout, with a caption that says how its numbers are to be read."""
    console, settings = results_console(), result["settings"]
    # the numbers' columns and the frame take 57
    narrow = console.width < 57 + max(map(len, result["measures"]), default=0)
    labels = measure_labels(list(result["measures"]), console.width - 57)
    shown = zip(labels, result["measures"].items(), strict=True)
    rows = [_cells_of(name, label, row, narrow) for label, (name, row) in shown]
    columns = ["measure", "value", "± estim.", "± examples", *([] if narrow else ["conv.", "cost"])]
    if settings["target_error"]:
        columns.append(f"N for {100 * settings['target_error']:g} %")
        for cells, row in zip(rows, result["measures"].values(), strict=True):
            cells.append(f"{row['examples_needed']:,}" if "examples_needed" in row else "—")
    size = f"P = {result['num_parameters']:,}  N = {result['num_examples']:,}"
    console.print(table(f"{result['checkpoint']}  {result['model']}  {size}", columns, rows))
    _print_more(result)
    if "layers" in result:
        _print_layers(result["layers"], "per layer")
    over = ", over batches" if settings.get("head") == "simclr" else ""
    say(
        console,
        f"{_batch_dependent(result)}{_ascents(result)}"
        "± estim.: standard error over starts or probes, Lanczos residual for λ_max; "
        f"± examples: standard error from the probe set's size{over}; "
        f"{'' if narrow else 'cost in gradient evaluations. '}BatchNorm in eval mode.",
        "dim",
    )


def _cells_of(name: str, label: str, row: Mapping[str, Any], narrow: bool) -> list[str]:
    """Return a measure's row of the table. In a ``narrow`` one its ``label`` says whether it converged."""
    undefined = row["value"] is None  # a dash says so
    if "labels" in row:
        label += " (no labels needed)" if row["labels"] == "none needed" else f" ({row['labels']} labels)"
    if row.get("protocol") == "converged" and name == "local_inconsistency":
        label += " (converged)"
    if narrow and not row["converged"] and not undefined:
        label += " (not converged)"
    cells = [label, number(row["value"]), _estimator_error(row), number(row["stderr_examples"], 2)]
    if narrow:
        return cells
    return [*cells, "—" if undefined else "yes" if row["converged"] else "NO", number(row["num_evals"], 3)]


def _print_more(result: dict[str, Any]) -> None:
    """Print what stands below the table: the grid of S_ρ, and the eigenvalues after the largest."""
    console = results_console()
    for name, row in result["measures"].items():
        if "grid" in row and row.get("protocol") == "converged":
            rows = [
                [f"ρ = {cell['rho']:g}", number(cell["value"]), "yes" if cell["converged"] else "NO"]
                for cell in row["grid"]
            ]
            console.print(table(f"{name}, converged", ["", "value", "conv."], rows))
        elif "grid" in row:
            steps = sorted({cell["k_steps"] for cell in row["grid"]})
            cells = {(cell["rho"], cell["k_steps"]): cell["value"] for cell in row["grid"]}
            rows = [
                [f"ρ = {rho:g}", *(number(cells[rho, k]) for k in steps)]
                for rho in sorted({r for r, _ in cells})
            ]
            console.print(table(f"{name}, mean over starts", ["", *(f"K = {k}" for k in steps)], rows))
        if "eigenvalues" in row:
            found = ", ".join(map(_eigenvalue, row["eigenvalues"]))
            say(console, f"{name}, the largest: {found}")


def _print_layers(layers: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print one row per layer: its parameters, and each value with its estimator's error."""
    known = [row for row in layers if "measures" in row]
    names = list(known[0]["measures"]) if known else []
    rows = [
        [
            *(row["layer"], f"{row['num_parameters']:,}"),
            *(f"{number(one['value'])} ± {_estimator_error(one)}" for one in row["measures"].values()),
        ]
        for row in known
    ]
    results_console().print(table(title, ["layer", "P", *map(_symbol, names)], rows))
    for row in layers:
        if "reason" in row:
            say(results_console(), f"{row['layer']}: undefined: {row['reason']}")


def _eigenvalue(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "one not found"
    return f"{number(row['value'])} ± {number(row['residual'], 2)}" + (
        "" if row["converged"] else " (not converged)"
    )


def _batch_dependent(result: dict[str, Any]) -> str:
    """Return what NT-Xent values depend on, for the caption; nothing for a classifier."""
    settings = result["settings"]
    if settings.get("head") != "simclr":
        return ""
    images = settings["batch_images"]
    return (
        f"NT-Xent logits, τ = {settings['temperature']:g}, of {settings['num_images']:,} of "
        f"{settings['num_examples']:,} images in batches of {images} (N: their views; seed {settings['seed']}); "
    )


def _ascents(result: dict[str, Any], *, spread: bool = True) -> str:
    """Return by which ascents local inconsistency was found, for the caption; nothing where it was not measured.

    Args:
        spread: also the standard deviation over starts, which is of this checkpoint alone.
    """
    settings = result["settings"]
    rows = {name: row for name, row in result["measures"].items() if "starts" in row}
    text = f"ρ = {settings['rho']:g}; " if rows else ""
    for name, row in rows.items():
        if row.get("protocol") == "converged":
            text += f"max S_ρ: the best of {len(row['starts'])} ascents, a lower bound of the maximum; "
            continue
        drawn = name == "average_inconsistency"  # its perturbations are drawn, not ascended to
        one = "draw" if drawn else "start"
        starts = f"{row['num_starts']} {one}s" if row["num_starts"] > 1 else f"1 {one}"
        sd = row["sd_starts"] if spread and row["value"] is not None else None
        deviation = f" (sd {number(sd, 2)})" if sd is not None else ""
        steps = "" if drawn else f"K = {settings['k_steps']}, "
        text += f"{_symbol(name)}: {steps}mean over {starts}{deviation}; "
    return text


def _symbol(name: str) -> str:
    """Return a measure's symbol, or the name of a measure that this version does not know."""
    return MEASURES[name].symbol if name in MEASURES else name


def _estimator_error(row: Mapping[str, Any]) -> str:
    if row["stderr"] is not None:
        return number(row["stderr"], 2)
    unknown = "protocol" in row or "reason_stderr" in row or row["value"] is None
    return "—" if unknown else "exact"  # an ascent or a single start has no error estimate


ALONE = 0.8
"""Share of the best ascent's value that the second best must reach; otherwise the best may be luck."""


def warn(result: dict[str, Any]) -> None:
    """Say on stderr what did not converge, is undefined or looks wrong, a line each."""
    console = notes_console()
    for line in _notes(result):
        note(console, f"note: {line}")
    error = result["measures"].get("error", {}).get("value")
    yes_or_no = result.get("settings", {}).get("head") in {"binary", "multilabel"}
    chance = 0.5 if yes_or_no else 1 - 1 / result["num_classes"]
    if error is not None and error > 0.9 * chance:
        note(
            console,
            f"warning: the error {error:.3f} is near chance for {result['num_classes']} classes. Class "
            "folders are numbered in sorted order: check that the checkpoint uses this order, and check "
            "its normalisation",
        )


def _notes(result: dict[str, Any]) -> Iterator[str]:
    yield from result.get("notes", ())
    if result.get("out_of_memory_at") is not None:  # unknown to results of gm_probe 0.1.0
        yield (
            f"out of memory on batches of {result['out_of_memory_at']}: went on with {result['batch_size']}, which "
            "changes no result. A lower --batch-size or --memory avoids the failed attempt"
        )
    if result.get("replaced"):
        yield (
            f"{result['checkpoint']}: measures.json held {', '.join(result['replaced'])} taken with other settings, "
            "or not finite; they were removed, because a file never mixes settings"
        )
    if result.get("as_before"):
        settings = ", ".join(f"{key} = {value}" for key, value in result["as_before"].items())
        yield f"{result['checkpoint']}: settings taken from measures.json: {settings}"
    for name, one in result.get("density", {}).items():
        if "reason" in one:
            yield f"the density of the {name} is undefined: {one['reason']}"
    for name, row in result["measures"].items():
        yield from (f"{name}{text}" for text in _notes_on(row))


def _notes_on(row: dict[str, Any]) -> Iterator[str]:
    """Yield the notes on one measure; each continues its name."""
    if row["value"] is None:
        yield f" is undefined: {row['reason']}"
    elif not row["converged"]:
        yield f" did not converge within its limits; {_remedy(row)}"
    if "estimator_above_target" in row:
        yield (
            f": the estimator's own error is {row['estimator_above_target']:.2g} of it, above --target-error for "
            f"any number of examples; {_finer(row)}"
        )
    # within the quadratic regime all starts lead into v₁'s basin; the slower ones are stopped on their way
    if row.get("runner_up") is not None and row["runner_up"] < ALONE and _beyond_quadratic(row):
        yield (
            f": one of {len(row['starts'])} starts reached it, the next {row['runner_up']:.0%}; far from the "
            "quadratic regime the maximum may be much higher. Lower --rho"
        )


def _finer(row: dict[str, Any]) -> str:
    if "num_starts" in row:
        return "raise --starts"
    return "lower --trace-tolerance" if "num_probes" in row else "lower --eigen-tolerance"


def _beyond_quadratic(row: dict[str, Any]) -> bool:
    ratio = row.get("quadratic_ratio")
    return ratio is None or not 0.5 < ratio < 2


def _remedy(row: dict[str, Any]) -> str:
    if "num_probes" in row:
        return "raise --max-probes or --trace-tolerance"
    if "iterations" in row:
        return "raise --max-iterations or --eigen-tolerance"
    return "raise --max-iterations (an ascent may also end at a kink, where no step gains)"


def as_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of ``--csv``: one per checkpoint and measure, and one per further ρ and K of its grid."""
    of_row = (
        *("value", "stderr", "stderr_examples", "converged", "num_evals", "labels", "protocol"),
        *("sd_starts", "num_starts", "num_probes", "iterations", "examples_needed", "reason"),
    )
    of_settings = ["rho", "k_steps", "noise_scale", "seed", "part"]
    if any(each["settings"].get("head") == "simclr" for each in results):  # else they would be empty
        of_settings += ["head", "temperature", "batch_images"]
    return [
        {
            "checkpoint": result["checkpoint"],
            "model": result["model"],
            "num_examples": result["num_examples"],
            "measure": name,
            **{key: of.get(key) for key in of_row},
            **{key: of.get(key, result["settings"].get(key)) for key in of_settings},
        }
        for result in results
        for name, row in result["measures"].items()
        for of in (row, *_cells(row, result["settings"]))
    ]


def _cells(row: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of a grid that are not the row itself."""
    own = {key: settings[key] for key in ("rho", "k_steps")}
    kept = ("value", "rho", "k_steps", "converged")
    return [
        {"protocol": row.get("protocol"), **{key: value for key, value in cell.items() if key in kept}}
        for cell in row.get("grid", ())
        if own != {key: cell.get(key, value) for key, value in own.items()}
    ]
