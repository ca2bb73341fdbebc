"""What ``correlate`` finds: one tidy table of statistics, and what follows from it in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, NamedTuple

from gm_probe.analysis.intervals import Quantity
from gm_probe.tables.table import GAPS, Exclusion, RunTable

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("measure", "target", "statistic", "group", "value", "low", "high", "p", "n", "note")


class Key(NamedTuple):
    """Whose statistic a row of the table is."""

    measure: str
    target: str
    statistic: str
    group: str = ""


@dataclass(frozen=True, slots=True)
class Correlations:
    """The statistics of every measure of ``runs`` with every target.

    Attributes:
        targets: what the measures were correlated with, by name, in words.
        quantities: every statistic under its key, in the order of the table.
        alike: the measures that order the runs as an earlier one does, under its name.
        conclusion: sentences.
        notes: what a reader must know of the runs and the choices made.
        warnings: by measure, why its values are not comparable between runs.
    """

    runs: RunTable
    targets: Mapping[str, str]
    quantities: Mapping[Key, Quantity]
    alike: Mapping[str, tuple[str, ...]]
    num_settings: int
    num_seeds: int
    conclusion: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: Mapping[str, tuple[str, ...]] | None = None

    @property
    def excluded(self) -> tuple[Exclusion, ...]:
        """Return the runs that were left out, with the reasons."""
        return self.runs.excluded

    @property
    def table(self) -> pd.DataFrame:
        """Return the tidy table: a statistic per row, with the columns ``COLUMNS``."""
        import pandas as pd

        rows = [(*key, *astuple(found)) for key, found in self.quantities.items()]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        return frame.astype(dict.fromkeys(("value", "low", "high", "p"), float))

    def get(self, measure: str, target: str, statistic: str = "tau", group: str = "") -> Quantity:
        """Return one statistic; one without a value where it was not computed."""
        return self.quantities.get(
            Key(measure, target, statistic, group), Quantity(None, note="not computed")
        )

    def of(self, measure: str, target: str, statistic: str) -> dict[str, Quantity]:
        """Return a statistic of every group that it was computed for."""
        return {
            key.group: found
            for key, found in self.quantities.items()
            if key[:3] == (measure, target, statistic)
        }


def target_label(name: str) -> str:
    """Return a target in words."""
    return GAPS.get(name, name.replace("_", " "))
