"""The options of ``gmprobe measure`` that say what is measured, and which files are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gm_probe.cli.measure_relevance import CONVERGED
from gm_probe.cli.output import FIGURE_SUFFIXES
from gm_probe.cli.param_types import split
from gm_probe.cli.settings import ADVANCED
from gm_probe.data.names import require_data_name
from gm_probe.errors import UsageError
from gm_probe.measures.names import check_names, default_measures, expanded
from gm_probe.setting import setting, validate


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What is measured, and which files are written: each field is an option (see ``setting``)."""

    labeled: str | None = setting(
        None,
        ADVANCED,
        "Use this data with labels: the class folders, or 'y' of an array file.",
        metavar="DATA",
    )
    measures: str = setting(
        "",
        ADVANCED,
        "Measures to compute, or groups of them: curvature, outputs, norms, all; see `gmprobe measures`.",
        unset="S_ρ, λ_max and tr of F and H; with labels also error and CE",
        metavar="A,B",
    )
    validation: str | None = setting(
        None,
        ADVANCED,
        "Use this labeled data of the training distribution for the measures atc, doc and cot.",
        metavar="DATA",
    )
    protocol: str = setting(
        "paper",
        ADVANCED,
        "Report S_ρ as the mean over random starts of K steps, as the converged maximum, or both.",
        choices=("paper", "converged", "both"),
    )
    per_layer: bool = setting(
        False,
        ADVANCED,
        "Also measure λ_max and trace of F and H for each layer, with the others held constant.",
    )
    layer_figure: Path | None = setting(
        None,
        ADVANCED,
        "Also draw these as bars to this .png, .pdf or .svg; implies --per-layer.",
        metavar="FILE",
    )
    density: Path | None = setting(
        None,
        ADVANCED,
        "Also plot the spectral densities of F and H to this .png, .pdf or .svg; costs about 800 gradients.",
        metavar="FILE",
    )
    temperature: float | None = setting(
        None, ADVANCED, "Temperature τ of NT-Xent.", unset="as trained", above=0
    )
    memory: str | None = setting(
        None,
        ADVANCED,
        "Memory budget of a pass; it sets the batch size unless --batch-size is given.",
        unset="4GB, or half of a GPU's free memory",
        metavar="SIZE",
    )
    save: bool = setting(
        False,
        ADVANCED,
        "Also write measures.json into each run folder, for `gmprobe correlate`. Options that you omit keep the "
        "values of the run's earlier measurement.",
    )

    def __post_init__(self) -> None:
        validate(self)

    @property
    def by_layer(self) -> bool:
        return self.per_layer or self.layer_figure is not None

    def chosen(self, head: str) -> list[str]:
        """Return the measures to compute.

        Raises:
            UsageError, DataError: one is unknown, or cannot be computed from the data that is given.
        """
        labeled, simclr = self.labeled is not None, head == "simclr"
        what = {"labeled": labeled or simclr, "batch_dependent": simclr}
        found = expanded(split(self.measures), **what, validation=self.validation is not None)
        check_names(found, **what)
        found = found or default_measures(labeled=labeled, batch_dependent=simclr)
        if self.protocol == "both" and "local_inconsistency" in found:
            # last of all, because it starts from the Fisher eigenvector that λ_max(F) has computed
            found = [*(name for name in found if name != CONVERGED), CONVERGED]
        return found

    def require_consistent(self, unlabeled: str | None, head: str) -> None:
        """Raise UsageError for options that exclude each other."""
        if unlabeled is not None and self.labeled is not None:
            raise UsageError("--unlabeled and --labeled exclude each other; give one")
        if head == "simclr" and self.labeled is not None:
            raise UsageError("NT-Xent reads no labels; give --unlabeled")
        if head == "simclr" and self.validation is not None:
            raise UsageError("NT-Xent reads no labels; leave out --validation")
        if self.save and (self.by_layer or self.validation is not None):
            raise UsageError("--save keeps no values per layer or by --validation; leave one of them out")
        if self.validation is not None:
            require_data_name(self.validation, here=True)

    def require_figures(self, num_checkpoints: int) -> None:
        """Raise UsageError where a file is of no format for figures, or is asked for of several checkpoints."""
        for option, file in (("--density", self.density), ("--layer-figure", self.layer_figure)):
            if file is not None and file.suffix.lower() not in FIGURE_SUFFIXES:
                raise UsageError(
                    f"{option} {file}: no format {file.suffix!r}; use {', '.join(FIGURE_SUFFIXES)}"
                )
            if file is not None and num_checkpoints != 1:
                raise UsageError(f"{option} plots a single checkpoint; give one")

    def draw(self, result: dict[str, Any], checkpoint: str) -> None:
        """Draw the figures that were asked for."""
        from gm_probe.analysis.density_plot import density_panels
        from gm_probe.analysis.layer_plot import layer_bars
        from gm_probe.analysis.plots import write_figure

        of = {"checkpoint": checkpoint, "num_examples": result["num_examples"]}
        known = {name: one for name, one in result.get("density", {}).items() if "reason" not in one}
        if self.density is not None and known:
            write_figure(density_panels(known, **of), [self.density])
        if self.layer_figure is not None:
            write_figure(layer_bars(result["layers"], **of), [self.layer_figure])
