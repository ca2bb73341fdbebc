"""Which measures are computed, by their names and those of their groups. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from gm_probe.errors import DataError, UsageError, did_you_mean
from gm_probe.measures.catalogue import MEASURES

DEFAULT_MEASURES = (
    "local_inconsistency",
    "fisher_lambda_max",
    "fisher_trace",
    "hessian_lambda_max",
    "hessian_trace",
    "error",
    "cross_entropy",
)

LAYER_MEASURES = ("fisher_trace", "fisher_lambda_max", "hessian_trace", "hessian_lambda_max")
"""The measures of each layer alone."""

GROUPS = tuple(dict.fromkeys(each.group for each in MEASURES.values()))
"""Names that stand for all measures of a group; ``all`` stands for every measure."""


def expanded(
    names: Sequence[str], *, labeled: bool, batch_dependent: bool = False, validation: bool = False
) -> list[str]:
    """Return ``names`` with each group replaced by its measures that are defined on such data.

    Args:
        validation: whether there is a labeled validation set, too.
    """
    found: list[str] = []
    for name in names:
        if name != "all" and name not in GROUPS:
            found.append(name)
            continue
        found += [
            each
            for each, one in MEASURES.items()
            if name in ("all", one.group)
            and (labeled or not one.needs_labels)
            and (validation or not one.needs_validation)
            and not (batch_dependent and one.independent)
        ]
    return list(dict.fromkeys(found))


def unknown_measure(name: str) -> str:
    """Say that no measure is called ``name``, and which one may be meant."""
    called = next((key for key, each in MEASURES.items() if each.symbol == name), None)
    meant = f"{name} is called {called}" if called else did_you_mean(name, (*MEASURES, *GROUPS, "all"))
    return f"no measure {name!r}; {meant}"


def check_names(
    names: Sequence[str], *, labeled: bool, batch_dependent: bool = False, num_processes: int = 1
) -> None:
    """Raise unless each measure is defined on such data.

    Raises:
        UsageError: a measure is unknown, several processes cannot share it, or it is undefined where examples are
            ``batch_dependent``.
        DataError: a measure needs labels, and there are none.
    """
    for name in names:
        if name not in MEASURES:
            raise UsageError(unknown_measure(name))
        if batch_dependent and (reason := MEASURES[name].independent):
            raise UsageError(f"{name} {reason}, so it is undefined for NT-Xent logits. Leave it out")
        if name == "local_inconsistency_batchwise" and num_processes > 1:
            raise UsageError(f"{name} splits the examples into batches. Measure it in one process")
        if MEASURES[name].needs_labels and not labeled:
            raise DataError(f"{name} needs labels. Give class folders with --labeled")


def default_measures(*, labeled: bool, batch_dependent: bool = False) -> list[str]:
    """Return the ``DEFAULT_MEASURES`` that can be computed; NT-Xent of ``batch_dependent`` examples needs no labels."""
    return [
        name
        for name in DEFAULT_MEASURES
        if (labeled or batch_dependent or not MEASURES[name].needs_labels)
        and not (batch_dependent and MEASURES[name].independent)
    ]
