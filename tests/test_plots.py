"""The scatter panels: their layout, that they show every run, and the files they become."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gm_probe.analysis import plots
from gm_probe.analysis.correlation import correlate
from gm_probe.analysis.design import group_rows
from gm_probe.analysis.scatter import scatter_panels
from gm_probe.tables.runs import load_table
from gm_probe.tables.table import RunTable


def wide_table(folder: Path, num_measures: int, n: int = 20) -> RunTable:
    rng = np.random.default_rng(num_measures)
    frame = pd.DataFrame({"error_gap": rng.normal(size=n), "ce_gap": rng.normal(size=n)})
    for i in range(num_measures):
        frame[f"measure ${i}_<b>"] = np.exp(2 * rng.normal(size=n)) if i % 2 else rng.normal(size=n)
    frame["lr"] = np.arange(n) % 3
    frame.to_csv(folder / "wide.csv", index=False)
    return load_table(folder / "wide.csv")


@pytest.mark.parametrize(("num_measures", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_panels_wrap_after_three(tmp_path: Path, num_measures: int, shape: tuple[int, int]) -> None:
    table = wide_table(tmp_path, num_measures)
    figure = scatter_panels(correlate(table), {})
    assert len(figure.axes) == 2 * num_measures
    grid = figure.axes[0].get_subplotspec().get_gridspec()  # type: ignore[union-attr]
    assert (grid.nrows, grid.ncols) == (2 * shape[0], shape[1])
    assert not figure.legends


def test_panels_draw_every_run_once_and_name_each_subgroup(tmp_path: Path) -> None:
    table = wide_table(tmp_path, 2)
    groups = group_rows(table, ["lr"])
    found = correlate(table, targets=["ce_gap"], group_by=["lr"])
    figure = scatter_panels(found, groups)
    for axes, measure in zip(figure.axes, table.measures, strict=True):
        drawn = sum(np.size(line.get_xdata()) for line in axes.get_lines())
        assert drawn == found.get(measure, "ce_gap").n
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lr=0", "lr=1", "lr=2"]
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]


def test_colour_and_shape_both_tell_subgroups_apart() -> None:
    assert len(set(plots.MARKERS)) == 10
    looks = {
        (plots.COLOURS[i % len(plots.COLOURS)], plots.MARKERS[i % len(plots.MARKERS)]) for i in range(70)
    }
    assert len(looks) == 70


def unnamed(svg: bytes) -> bytes:
    """Without the ids that matplotlib before 3.11 takes from memory addresses."""
    return re.sub(rb"\b[a-z][0-9a-f]{10}\b", b"", svg)


def test_written_figures_decode_and_carry_their_text(tmp_path: Path) -> None:
    table = wide_table(tmp_path, 2)
    figure = scatter_panels(correlate(table), group_rows(table, ["lr"]))
    paths = [tmp_path / f"figure.{suffix}" for suffix in plots.FORMATS]
    plots.write_figure(figure, paths)
    png, pdf, svg = (path.read_bytes() for path in paths)
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.width > 600
        assert np.asarray(image.convert("L")).min() < 100
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 5000
    tau = correlate(table).get(table.measures[0], "error_gap").value
    assert tau is not None
    assert f"τ = {tau:.2f}, n = 20".replace("-", "−") in svg.decode()
    again = plots.render(figure, "svg")
    assert unnamed(again) == unnamed(svg)


def test_the_axis_says_whose_labels_a_hessian_was_taken_with(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("error_gap,hessian_trace,my_hessian_of_some_other_kind\n1,2,3\n2,3,4\n")
    table = load_table(tmp_path / "t.csv", measures=["hessian_trace", "my_hessian_of_some_other_kind"])
    taken = {name: {"labels": {"predicted": 2}} for name in table.measures}
    figure = scatter_panels(correlate(replace(table, conditions=taken)), {})
    known, other = [axes.get_xlabel() for axes in figure.axes]
    assert known == "tr H (predicted labels)"
    assert other == "my_hessian_of_some_other_kind\n(predicted labels)"


def test_undefined_panels_are_drawn_as_such(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("error_gap,m,empty\n1,2,\n2,2,\n")
    table = load_table(tmp_path / "t.csv", measures=["m", "empty"])
    figure = scatter_panels(correlate(table), {})
    svg = plots.render(figure, "svg").decode()
    assert "τ undefined, n = 2" in svg
    assert "no run has both values" in svg
