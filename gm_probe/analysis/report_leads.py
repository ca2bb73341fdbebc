"""The sentence that each section of a report begins with: what its figure shows."""

from collections.abc import Iterator, Mapping

from gm_probe.analysis.conclusion import selection, target_short
from gm_probe.analysis.definitions import symbol
from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.results import Correlations
from gm_probe.analysis.typeset import two_decimals
from gm_probe.errors import listed
from gm_probe.tables.table import by_reason

Grids = Mapping[str, Mapping[int, Mapping[float, Quantity]]]
"""By target, number of ascent steps and radius: τ of S_ρ (``grid.grid_taus``)."""


def leads(found: Correlations, grids: Grids) -> dict[str, str]:
    """Return the sentences by section (``report.SECTIONS``); a section without one has nothing to show."""
    parts = {
        "correlation": _clear(found),
        "scatter": _strongest(found),
        "beyond": _granulated(found),
        "comparisons": _alike(found),
        "selection": selection(found),
        "grid": _over_grid(grids),
    }
    return {name: " ".join(said) for name, said in parts.items()} | {"runs": entered(found)}


def entered(found: Correlations) -> str:
    table = found.runs
    reasons = "; ".join(f"{len(runs):,} × {reason}" for reason, runs in by_reason(table.excluded).items())
    left_out = f"{len(table.excluded):,} left out ({reasons})" if reasons else "none left out"
    return f"{table.num_runs:,} runs of {found.num_settings:,} settings entered, {left_out}."


def in_words(tau: Quantity) -> str:
    """Return τ with its interval and n as a paper writes them."""
    if tau.value is None:
        return f"τ undefined: {tau.note}"
    known = tau.low is not None and tau.high is not None
    interval = (
        f" (95 % CI {two_decimals(tau.low or 0.0)} to {two_decimals(tau.high or 0.0)})" if known else ""
    )
    return f"τ = {two_decimals(tau.value)}{interval}, {tau.n:,} runs"


def _clear(found: Correlations) -> Iterator[str]:
    num = len(found.runs.measures)
    clear = {
        target: [symbol(name) for name in found.runs.measures if found.get(name, target).clear]
        for target in found.targets
    }
    said = [
        f"for {len(names)} of {num} measures with the {target_short(target)}{f' ({listed(names)})' if names else ''}"
        for target, names in clear.items()
    ]
    yield f"The interval of τ excludes 0 {listed(said)}."


def _strongest(found: Correlations) -> Iterator[str]:
    for target in found.targets:
        taus = {name: found.get(name, target) for name in found.runs.measures}
        known = {name: abs(tau.value) for name, tau in taus.items() if tau.value is not None}
        if known:
            name = max(known, key=lambda each: known[each])
            yield f"{symbol(name)} has the largest |τ| with the {target_short(target)}: {in_words(taus[name])}."


def _granulated(found: Correlations) -> Iterator[str]:
    spans = {
        target: _span([found.get(name, target, "psi_mean").value for name in found.runs.measures])
        for target in found.targets
    }
    said = [f"{span} with the {target_short(target)}" for target, span in spans.items() if span]
    if said:
        yield f"Where one hyperparameter differs, the measures' Ψ is {listed(said)}."


def _alike(found: Correlations) -> Iterator[str]:
    same = {first: others for first, others in found.alike.items() if others}
    for first, others in same.items():
        yield f"{listed([symbol(name) for name in (first, *others)])} order the runs alike (τ > 0.98)."
    if not same and len(found.runs.measures) > 1:
        yield "No two measures order the runs alike (τ > 0.98)."


def _over_grid(grids: Grids) -> Iterator[str]:
    for target, lines in grids.items():
        if span := _span([tau.value for of in lines.values() for tau in of.values()]):
            yield f"Over all ρ and K, τ of S_ρ with the {target_short(target)} is {span}."


def _span(values: list[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    return " to ".join(dict.fromkeys(two_decimals(value) for value in (known[0], known[-1]))) if known else ""
