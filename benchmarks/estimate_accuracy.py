"""How far `gmprobe estimate` is off, and how often its intervals cover, on CIFAR-10 networks under shifts.

    python benchmarks/estimate_accuracy.py --checkpoints DIR --runs RUNS --data CIFAR10_TEST_FOLDER --cache DIR

The held-out shifts (benchmarks/held_out_shifts.py) belong to no family that the calibration uses. Label shift is made
by drawing images with unequal class shares. All logits are kept under --cache, so that a second call goes on at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar_resnet import resnet20, resnet56
from held_out_shifts import held_out_shifts
from scipy.stats import kendalltau

from gm_probe.accuracy.calibration import sampling_error
from gm_probe.accuracy.evidence import Evidence, Labeled
from gm_probe.accuracy.few_labels import clopper_pearson, prediction_powered
from gm_probe.accuracy.known import Known, know
from gm_probe.accuracy.predictions import Predictions, predict
from gm_probe.accuracy.ranking import Standing, separated
from gm_probe.accuracy.readings import plausible, read
from gm_probe.accuracy.scores import scores_of
from gm_probe.accuracy.shares import skewed
from gm_probe.accuracy.shifts import shifted, synthetic_shifts
from gm_probe.accuracy.verdict import EstimateRequest, judge
from gm_probe.data.batches import Batches
from gm_probe.data.datasets import open_source
from gm_probe.data.examples import Examples
from gm_probe.data.normalization import Normalization
from gm_probe.measures.measure import measure
from gm_probe.measures.scores import Reference, probabilities
from gm_probe.models.checkpoints import read_checkpoint
from gm_probe.models.fitting import load_weights
from gm_probe.models.loading import load_model

NETWORKS = {"resnet20-12fca82f.th": resnet20, "resnet56-4bfd9763.th": resnet56}
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CPU = torch.device("cpu")
SMALL, LARGE = 1000, 5000
"""Images of the validation set and of a target; images of a large target."""
AT_LARGE = {("impulse", 1), ("motion", 2), ("hue", 3), ("elastic", 2)}
"""Shifts of which there are large targets, too."""

Network = tuple[torch.nn.Module, Normalization]


def networks(checkpoints: Path, runs: Sequence[Path]) -> dict[str, Network]:
    """Return the public networks, and those of finished runs of gmprobe, with what their inputs are normalised by."""
    found: dict[str, Network] = {}
    for name, build in NETWORKS.items():
        model = build().eval()
        load_weights(model, read_checkpoint(checkpoints / name))
        found[name.partition("-")[0]] = model, IMAGENET
    for run in runs:
        checkpoint = read_checkpoint(run)
        found[run.name] = load_model(checkpoint).eval(), checkpoint.normalization or Normalization()
    return found


def sets(data: str) -> dict[str, Examples]:
    """Return a validation set, a target set to be shifted and one that is not, which share no image."""
    pool = open_source(data, labeled=True, decode=False).pool
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    validation, small, large, clean = order.tensor_split([SMALL, 2 * SMALL, SMALL + LARGE])
    parts = {"validation": validation, "target": small, "rest": large, "clean": clean}
    return {name: pool.select(part).in_memory() for name, part in parts.items()}


def conditions(found: dict[str, Examples]) -> Iterator[tuple[str, str, int, Examples]]:
    """Yield kind, family, strength and examples of every pass; made as they are needed."""
    yield "validation", "none", 0, found["validation"]
    yield "clean", "none", 0, found["clean"]
    for kind, part, shifts in (
        ("calibration", "validation", synthetic_shifts(3)),
        ("held-out", "target", held_out_shifts()),
        ("large", "rest", [one for one in held_out_shifts() if (one.family, one.strength) in AT_LARGE]),
    ):
        for shift in shifts:
            examples = found[part]
            x = shifted(examples.x, shift, seed=0, device=CPU)
            yield kind, shift.family, shift.strength, replace(examples, x=x)


def collect(models: dict[str, Network], found: dict[str, Examples], cache: Path) -> None:
    """Run every network over every condition, except where the cache has it."""
    for kind, family, strength, examples in conditions(found):
        for name, (model, normalization) in models.items():
            file = cache / f"{name}-{kind}-{family}-{strength}.pt"
            if file.exists():
                continue
            made = predict(model, Batches(examples, normalization))
            right = float((made.classes == examples.y).double().mean())
            torch.save({**asdict(made), "labels": examples.y}, file)
            print(f"{name:22s} {kind:12s} {family:12s} {strength} accuracy {right:.3f}", flush=True)


# ---- what the estimates are worth

RATIOS = (3.0, 8.0, 25.0)
"""Between the largest and the smallest class share, where these are changed."""
LEVEL = 0.9


def kept(cache: Path, name: str, kind: str, family: str = "none", strength: int = 0) -> Labeled:
    """Return what the cache has of one pass."""
    found = torch.load(cache / f"{name}-{kind}-{family}-{strength}.pt")
    return Labeled(Predictions(**{k: v for k, v in found.items() if k != "labels"}), found["labels"])


def drawn(found: Labeled, ratio: float | None, size: int | None, g: torch.Generator) -> Labeled:
    """Return a random part of ``size``; with ``ratio`` the largest one with such class shares."""
    labels = found.labels
    if ratio is None and size is None:
        return found
    if ratio is None:
        chosen = torch.randperm(len(labels), generator=g)[:size]
    else:
        counts = labels.bincount().double()
        shares = skewed(torch.ones(len(counts)).double() / len(counts), ratio, g)
        each = (shares * (counts / shares).min()).floor().long()
        places = [(labels == c).nonzero()[:, 0] for c in range(len(counts))]
        parts = [p[torch.randperm(len(p), generator=g)[:n]] for p, n in zip(places, each, strict=True)]
        chosen = torch.cat(parts)[torch.randperm(int(each.sum()), generator=g)[:size]]
    # sums over features are of the whole set, and so are left out
    return Labeled(Predictions(found.predictions.logits[chosen]), labels[chosen])


def shifted_sets(cache: Path, name: str, size: int | None) -> list[tuple[str, Labeled]]:
    """Return the targets under each held-out shift; those beyond ``SMALL`` images where ``size`` wants them."""
    found = []
    for shift in held_out_shifts():
        place = shift.family, shift.strength
        some = kept(cache, name, "held-out", *place)
        if size is not None and size > SMALL:
            if place not in AT_LARGE:
                continue
            more = kept(cache, name, "large", *place)
            logits = torch.cat([some.predictions.logits, more.predictions.logits])
            some = Labeled(Predictions(logits), torch.cat([some.labels, more.labels]))
        found.append((f"{shift.family} {shift.strength}", some))
    return found


def targets(cache: Path, name: str, size: int | None, seed: int) -> Iterator[tuple[str, str, Labeled]]:
    """Yield kind, name and set of every target.

    Args:
        size: 100, or ``LARGE``; None = 1,000, and fewer where the class shares are changed.
    """
    g = torch.Generator().manual_seed(seed)
    clean, moved = kept(cache, name, "clean"), shifted_sets(cache, name, size)
    whole = None if size is None or size > SMALL else size
    for index in range(3):
        yield "no shift", f"clean {index}", drawn(clean, None, min(size or SMALL, 3 * SMALL), g)
    for shift, found in moved:
        yield "covariate", shift, drawn(found, None, whole, g)
    for ratio in RATIOS:
        for index in range(4):
            yield "label", f"ratio {ratio:g} draw {index}", drawn(clean, ratio, whole, g)
    for place, (shift, found) in enumerate(moved):
        ratio = RATIOS[(place + place // 3) % 3]
        yield "both", f"{shift} ratio {ratio:g}", drawn(found, ratio, whole, g)


def evaluate(cache: Path, name: str, size: int | None, seed: int) -> list[dict[str, Any]]:
    """Estimate the accuracy of one network on all targets."""
    validation = kept(cache, name, "validation")
    shifts = tuple(
        (one.family, kept(cache, name, "calibration", one.family, one.strength))
        for one in synthetic_shifts(3)
    )
    known: dict[int, Known] = {}
    rows = []
    for kind, target, found in targets(cache, name, size, seed):
        number = len(found.labels)
        near = min((100, 400, 1000), key=lambda one: abs(one - number))  # of which size the signs are taken
        if near not in known:
            stand_in = Predictions(validation.predictions.logits[:near])
            evidence = Evidence(name, stand_in, validation, shifted=shifts)
            known[near] = know(evidence, [None] * (1 + len(shifts)), 0)
        one = known[near]
        scores = scores_of(found.predictions, one.reference, one.shares, size=one.size)
        default = min(one.calibrations, key=lambda key: one.calibrations[key].mean_error)
        row: dict[str, Any] = {"network": name, "kind": kind, "target": target, "n": number}
        row |= {"accuracy": found.accuracy, "estimator": default}
        for choice in ("auto", "validation", "estimated"):
            keys = plausible([(one, found.predictions)]) if choice == "auto" else [choice]
            made = read(one, found.predictions, scores, default, None, keys, LEVEL)
            row[choice] = [made.value, made.low, made.high, list(made.readings)]
        sizes = number, len(validation.labels)
        for key, calibration in one.calibrations.items():
            if key not in scores:
                continue
            value = calibration.accuracy(scores[key])
            half = np.hypot(calibration.half_width(value, LEVEL), sampling_error(value, sizes, LEVEL))
            row[f"line:{key}"] = [value, value - half, value + half]
        for key in ("average_confidence", "doc", "atc", "atc_entropy", "cot"):
            row[f"plain:{key}"] = [scores[key]]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: mean absolute error in points, and coverage, by kind of shift."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
        if row["kind"] == "covariate" and row["accuracy"] > 0.6:
            kinds.setdefault("covariate, accuracy > 0.6", []).append(row)
    lines = ["| estimate | " + " | ".join(f"{kind} ({len(found)})" for kind, found in kinds.items()) + " |"]
    lines.append("|---|" + "---:|" * len(kinds))
    for key in dict.fromkeys(key for row in rows for key in row if isinstance(row[key], list)):
        cells = []
        for found in kinds.values():
            known = [row for row in found if key in row]
            if not known:
                cells.append("—")
                continue
            error = np.mean([abs(row[key][0] - row["accuracy"]) for row in known])
            cell = f"{100 * error:.1f}"
            if len(known[0][key]) > 1:
                held = np.mean([row[key][1] <= row["accuracy"] <= row[key][2] for row in known])
                half = np.mean([(row[key][2] - row[key][1]) / 2 for row in known])
                cell += f" (±{100 * half:.1f}, {100 * held:.0f} %)"
            cells.append(cell)
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the default estimate with its interval against the true accuracy, a panel a kind of shift."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = ("covariate", "label", "both")
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), sharex=True, sharey=True, layout="constrained")
    for panel, kind in zip(panels, kinds, strict=True):
        found = [row for row in rows if row["kind"] == kind]
        truth = np.array([row["accuracy"] for row in found])
        value, low, high = np.array([row["auto"][:3] for row in found]).T
        panel.errorbar(
            truth, value, [value - low, high - value], fmt="o", ms=2, lw=0.4, color="C0", ecolor="0.75"
        )
        panel.plot([0, 1], [0, 1], color="black", lw=1)
        panel.set(title={"both": "both shifts"}.get(kind, f"{kind} shift"), xlabel="true accuracy")
    panels[0].set_ylabel("estimated accuracy, 90 % interval")
    figure.savefig(file, dpi=110)


LABEL_DRAWS = 300


def few_labels(cache: Path, names: Sequence[str], seed: int) -> str:
    """Return a table of the 95 % intervals by few labels, on all unshifted and shifted sets of the networks."""
    g = torch.Generator().manual_seed(seed)
    kinds = [("clean", "none", 0), *(("held-out", one.family, one.strength) for one in held_out_shifts())]
    sets = []
    for name in names:
        own = kept(cache, name, "validation")
        temperature = Reference.of(own.predictions.logits, own.labels).temperature
        for kind in kinds:
            found = kept(cache, name, *kind)
            sets.append((probabilities(found.predictions.logits, temperature).amax(1), found.right))
    lines = ["| labels | half width | labels alone | coverage |", "|---:|---:|---:|---:|"]
    for count in (50, 100, 200, 500):
        widths, alone, held = [], [], []
        for index in range(LABEL_DRAWS):
            confidence, right = sets[index % len(sets)]
            # with replacement: both are samples of the same population, whose accuracy is that of the set
            chosen = torch.randint(len(confidence), (count,), generator=g)
            made = prediction_powered(right[chosen], confidence[chosen], confidence, 0.95)
            low, high = clopper_pearson(int(right[chosen].sum()), count, 0.95)
            widths.append((made.high - made.low) / 2)
            alone.append((high - low) / 2)
            held.append(made.low <= float(right.double().mean()) <= made.high)
        cells = f"{100 * np.mean(widths):.1f} | {100 * np.mean(alone):.1f} | {100 * np.mean(held):.0f} %"
        lines.append(f"| {count} | {cells} |")
    return "\n".join(lines)


def pairs(cache: Path) -> str:
    """Say how often the two networks are put in the right order under covariate shift, and told apart."""
    first, second = names = "resnet20", "resnet56"
    learned, shifts = {}, {}
    for name in names:
        shifts[name] = tuple(
            (one.family, kept(cache, name, "calibration", one.family, one.strength))
            for one in synthetic_shifts(3)
        )
        validation = kept(cache, name, "validation")
        evidence = Evidence(name, validation.predictions, validation, shifted=shifts[name])
        learned[name] = know(evidence, [None] * (1 + len(shifts[name])), 0)
    right = apart = wrong = 0
    for shift in held_out_shifts():
        found = {name: kept(cache, name, "held-out", shift.family, shift.strength) for name in names}
        keys = plausible([(learned[name], one.predictions) for name, one in found.items()])
        standings = []
        for name, one in found.items():
            known = learned[name]
            scores = scores_of(one.predictions, known.reference, known.shares)
            made = read(known, one.predictions, scores, "cot", None, keys, LEVEL)
            evidence = Evidence(name, one.predictions, known.validation)
            standings.append(Standing(evidence, known.calibrations["cot"], made, scores))
        order = sorted(standings, key=lambda one: -one.accuracy.value)
        truth = found[order[0].evidence.name].accuracy - found[order[1].evidence.name].accuracy
        told = separated(*order, LEVEL)
        right, apart, wrong = right + (truth > 0), apart + told, wrong + (told and truth < 0)
    return (
        f"{first} and {second} under {len(held_out_shifts())} covariate shifts: right order {right} times, told apart "
        f"{apart} times, {wrong} of these wrongly"
    )


CURVATURE = ("local_inconsistency", "fisher_trace", "fisher_lambda_max")
MEASURED = 250
"""Images of a target on which the curvature is measured."""


def curvature(models: dict[str, Network], found: dict[str, Examples], cache: Path) -> None:
    """Measure S_ρ, tr F and λ_max(F) of every model on unlabeled images of the ranking's targets."""
    shifts = [one for one in held_out_shifts() if (one.family, one.strength) in AT_LARGE]
    for shift in (None, *shifts):
        some = found["target"].select(torch.arange(MEASURED))
        if shift is not None:
            some = replace(some, x=shifted(some.x, shift, seed=0, device=CPU))
        for name, (model, normalization) in models.items():
            family, strength = ("none", 0) if shift is None else (shift.family, shift.strength)
            file = cache / f"{name}-curvature-{family}-{strength}.json"
            if not file.exists():
                report = measure(model, Batches(some.unlabeled(), normalization), CURVATURE)
                file.write_text(json.dumps({key: row.value for key, row in report.rows.items()}))


def ranking(cache: Path, names: Sequence[str]) -> str:
    """Return a table of Kendall's τ with the order of true accuracies of the models ``names``."""
    columns = ["estimate", "average_confidence", "agreement", "atc", "cot", *CURVATURE]
    lines = ["| target | accuracy | error | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    every = []
    shifts = tuple((one.family, one.strength) for one in synthetic_shifts(3))
    for family, strength in (("none", 0), *sorted(AT_LARGE)):
        evidence, truth = [], []
        for name in names:
            if family == "none":
                clean = kept(cache, name, "clean")
                found = Labeled(Predictions(clean.predictions.logits[:SMALL]), clean.labels[:SMALL])
            else:
                found = kept(cache, name, "held-out", family, strength)
            moved = tuple((one, kept(cache, name, "calibration", one, level)) for one, level in shifts)
            evidence.append(Evidence(name, found.predictions, kept(cache, name, "validation"), shifted=moved))
            truth.append(found.accuracy)
        rows = {row.name: row for row in judge(evidence, EstimateRequest()).models}
        values = []
        for name in names:
            row = rows[name]
            assert row.accuracy is not None
            sharp = json.loads((cache / f"{name}-curvature-{family}-{strength}.json").read_text())
            scores = [
                row.estimators[key]["score"] for key in ("average_confidence", "agreement", "atc", "cot")
            ]
            values.append([row.accuracy.value, *scores, *(-sharp[key] for key in CURVATURE)])
        table = np.array(values).T
        taus = [kendalltau(column, truth).statistic for column in table]
        every.append(taus)
        error = 100 * np.abs(table[0] - truth).mean()
        head = f"| {family} {strength or ''} | {min(truth):.2f} to {max(truth):.2f} | {error:.1f} | "
        lines.append(head + " | ".join(f"{tau:+.2f}" for tau in taus) + " |")
    lines.append("| mean | | | " + " | ".join(f"{tau:+.2f}" for tau in np.mean(every, 0)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--data", required=True, help="Folder of class folders of CIFAR-10 test images.")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="Run folders of gmprobe's.")
    parser.add_argument("--ranked", nargs="*", default=[], help="Names of runs of one family to rank.")
    parser.add_argument(
        "--seed", type=int, default=1, help="Of the images that are drawn from the cached ones."
    )
    parser.add_argument("--picture", type=Path, help="Draw estimated against true accuracy into this file.")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    models, found = networks(given.checkpoints, given.runs), sets(given.data)
    collect(models, found, given.cache)
    curvature({name: models[name] for name in given.ranked}, found, given.cache)
    for size in (None, 100, LARGE):
        rows = [row for name in models for row in evaluate(given.cache, name, size, given.seed)]
        (given.cache / f"rows-{size or 'all'}-{given.seed}.json").write_text(json.dumps(rows))
        if size is None and given.picture is not None:
            draw(rows, given.picture)
        sizes = {None: "300 to 1,000", 100: "100", LARGE: "1,000 to 5,000"}[size]
        print(f"\nunlabeled sets of {sizes} images\n\n{table(rows)}", flush=True)
    print(f"\n{pairs(given.cache)}")
    print(f"\nfew labels, {LABEL_DRAWS} draws each\n\n{few_labels(given.cache, list(models), given.seed)}")
    if given.ranked:
        print(f"\nranking\n\n{ranking(given.cache, given.ranked)}")


if __name__ == "__main__":
    sys.exit(main())
