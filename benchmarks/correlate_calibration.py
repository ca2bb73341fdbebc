"""Do the intervals of `gmprobe correlate` cover the truth as often as they say?

    python benchmarks/correlate_calibration.py --sims 1000 --first 1000000 --out coverage.csv
    python benchmarks/correlate_calibration.py --out coverage.csv --table

Each simulation is a sweep of settings × seeds on a grid of three hyperparameters. The gap and two measures are normal:
a part of their variance is shared by the runs of a setting, a part (``share``) by those of a seed in all settings, and
a fifth is each run's own. All parts correlate alike, so that every τ of the design has one true value. Simulations
from number 0 on were used to choose the intervals, those from 1,000,000 on only to judge them.
"""

from __future__ import annotations

import csv
import math
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
import numpy as np
import scipy

from gm_probe.analysis.coefficients import (
    granulated,
    linear_tau,
    partial_tau,
    tau_difference,
    tau_quantity,
)
from gm_probe.analysis.intervals import Quantity, clusters_of

LEVELS = {6: (3, 2), 12: (3, 2, 2), 24: (4, 3, 2), 40: (5, 4, 2)}
"""Values of each hyperparameter, by the number of settings."""
OWN = 0.2
DESIGN = ("kind", "seeds", "settings", "share", "tau")
STATISTICS = ("τ", "τ within h₀", "τ within setting", "ψ(h₀)", "ψ(last)", "Ψ", "Δτ", "partial τ")


@dataclass(frozen=True)
class Cell:
    """One design, in which every setting has every seed.

    ``kind``: a fifth of the runs is ``missing``; seeds are each run's ``own``; or values are ``tied`` (whole numbers).
    """

    seeds: int
    settings: int
    share: float
    tau: float
    kind: str = ""


def cells() -> Iterator[Cell]:
    """Yield all designs, the usual ones first."""
    yield Cell(2, 24, 0.2, 0.3)
    for tau, share in product((0.0, 0.6, 0.3), (0.0, 0.4, 0.2)):
        yield from (Cell(k, s, share, tau) for k, s in ((3, 12), (5, 40), (4, 24), (3, 40), (5, 12)))
    yield from (Cell(k, s, 0.0, 0.3, "own") for k, s in ((2, 12), (2, 40), (1, 24)))
    yield from (Cell(k, 24, 0.2, 0.3, kind) for kind, k in product(("missing", "tied"), (3, 5)))


def simulate(cell: Cell, number: int) -> dict[str, tuple[Quantity, float]]:
    """Return every statistic of one simulated sweep, with its true value."""
    rng = np.random.default_rng(
        [number, cell.seeds, cell.settings, round(10 * cell.share), round(10 * cell.tau)]
    )
    grid = np.array(list(product(*map(range, LEVELS[cell.settings]))))
    setting, seed = (part.ravel() for part in np.indices((cell.settings, cell.seeds)))
    r = math.sin(cell.tau * math.pi / 2)
    parts = ((1 - cell.share - OWN, setting), (cell.share, seed), (OWN, np.arange(len(setting))))
    gap, a, b = sum(math.sqrt(part) * _normal(int(of.max()) + 1, r, rng)[:, of] for part, of in parts)
    if cell.kind == "missing":
        kept = np.sort(rng.permutation(len(setting))[: round(0.8 * len(setting))])
        gap, a, b, setting, seed = gap[kept], a[kept], b[kept], setting[kept], seed[kept]
    if cell.kind == "tied":
        gap, a, b = np.round(gap), np.round(a), np.round(b)
    found = statistics(gap, a, b, grid[setting], setting, None if cell.kind == "own" else seed)
    between = 2 / math.pi * math.asin(r * r)
    truth = dict.fromkeys(STATISTICS, cell.tau) | {"Δτ": 0.0}
    truth["partial τ"] = cell.tau * (1 - between) / math.sqrt((1 - cell.tau**2) * (1 - between**2))
    return {name: (quantity, truth[name]) for name, quantity in found.items()}


def _normal(num: int, r: float, rng: np.random.Generator) -> np.ndarray:
    """(3, num): a gap, and two measures that correlate with it by ``r``, else independent."""
    gap, a, b = rng.normal(size=(3, num))
    rest = math.sqrt(1 - r * r)
    return np.stack([gap, r * gap + rest * a, r * gap + rest * b])


def statistics(
    gap: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    hypers: np.ndarray,
    setting: np.ndarray,
    seed: np.ndarray | None,
) -> Mapping[str, Quantity]:
    """Return what ``correlate`` shows of measure ``a`` with the gap, and against ``b``."""
    clusters, of_three = clusters_of(setting, seed, a, gap), clusters_of(setting, seed, a, b, gap)
    first, second, between = (linear_tau(*pair, clusters.setting) for pair in ((a, gap), (b, gap), (a, b)))
    by_cell = {}
    for place in range(hypers.shape[1]):
        others = np.delete(hypers, place, axis=1)
        cell = np.unique(others, axis=0, return_inverse=True)[1].ravel()
        by_cell[place] = cell, hypers[:, place]
    psi, mean = granulated(a, gap, by_cell, clusters)
    found = {
        "τ": tau_quantity(first, clusters),
        "τ within h₀": tau_quantity(linear_tau(a, gap, clusters.setting, hypers[:, 0]), clusters),
        "ψ(h₀)": psi[0],
        "ψ(last)": psi[max(psi)],
        "Ψ": mean,
        "Δτ": tau_difference(first, second, of_three),
        "partial τ": partial_tau(first, between, second, of_three),
    }
    inside = linear_tau(a, gap, clusters.setting, setting)
    return found if inside is None else found | {"τ within setting": tau_quantity(inside, clusters)}


def judge(cell: Cell, sims: int, first: int) -> list[dict[str, object]]:
    """Return a row for each statistic: how many of its intervals hold the true value, of how many."""
    hits: dict[str, list[bool]] = {name: [] for name in STATISTICS}
    for number in range(first, first + sims):
        for name, (found, truth) in simulate(cell, number).items():
            if found.low is not None and found.high is not None:
                hits[name].append(found.low <= truth <= found.high)
    of = {"kind": cell.kind or "shared", "seeds": cell.seeds, "settings": cell.settings}
    of |= {"share": cell.share, "tau": cell.tau, "sims": sims}
    return [
        {**of, "statistic": name, "intervals": len(some), "covers": sum(some)} for name, some in hits.items()
    ]


def table(path: Path) -> Iterator[str]:
    """Yield the results as Markdown: coverage in %, a row a design."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    designs = sorted(dict.fromkeys(tuple(row[key] for key in DESIGN) for row in rows), key=_order)
    found = {(*(row[key] for key in DESIGN), row["statistic"]): row for row in rows}
    yield "| seeds are | seeds | settings | seed share | true τ | " + " | ".join(STATISTICS) + " |"
    yield "|---" * (5 + len(STATISTICS)) + "|"
    for design in designs:
        cells = [_percent(found[*design, name]) for name in STATISTICS]
        yield f"| {' | '.join((*design, *cells))} |"


def _order(design: tuple[str, ...]) -> tuple[bool, str, list[float]]:
    return design[0] != "shared", design[0], [float(number) for number in design[1:]]


def _percent(row: Mapping[str, str]) -> str:
    num, of = int(row["covers"]), int(row["intervals"])
    return f"{100 * num / of:.1f}" if of > 0.5 * int(row["sims"]) else "none"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The CSV file of results.")
@click.option("--sims", default=1000, show_default=True, help="Simulations a design.")
@click.option("--first", default=0, show_default=True, help="The first simulation's number.")
@click.option("--table", "show", is_flag=True, help="Print what the file holds, and simulate nothing.")
def main(out: Path, sims: int, first: int, show: bool) -> None:
    """Simulate sweeps and write how often each interval covers the truth, from where the file stops."""
    if show:
        print("\n".join(table(out)))
        print(f"\nPython {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}.")
        return
    start = time.process_time()
    done: set[tuple[str, ...]] = set()
    if out.exists():
        with out.open(encoding="utf-8", newline="") as file:
            done = {tuple(row[key] for key in DESIGN) for row in csv.DictReader(file)}
    with out.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*DESIGN, "sims", "statistic", "intervals", "covers"])
        if not done:
            writer.writeheader()
        for cell in cells():
            kind = cell.kind or "shared"
            if tuple(map(str, (kind, cell.seeds, cell.settings, cell.share, cell.tau))) not in done:
                writer.writerows(judge(cell, sims, first))
                file.flush()
    print(f"{time.process_time() - start:.0f} s of one core")


if __name__ == "__main__":
    main()
