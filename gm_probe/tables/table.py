"""Many runs as one typed table, whatever they were read from.

Nothing is dropped in silence: a run that cannot enter is in ``RunTable.excluded`` with its reason, and a run
that enters without a usable value in some column is in ``RunTable.missing`` under that column.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gm_probe.errors import DataError, UsageError, did_you_mean, printable
from gm_probe.measures.catalogue import MEASURES, PAIR_MEASURES
from gm_probe.runs.record_kinds import ERRORS

if TYPE_CHECKING:
    import pandas as pd

GAPS = {"error_gap": "test error − train error", "ce_gap": "test CE − train CE"}
KNOWN_MEASURES = (*(name for name, each in MEASURES.items() if not each.needs_labels), *PAIR_MEASURES)
OUTCOMES = (*ERRORS, "num_train", "num_test")
"""What a run may say of its training besides the gaps; not taken for measures."""
ACCURACIES = {"test_accuracy": "test_error", "train_accuracy": "train_error"}
"""Targets that are 1 − an outcome."""
MOST_MEASURES, MOST_SETTINGS = 100, 300
"""Most columns of one table, because statistics compare every two of them."""
MISSED_STOP = "ended before reaching its stop_ce"
SEED = "seed"
UNSET = "unset"
LARGEST = 1e150
"""Larger values have no finite square and count as not finite."""
TOO_LARGE = "beyond 1e150 in size"


@dataclass(frozen=True, slots=True)
class TableRequest:
    """What the reader of a table asks of it: names of columns, its ``gap`` as in ``load_table``."""

    measures: Sequence[str] = ()
    hyperparameters: Sequence[str] = ()
    group_by: Sequence[str] = ()
    gap: str = "both"
    seed_column: str = ""
    converged_only: bool = False


# What tells runs apart without being a choice about training: never a hyperparameter unless asked for.
# fmt: off
BOOKKEEPING = frozenset((
    "run", "name", "id", "index", "checkpoint", "out", "device", "threads", "workers", "num_workers",
    "executor", "jobs", "seed", "split_seed", "resume", "quiet", "command", "created", "started",
))
# fmt: on


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A run that was left out, and why."""

    run: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunTable:
    """The runs that entered, one a row, and an account of those that did not.

    ``frame`` has rows 0..n-1 and the columns ``run`` (str), ``gaps`` and ``measures`` (float, NaN where
    ``missing`` gives the reason), ``outcomes`` (float, NaN where unknown; those of ``OUTCOMES`` that were found
    and play no other role), ``hyperparameters`` (bool, int, float, str, or None where unset) and, where runs record
    one, ``seed`` (the same).
    ``missing[column]`` maps a row to its reason; ``unconverged[measure]`` holds the rows whose estimate had
    not converged. ``conditions[measure][setting]`` counts the runs under each value that the measure was taken
    with (``show``n; of runs that have the measure). ``notes`` are the choices made while reading, for the
    reader to see, and ``left_out`` are the columns without a role. ``aliases`` maps what the source calls a column
    to what it is called here, where that differs. ``directions`` says of arithmetic on columns whether a larger value
    is ``worse`` or ``better``.
    """

    source: Path
    frame: pd.DataFrame
    gaps: tuple[str, ...]
    measures: tuple[str, ...]
    hyperparameters: tuple[str, ...]
    excluded: tuple[Exclusion, ...] = ()
    missing: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    unconverged: Mapping[str, frozenset[int]] = field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    directions: Mapping[str, str | None] = field(default_factory=dict)

    def named(self, names: Iterable[str]) -> list[str]:
        """Return the names that this table uses for columns, given as the source or this table calls them."""
        return [self.aliases.get(name, name) for name in names]

    @property
    def num_runs(self) -> int:
        return len(self.frame)

    @property
    def labels(self) -> dict[str, str]:
        """Return whose labels a measure was taken with (``predicted``, ``given``, ``mixed``), where its rows say so."""
        kinds = {
            name: [kind for kind in conditions.get("labels", ()) if kind != "none needed"]
            for name, conditions in self.conditions.items()
        }
        return {
            name: kind[0] if len(kind) == 1 else "mixed"
            for name, kind in kinds.items()
            if kind not in ([], [UNSET])
        }


def show(value: Any) -> str:
    """Return a setting's value as the reader sees it: 1.0 as ``1``, True as ``true``, None as ``unset``."""
    if value is None:
        return UNSET
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return printable(str(value))


def by_reason(exclusions: Iterable[Exclusion]) -> dict[str, list[str]]:
    """Return the names of the runs by the reason they were left out for, the commonest reason first."""
    reasons: dict[str, list[str]] = {}
    for exclusion in exclusions:
        reasons.setdefault(exclusion.reason, []).append(exclusion.run)
    return dict(sorted(reasons.items(), key=lambda item: -len(item[1])))


def missed_stop_note(missed: int, of: int) -> list[str]:
    """Return the note on runs that are kept although they missed their ``stop_ce``; none where there are none."""
    if not missed:
        return []
    return [
        f"{missed} of {of} runs ended before they reached their stop_ce; they are kept. --converged-only "
        "leaves them out"
    ]


def require_known(names: Iterable[str], known: Collection[str], what: str) -> None:
    """Raise UsageError for the first of ``names`` that is not in ``known``, with the nearest one that is."""
    for name in names:
        if name not in known:
            raise UsageError(f"no {what} {name!r}; {did_you_mean(name, known)}")


def require_few(names: Sequence[str], most: int, source: Path, role: str, option: str) -> None:
    """Raise DataError where ``source`` has more than ``most`` columns of a ``role``: every two are compared."""
    if len(names) > most:
        raise DataError(
            f"{source} has more than {most} {role}, too many to compare. Choose some with {option}"
        )


def require_distinct(gaps: Sequence[str], measures: Sequence[str], hyperparameters: Sequence[str]) -> None:
    """Raise UsageError when one column would play two roles."""
    seen = {"run": "the name of a run", **dict.fromkeys(gaps, "a gap")}
    for role, names in (("a measure", measures), ("a hyperparameter", hyperparameters)):
        for name in names:
            if name in seen:
                raise UsageError(
                    f"{name!r} is {seen[name]} and cannot be {role} too. Choose with --measures and --hyper"
                )
            seen[name] = role


def unique(names: Iterable[str]) -> list[str]:
    """Return ``names`` in their order, each once."""
    return list(dict.fromkeys(names))


def few(names: Sequence[str], most: int = 8) -> str:
    """Return the first of ``names``, and how many more there are."""
    shown = [name or "a column without a name" for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
