"""Do the p-values of `gmprobe correlate` fire as often as they say, and do its intervals cover?

    python benchmarks/correlate_calibration.py runs.jsonl --sims 2000 --first 1000000    # resumes where it stopped
    python benchmarks/correlate_calibration.py runs.jsonl --table

Each simulation is a sweep: settings × seeds, where measure and gap are normal with a part ICC of their variance
shared by a setting's seeds, correlated by ``between`` across settings and by ``within`` across seeds. Two
measures of the same true τ are drawn, so that Δτ = 0. The true τ of such a design has a closed form. Seeds from 0
were used to choose the interval, those from 1,000,000 only to judge it.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import scipy

from gm_probe.analysis.correlation import correlate
from gm_probe.tables.table import RunTable


@dataclass(frozen=True)
class Scenario:
    """A design; ``levels`` are the hyperparameters' numbers of values, ``sizes`` the seeds a setting may have.

    ``icc`` of the variance is shared by a setting's runs, ``seeds`` by a seed's in all settings; None where every
    run has a seed of its own.
    """

    levels: tuple[int, ...]
    sizes: tuple[int, ...]
    icc: float
    between: float = 0.0
    within: float = 0.0
    digits: int | None = None  # to which the gap is rounded, which ties it
    seeds: float | None = None

    @property
    def tau(self) -> float:
        """τ = 2/π arcsin r of a bivariate normal, averaged over pairs of runs."""
        num, size, seeds = math.prod(self.levels), self.sizes[0], self.seeds or 0.0
        own = 1 - self.icc - seeds
        setting, run = self.icc * self.between, own * self.within
        of_pairs = [
            ((num - 1) * (size - 1), setting + run),
            (size - 1, run / (own + seeds)),
            (num - 1, (setting + run) / (1 - seeds)),
        ]
        return 2 / math.pi * sum(n * math.asin(r) for n, r in of_pairs) / (num * size - 1)


SCENARIOS = {
    "null, ICC .93": Scenario((5, 3, 2), (5,), 0.93),
    "null, ICC .5": Scenario((5, 3, 2), (5,), 0.5),
    "true τ .28": Scenario((5, 3, 2), (5,), 0.9, 0.5),
    "true τ .53": Scenario((5, 3, 2), (5,), 0.9, 0.8, 0.3),
    "null, 12 settings × 2": Scenario((3, 2, 2), (2,), 0.8),
    "null, 3 to 5 seeds": Scenario((5, 3, 2), (3, 4, 5), 0.8),
    "null, gap tied": Scenario((5, 3, 2), (5,), 0.8, digits=0),
    "null, seeds shared": Scenario((5, 3, 2), (5,), 0.6, seeds=0.2),
    "true τ .2, seeds shared": Scenario((5, 3, 2), (5,), 0.6, 0.5, seeds=0.2),
    "null, seeds shared for nothing": Scenario((5, 3, 2), (5,), 0.8, seeds=0.0),
}
RESAMPLES = 1000  # half the default: firing rates and coverage need no finer p
FULL = 50  # simulations a scenario that also take the details, which cost six times as much


def sweep(scenario: Scenario, rng: np.random.Generator) -> RunTable:
    """One simulated sweep."""
    settings = list(product(*map(range, scenario.levels)))
    sizes = rng.choice(scenario.sizes, len(settings))
    setting = np.repeat(np.arange(len(settings)), sizes)

    def correlated(num: int, r: float) -> np.ndarray:
        """(num, 3) normal columns: gap, and two measures that correlate with it by r, else independent."""
        gap, a, b = rng.normal(size=(3, num))
        rest = math.sqrt(1 - r * r)
        return np.stack([gap, r * gap + rest * a, r * gap + rest * b], axis=1)

    shared = correlated(len(settings), scenario.between)[setting]
    own = correlated(len(setting), scenario.within)
    part = scenario.seeds or 0.0
    values = math.sqrt(scenario.icc) * shared + math.sqrt(1 - scenario.icc - part) * own
    if scenario.seeds is not None:
        seed = np.concatenate([np.arange(size) for size in sizes])
        values = values + math.sqrt(part) * rng.normal(size=(max(sizes), 3))[seed]
    gap = values[:, 0] if scenario.digits is None else values[:, 0].round(scenario.digits)
    frame = {
        "run": [str(i) for i in range(len(setting))],
        "error_gap": gap,
        "a": values[:, 1],
        "b": values[:, 2],
    }
    if scenario.seeds is not None:
        frame["seed"] = seed
    names = [f"h{i}" for i in range(len(scenario.levels))]
    frame |= {name: np.array([s[i] for s in settings])[setting] for i, name in enumerate(names)}
    return RunTable(Path("simulated"), pd.DataFrame(frame), ("error_gap",), ("a", "b"), tuple(names))


def simulate(name: str, seed: int, full: bool) -> dict[str, Any]:
    """What `correlate` says of one sweep, as numbers."""
    scenario = SCENARIOS[name]
    rng = np.random.default_rng([seed, *name.encode()])
    result = correlate(
        sweep(scenario, rng), seed=seed, resamples=RESAMPLES, skip=() if full else ("details",)
    )
    measure = result.measures[0]
    tau = measure.gaps["error_gap"]
    row: dict[str, Any] = {"scenario": name, "seed": seed, "tau": tau.tau, "p": tau.p, "p_naive": tau.p_naive}
    row |= {key: getattr(tau, key) for key in ("low", "high", "low_percentile", "high_percentile")}
    row["p_difference"] = result.comparisons["error_gap"][0].difference.p
    if full:
        details = measure.details["error_gap"]
        row["between"] = [details.between.low, details.between.high, details.between.p]
        row["within"] = [details.within.low, details.within.high, details.within.p]
        row["partial"] = [details.partial["h0"].low, details.partial["h0"].high, details.partial["h0"].p]
        row["psi"] = [details.granulated.psi["h0"].psi.low, details.granulated.psi["h0"].psi.high]
        row["mean_psi"] = [details.granulated.mean.low, details.granulated.mean.high]
        row["simpson"] = bool(details.simpson)
        sets = {each.label: each for each in details.conditioning.sets} if details.conditioning else {}
        row["cmi"] = {label: [each.raw, each.value, each.p] for label, each in sets.items()}
    return row


def share(hits: list[bool]) -> str:
    """A percentage with its binomial standard error."""
    part = sum(hits) / len(hits)
    return f"{100 * part:.1f} ± {100 * math.sqrt(part * (1 - part) / len(hits)):.1f}"


def fires(rows: list[dict[str, Any]], key: str) -> str:
    return share([row[key] < 0.05 for row in rows if row[key] is not None])


def covers(pairs: list[tuple[float | None, float | None]], truth: float) -> str:
    return share([low <= truth <= high for low, high in pairs if low is not None and high is not None])


def table(path: Path) -> Iterator[str]:
    """The results as Markdown."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    yield "| scenario | sims | true τ | naive p < .05 | permutation p < .05 | Δτ p < .05 | covers | percentile covers |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, scenario in SCENARIOS.items():
        some = [row for row in rows if row["scenario"] == name]
        if some:
            tau = covers([(row["low"], row["high"]) for row in some], scenario.tau)
            plain = covers([(row["low_percentile"], row["high_percentile"]) for row in some], scenario.tau)
            firing = [fires(some, key) for key in ("p_naive", "p", "p_difference")]
            yield f"| {name} | {len(some):,} | {scenario.tau:.3f} | {' | '.join(firing)} | {tau} | {plain} |"
    yield ""
    yield "| under the null | sims | " + " | ".join(DETAILS) + " | Simpson flag |"
    yield "|---" * (len(DETAILS) + 3) + "|"
    for name, scenario in SCENARIOS.items():
        some = [row for row in rows if row["scenario"] == name and "within" in row]
        if some and scenario.tau == 0:
            cells = [each(some) for each in DETAILS.values()]
            yield f"| {name} | {len(some)} | {' | '.join(cells)} | {share([row['simpson'] for row in some])} |"
    yield ""
    yield "| K under the null | " + " | ".join(CMI_SETS) + " |"
    yield "|---" * (len(CMI_SETS) + 1) + "|"
    for name, scenario in SCENARIOS.items():
        some = [row for row in rows if row["scenario"] == name and "cmi" in row]
        if some and scenario.tau == 0:
            yield f"| {name} | " + " | ".join(_information(some, given) for given in CMI_SETS) + " |"


def _information(rows: list[dict[str, Any]], given: str) -> str:
    raw, value, _ = zip(*(row["cmi"][given] for row in rows if row["cmi"][given][0] is not None), strict=True)
    error = np.std(value, ddof=1) / math.sqrt(len(value))
    return f"{np.mean(raw):.3f} → {np.mean(value):+.4f} ± {error:.4f}"


def _p(key: str) -> Any:
    return lambda rows: share([row[key][2] < 0.05 for row in rows if row[key][2] is not None])


def _interval(key: str) -> Any:
    def cell(rows: list[dict[str, Any]]) -> str:
        pairs = [(row[key][0], row[key][1]) for row in rows]
        return covers(pairs, 0.0) if any(low is not None for low, _ in pairs) else "—"

    return cell


CMI_SETS = ("nothing", "h0", "h1 + h2", "h0 + h1")
DETAILS = {
    "between p < .05": _p("between"),
    "between covers": _interval("between"),
    "within p < .05": _p("within"),
    "within covers": _interval("within"),
    "partial p < .05": _p("partial"),
    "partial covers": _interval("partial"),
    "ψ covers": _interval("psi"),
    "Ψ covers": _interval("mean_psi"),
}


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--sims", default=500, show_default=True, help="Simulations a scenario.")
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--scenario", multiple=True, help="Only these, by name or part of it.")
@click.option("--table", "show", is_flag=True, help="Print what PATH holds, and simulate nothing.")
def main(path: Path, sims: int, first: int, scenario: tuple[str, ...], show: bool) -> None:
    """Simulate sweeps and append what `correlate` says of each to PATH."""
    if show:
        print("\n".join(table(path)))
        print(f"\nPython {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}, "
              f"pandas {pd.__version__}.")  # fmt: skip
        return
    done = set()
    if path.exists():
        done = {
            (row["scenario"], row["seed"]) for row in map(json.loads, path.read_text("utf-8").splitlines())
        }
    with path.open("a", encoding="utf-8") as file:
        names = [name for name in SCENARIOS if not scenario or any(part in name for part in scenario)]
        for seed, name in product(range(first, first + sims), names):
            if (name, seed) not in done:
                file.write(json.dumps(simulate(name, seed, seed - first < FULL), ensure_ascii=False) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
