"""What the statistics say, in sentences: which measures follow a target, which run against it, what picking costs."""

from collections.abc import Iterator, Sequence

import numpy as np

from gm_probe.analysis.coefficients import linear_tau
from gm_probe.analysis.definitions import direction_of, direction_of_target, symbol
from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.results import Correlations, Key
from gm_probe.errors import listed
from gm_probe.tables.rates import is_rate
from gm_probe.tables.table import RunTable

ALIKE = 0.98
"""Two measures with a larger τ between them order the runs alike; −τ where one is better when larger, one worse."""
FEW = 2000
"""Up to this number of runs counting their pairs is faster than importing scipy."""


def measures_alike(table: RunTable) -> dict[str, tuple[str, ...]]:
    """Return the measures to show, each with the later ones that order the same runs as it does."""
    shown: dict[str, list[str]] = {}
    columns = {name: table.frame[name].to_numpy(dtype=float) for name in table.measures}
    for name, x in columns.items():
        same = [first for first in shown if _alike(columns[first], _signs(first, name) * x)]
        if same:
            shown[same[0]].append(name)
        else:
            shown[name] = []
    return {name: tuple(others) for name, others in shown.items()}


def _signs(one: str, other: str) -> int:
    return -1 if {direction_of(one), direction_of(other)} == {"worse", "better"} else 1


def _alike(x: np.ndarray, y: np.ndarray) -> bool:
    known = np.isfinite(x)
    if not np.array_equal(known, np.isfinite(y)) or known.sum() < 3:
        return False
    x, y = x[known], y[known]
    if len(x) > FEW:
        from scipy import stats  # its import takes half a second, but its time does not grow with the pairs

        return bool(stats.kendalltau(x, y).statistic > ALIKE)
    tau = linear_tau(x, y, np.arange(len(x)))
    return tau is not None and tau.value > ALIKE


def expected_sign(measure: str, direction: str | None) -> int:
    """Return the sign of τ that the directions of measure and target lead one to expect; 0 where one is unknown."""
    known = direction_of(measure)
    return 0 if known is None or direction is None else 1 if known == direction else -1


def conclude(found: Correlations) -> tuple[str, ...]:
    """Return the sentences; targets of which the same holds share them."""
    same: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for target in found.targets:
        larger = direction_of_target(found.runs, target)
        kinds = tuple(
            (name, _kind(found.get(name, target), expected_sign(name, larger))) for name in found.alike
        )
        same.setdefault(kinds, []).append(target_short(target))
    said = [
        sentence
        for kinds, targets in same.items()
        for sentence in _sentences(kinds, " and the ".join(targets))
    ]
    return (*said, *_subgroups(found), *_simpson(found), *selection(found))


SAID = {
    "follows": ("follow", "the {} in the expected direction."),
    "against": ("run", "against the {}: the opposite of what is expected."),
    "rises": ("rise", "with the {}."),
    "falls": ("fall", "as the {} rises."),
}
"""By what a measure does (``_kind``): the verb and the rest of the sentence, about a target."""


def _sentences(kinds: Sequence[tuple[str, str]], label: str) -> Iterator[str]:
    by_kind: dict[str, list[str]] = {}
    for name, kind in kinds:
        by_kind.setdefault(kind, []).append(symbol(name))
    for kind, (verb, rest) in SAID.items():
        if names := by_kind.get(kind):
            yield f"{listed(names)} {_verb(names, verb)} {rest.format(label)}"
    if names := by_kind.get("open"):
        none = len(by_kind) == 1 and len(names) > 1
        whose = "any measure follows" if none else f"{listed(names)} {_verb(names, 'follow')}"
        yield f"Whether {whose} the {label} cannot be decided."


def _kind(tau: Quantity, expected: int) -> str:
    if not tau.clear:
        return "open"
    sign = 1 if (tau.value or 0) > 0 else -1
    if not expected:
        return "rises" if sign > 0 else "falls"
    return "follows" if sign == expected else "against"


def _subgroups(found: Correlations) -> list[str]:
    """Name the measures that run against a target in a subgroup, and not over all runs."""
    against: dict[tuple[str, str], list[str]] = {}
    for key, tau in found.quantities.items():
        if key.statistic == "tau" and key.group and key.measure in found.alike:
            larger, whole = direction_of_target(found.runs, key.target), found.get(key.measure, key.target)
            expected = expected_sign(key.measure, larger)
            if _kind(tau, expected) == "against" and _kind(whole, expected) != "against":
                against.setdefault((key.group, target_short(key.target)), []).append(symbol(key.measure))
    targets: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (group, target), names in against.items():
        targets.setdefault((group, tuple(names)), []).append(target)
    return [
        f"Among the runs with {group}, {listed(names)} {_verb(names, 'run')} against the {' and the '.join(some)}."
        for (group, names), some in targets.items()
    ]


def _simpson(found: Correlations) -> list[str]:
    flagged: dict[str, list[str]] = {}
    for key, tau in found.quantities.items():
        if key.statistic == "tau_within" and tau.note.startswith("Simpson"):
            flagged.setdefault(key.group, []).append(symbol(key.measure))
    return [
        f"Within runs of the same {group}, {listed(list(dict.fromkeys(names)))} {_verb(names, 'have')} the opposite "
        "sign (Simpson's paradox)."
        for group, names in flagged.items()
    ]


def selection(found: Correlations) -> list[str]:
    """Return what picking a run by a measure costs, in a sentence for each outcome."""
    by_outcome: dict[str, list[tuple[Key, Quantity]]] = {}
    for key, of in found.quantities.items():
        if key.statistic == "regret" and key.measure in found.alike and of.value is not None:
            by_outcome.setdefault(key.target, []).append((key, of))
    return [_selection(found, picked) for picked in by_outcome.values()]


def _selection(found: Correlations, picked: Sequence[tuple[Key, Quantity]]) -> str:
    key, least = min(picked, key=lambda pair: pair[1].value or 0.0)
    best = [f"the {one.group} {symbol(one.measure)}" for one, of in picked if of.value == least.value]
    random = found.get(key.measure, key.target, "regret_random").value or 0.0
    what = target_short(key.target)
    cost = f"{costs(least.value or 0.0, key.target)} of {what} over the best run"
    if (least.value or 0.0) < random:
        picks = (
            f"The best pick is {best[0]}: it"
            if len(best) == 1
            else f"The best picks are {listed(best)}: each"
        )
        return f"{picks} costs {cost}, and a random run {costs(random, key.target)}."
    return f"No measure picks a better run than chance, which costs {costs(random, key.target)} of {what}."


def costs(value: float, target: str) -> str:
    """Return a regret as percentage points of an error, accuracy or error gap, or as the number it is."""
    if in_points(target):
        return f"{100 * value:.1f} points"
    return f"{value:.3g}"


def in_points(target: str) -> bool:
    """Return whether a target is a fraction of examples."""
    return is_rate(target)


def target_short(target: str) -> str:
    """Return a target's name in a sentence."""
    plain = target.replace("_", " ") if target.isidentifier() else target  # arithmetic stays as it was typed
    return {"error_gap": "error gap", "ce_gap": "CE gap"}.get(target, plain)


def _verb(names: Sequence[str], verb: str) -> str:
    if len(set(names)) > 1:
        return verb
    return "has" if verb == "have" else f"{verb}s"
