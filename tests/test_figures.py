"""The report's figures: what is drawn where, at one column's width, and apart in grey."""

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from gm_probe.analysis import figures, plots
from gm_probe.analysis.design import group_rows
from gm_probe.analysis.intervals import Quantity
from gm_probe.tables.runs import load_table
from gm_probe.tables.table import RunTable


@pytest.fixture
def table(tmp_path: Path) -> RunTable:
    rng = np.random.default_rng(3)
    n = 24
    frame = pd.DataFrame({"error_gap": rng.normal(size=n), "wide": np.exp(3 * rng.normal(size=n))})
    frame["narrow"] = rng.normal(size=n)
    frame["lr"] = np.repeat([0.1, 0.2], 12)
    frame["batch_size"] = np.tile([32, 64, 128], 8)
    frame.loc[5, "wide"] = np.nan
    frame.to_csv(tmp_path / "t.csv", index=False)
    return load_table(tmp_path / "t.csv")


def scatter(
    table: RunTable, measure: str, groups: dict[str, np.ndarray], shapes: dict[str, np.ndarray]
) -> Figure:
    return figures.scatter(table, measure, table.frame["error_gap"].to_numpy(), "gap", groups, shapes)


def points(figure: Figure) -> list[tuple[float, float]]:
    """The coordinates of everything drawn as markers without a line."""
    axes = figure.axes[0]
    found = [line for line in axes.lines if line.get_linestyle() == "None" and line.get_marker() != "None"]
    return [(float(x), float(y)) for line in found for x, y in zip(*line.get_data(), strict=True)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def ticks(figure: Figure, axis: str = "y") -> list[str]:
    axes = figure.axes[0]
    return [label.get_text() for label in (axes.get_yticklabels() if axis == "y" else axes.get_xticklabels())]


def test_a_scatter_has_every_run_once(table: RunTable) -> None:
    groups, shapes = group_rows(table, ["lr"]), group_rows(table, ["batch_size"])
    figure = scatter(table, "wide", groups, shapes)
    complete = table.frame[["wide", "error_gap"]].dropna()
    assert sorted(points(figure)) == sorted(map(tuple, complete.to_numpy().tolist()))
    assert len(complete) == 23
    assert legend(figure) == ["lr=0.1", "lr=0.2", "batch_size=32", "batch_size=64", "batch_size=128"]
    assert figure.axes[0].get_xscale() == "log"


def test_the_points_fill_the_axes(table: RunTable) -> None:
    for name in ("wide", "narrow"):
        axes = scatter(table, name, group_rows(table, ["lr"]), {}).axes[0]
        x, y = table.frame[name].dropna(), table.frame["error_gap"][table.frame[name].notna()]
        scaled = np.log if name == "wide" else np.asarray
        for values, limits in ((scaled(x), scaled(axes.get_xlim())), (y, axes.get_ylim())):
            span = values.max() - values.min()
            assert limits[0] < values.min()
            assert values.max() < limits[1]
            assert limits[1] - limits[0] < 1.15 * span


def test_the_legend_s_markers_are_taken_for_no_subgroup(table: RunTable) -> None:
    groups, shapes = group_rows(table, ["batch_size"]), group_rows(table, ["lr"])
    figure = scatter(table, "wide", groups, shapes)
    handles = figure.legends[0].legend_handles
    colours = [handle.get_color() for handle in handles]  # type: ignore[union-attr]
    assert set(colours[:3]).isdisjoint(colours[3:])
    assert len(set(colours[3:])) == 1


def test_a_scatter_without_a_single_pair_says_so(table: RunTable) -> None:
    empty = RunTable(table.source, table.frame.assign(wide=np.nan), table.gaps, table.measures, ())
    figure = scatter(empty, "wide", {}, {})
    assert [text.get_text() for text in figure.axes[0].texts] == ["no run has both values"]


def test_the_forest_draws_each_value_within_its_interval_and_names_the_undefined() -> None:
    rows = {
        "fisher_trace": {"a": Quantity(0.3, 0.1, 0.5), "b": Quantity(-0.2)},
        "my measure": {"a": Quantity(None, note="constant"), "b": Quantity(0.9, 0.8, 1.0)},
    }
    figure = figures.forest(rows, "τ")
    axes = figure.axes[0]
    assert sorted(x for x, _ in points_any(figure)) == [-0.2, 0.3, 0.9]
    intervals = sorted(tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2)  # type: ignore[arg-type]
    assert intervals == [(0, 0), (0.1, 0.5), (0.8, 1.0)]  # the first is the line at 0
    assert [text.get_text().strip() for text in axes.texts] == ["undefined"]
    assert ticks(figure) == ["tr F", "my measure"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top
    assert axes.get_xlim() == pytest.approx((-1.03, 1.03))
    assert legend(figure) == ["a", "b"]


def points_any(figure: Figure) -> list[tuple[float, float]]:
    """The coordinates of all single markers."""
    found = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]  # type: ignore[arg-type]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in found]  # type: ignore[index]


def test_the_heat_map_writes_each_value_where_it_belongs() -> None:
    values = np.array([[0.5, -0.25, np.nan], [1.0, 0.0, -1.0]])
    figure = figures.heat_map(values, ["fisher_trace", "m"], ["lr", "batch_size", "mean"], rule=1)
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {
        (0.5, 0.5): "0.50", (1.5, 0.5): "−0.25", (2.65, 0.5): "–",
        (0.5, 1.5): "1.00", (1.5, 1.5): "0.00", (2.65, 1.5): "−1.00",
    }  # fmt: skip
    assert ticks(figure, "x") == ["lr", "batch_size", "mean"]
    meshes = [np.ma.asarray(mesh.get_array()).reshape(2, -1) for mesh in axes.collections]
    assert [mesh.shape[1] for mesh in meshes] == [2, 1]
    drawn = np.ma.concatenate(meshes, axis=1)
    np.testing.assert_array_equal(drawn.mask, np.isnan(values))
    np.testing.assert_array_equal(drawn.compressed(), values[~np.isnan(values)])


def test_heat_map_numbers_stand_out_from_their_cells_by_the_contrast_that_wcag_asks() -> None:
    for value in np.linspace(-1, 1, 41):
        figure = figures.heat_map(np.array([[value]]), ["m"], ["x"])
        figure.draw_without_rendering()
        cell = figure.axes[0].collections[0].get_facecolors()[0][:3]  # type: ignore[index]
        ink = to_rgb(figure.axes[0].texts[0].get_color())
        light, dark = sorted((luminance(tuple(cell)), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, value


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (5, ["0.50", "−0.25", "0.00", "1.00"]),
        (6, [".50", "−.25", ".00", "1.00"]),
        (12, [".5", "−.2", ".0", "1.0"]),
    ],
)
def test_heat_map_numbers_are_as_short_as_their_cells(columns: int, expected: list[str]) -> None:
    values = np.full((1, columns), np.nan)
    values[0, :4] = [0.5, -0.25, -0.001, 1.0]
    figure = figures.heat_map(values, ["m"], [f"column number {i}" for i in range(columns)])
    assert [text.get_text() for text in figure.axes[0].texts][:4] == expected
    figure.draw_without_rendering()
    width = figure.axes[0].get_window_extent().width / columns
    assert all(text.get_window_extent().width < width for text in figure.axes[0].texts)


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance by WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_heat_map_s_scale_rises_in_grey() -> None:
    values = np.linspace(-1, 1, 9)
    figure = figures.heat_map(values[None, :], ["m"], [str(i) for i in range(9)])
    figure.draw_without_rendering()
    shades = [luminance(tuple(c[:3])) for c in figure.axes[0].collections[0].get_facecolors()]  # type: ignore[union-attr]
    assert all(b > a for a, b in itertools.pairwise(shades))


def test_tau_by_radius_has_a_line_a_step_count_and_a_tick_a_radius() -> None:
    lines = {k: {rho: Quantity(0.1 * k + rho, rho, 0.9) for rho in (0.05, 0.1, 0.5)} for k in (1, 5)}
    lines[5][0.1] = Quantity(None, note="constant")
    figure = figures.tau_by_radius(lines, "τ")
    axes = figure.axes[0]
    drawn = [line for line in axes.lines if line.get_marker() in plots.MARKERS]
    assert [len(line.get_xdata()) for line in drawn] == [3, 3]  # type: ignore[arg-type]
    np.testing.assert_allclose(drawn[0].get_ydata(), [0.15, 0.2, 0.6])
    assert math.isnan(drawn[1].get_ydata()[1])  # type: ignore[index]
    np.testing.assert_allclose(drawn[0].get_xdata(), [0.05, 0.1, 0.5], rtol=0.05)
    assert legend(figure) == ["K = 1", "K = 5"]
    assert axes.get_xscale() == "log"
    assert axes.get_ylim() == pytest.approx((-1.03, 1.03))
    figure.draw_without_rendering()
    assert ticks(figure, "x") == ["0.05", "0.1", "0.5"]


def test_run_curves_draw_what_was_recorded() -> None:
    rows = [
        {"epoch": 1, "running_ce": 2.0, "running_error": 0.9},
        {
            "epoch": 2,
            "running_ce": 1.0,
            "running_error": 0.5,
            "test_error": 0.6,
            "test_ce": 1.1,
            "train_ce": 0.9,
        },
        {"epoch": 3, "running_ce": 0.5, "running_error": 0.2, "local_inconsistency": 1e-3},
        {"epoch": 4, "running_ce": 0.4, "running_error": 0.0, "local_inconsistency": 1e-1},
    ]
    loss, error, divergence = figures.run_curves(rows).axes
    drawn = {
        line.get_label(): line.get_xydata().tolist() for axes in (loss, error) for line in axes.get_lines()
    }
    assert drawn["test"] == [[2, 0.6]]
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.get_lines()}
    assert lines["training, running"] == [[0.5, 2.0], [1.5, 1.0], [2.5, 0.5], [3.5, 0.4]]
    assert lines["training"] == [[2, 0.9]]
    assert divergence.get_lines()[0].get_xydata().tolist() == [[3, 1e-3], [4, 1e-1]]
    assert (loss.get_yscale(), error.get_yscale(), divergence.get_yscale()) == ("linear", "linear", "log")
    assert len(figures.run_curves(rows[:1]).axes) == 2


def test_training_curves_draw_each_run_in_its_subgroup_s_look() -> None:
    epochs = np.arange(1, 5)
    curves = [(epochs, np.exp(-epochs)), (epochs[:2], np.ones(2)), (np.array([]), np.array([]))]
    figure = figures.training_curves(curves, {"a": np.array([0]), "b": np.array([1, 2])}, "loss")
    lines = figure.axes[0].lines
    drawn = [line for line in lines if len(line.get_xdata()) > 1]  # type: ignore[arg-type]
    assert [len(line.get_xdata()) for line in drawn] == [4, 2]  # type: ignore[arg-type]
    assert drawn[0].get_color() != drawn[1].get_color()
    assert drawn[0].get_linestyle() != drawn[1].get_linestyle()
    assert figure.axes[0].get_yscale() == "log"
    assert legend(figure) == ["a", "b"]
    zero = figures.training_curves([(epochs, np.array([1.0, 0.5, 0.0, 0.0]))], {}, "error")
    assert zero.axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("names", [("m",), ("a_measure_with_a_very_long_name_" * 3, "b $x_<i>")])
def test_figures_are_one_column_wide_and_nothing_is_cut_off(names: tuple[str, ...]) -> None:
    quantities = {name: {"error_gap": Quantity(0.2, -0.4, 0.6)} for name in names}
    made = [
        figures.forest(quantities, "τ"),
        figures.heat_map(
            np.zeros((len(names), 4)), names, ["lr", "weight_decay", "optimizer.name", "mean Ψ"]
        ),
        figures.heat_map(np.zeros((len(names), len(names))), names, names),
    ]
    for figure in made:
        assert figure.get_figwidth() == figures.COLUMN
        with Image.open(io.BytesIO(plots.render(figure, "png"))) as image:
            grey = np.asarray(image.convert("L"))
        edges = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        assert edges.min() > 250  # no ink on the border
        assert grey.min() < 120


def test_subgroups_next_to_each_other_differ_in_grey_or_in_filling() -> None:
    looks = [plots.look(index, 0) for index in range(4)]
    for a, b in itertools.pairwise(looks):
        filled = [look["markerfacecolor"] != "none" for look in (a, b)]
        assert filled[0] != filled[1]
    first, third = (luminance(to_rgb(looks[index]["color"])) for index in (0, 2))
    assert (max(first, third) + 0.05) / (min(first, third) + 0.05) > 3
