"""The paper's tables and figures: every smoke runs whole, and what the studies compute is checked on its own."""

from __future__ import annotations

import csv
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from torch.nn import functional

from gm_probe.analysis.intervals import mean_interval
from gm_probe.cli.reproduce import reproduce as command
from gm_probe.curvature.operators import fisher, hessian
from gm_probe.data.batches import Batches
from gm_probe.errors import DivergedError, UsageError
from gm_probe.files.atomic import write_json, write_toml
from gm_probe.reproduce import methods, scatter, theory
from gm_probe.reproduce.catalogue import SCALES, paper_recipe, paper_recipes
from gm_probe.reproduce.claims import outcome_of_parts, outcome_of_tests, parts_of
from gm_probe.reproduce.comparison import Arm, Comparison, Difference, text_of
from gm_probe.reproduce.drawing import draw
from gm_probe.reproduce.finding import Finding, Task, study_of
from gm_probe.reproduce.gaussians import Mixture, Network, descending
from gm_probe.runs.records import read_run
from gm_probe.training.config import TrainConfig
from gm_probe.training.updates import make_rule

# fmt: off
SMOKES = ["fig2", "fig6", "fig7", "thm41", "appB", "fig1-6cnn", "fig4", "fig13", "tab1", "tab3", "tab4", "tab6"]
# fmt: on
"""Every study, picture and objective, and rows that need an extra or tune; the others differ in settings alone."""


@pytest.fixture(scope="module")
def network() -> Network:
    """The one of Fig. 6, in its middle of training."""
    return Network(Mixture.draw(100, 0.9, 0), 16, 0).trained(200, 0.1, 0.9)


# ---- every recipe


@pytest.mark.parametrize("name", paper_recipes())
def test_a_recipe_is_complete_and_fits_its_study(name):
    entry = paper_recipe(name)
    assert "smoke" in entry.scales
    assert "paper" in entry.scales
    assert set(entry.scales) <= set(SCALES)
    for scale in entry.scales:
        inspect.signature(study_of(entry.study)).bind(Task(name, scale, Path()), **entry.at(scale))
        assert entry.costs[scale]


def configuration(base: dict[str, Any], variant: dict[str, Any], **more: Any) -> TrainConfig:
    """One variant's, before it is tuned."""
    return TrainConfig.from_dict(base | methods._without(variant, "label", "points", "lr_of") | more)


@pytest.mark.parametrize(
    "name", [name for name, entry in paper_recipes().items() if entry.study == "methods"]
)
def test_every_variant_is_a_configuration(name):
    for scale in paper_recipe(name).scales:
        entry = paper_recipe(name).at(scale)
        for place in entry["data"]:
            shared = entry["base"] | methods._without(place, "label", "published", "of", "seeds")
            for variant in (each for one in entry["variants"] for each in methods._expanded(one)):
                for point in variant.get("points", [{}]):
                    configuration(shared, variant, **place.get("of", {}).get(variant["label"], {}), **point)


@pytest.mark.parametrize("name", SMOKES)
def test_smoke_writes_its_folder(name, tmp_path):
    if name == "tab6":
        pytest.importorskip("timm", reason="timm is an extra")
    result = CliRunner().invoke(command, [name, "--scale", "smoke", "--out", str(tmp_path / "out"), "--json"])
    assert result.exception is None, result.output
    said = json.loads(result.stdout)
    folder = tmp_path / "out"
    assert {f"{name}.csv", f"{name}.tex", f"{name}.md", "result.json"} <= set(said["files"])
    for file in said["files"]:
        assert (folder / file).stat().st_size > 100, file
    page = (folder / f"{name}.md").read_text()
    assert paper_recipe(name).claim[:20] in page.replace("\\", "")
    assert "The paper's own numbers:" in page
    assert "Scale `smoke`" in page
    note = paper_recipe(name).notes["smoke"]
    assert note in page.replace("\\", "")
    assert name != "tab6" or "fine-tunes nothing" in note
    # every picture that the page shows is there, and the numbers of its paragraph are finite
    for picture in re.findall(r"\]\((\S+\.png)\)", page):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
        assert (folder / picture).with_suffix(".svg").exists()
    assert not re.search(r"\b(nan|inf)\b", page)
    assert (folder / f"{name}.tex").read_text().isascii()  # what pdfTeX can set
    assert json.loads((folder / "result.json").read_text())["outcome"] == said["outcome"]
    assert not list(folder.glob(".*.tmp"))


def test_the_list_names_every_recipe_without_torch():
    result = CliRunner().invoke(command, ["--list", "--json"])
    assert [entry["name"] for entry in json.loads(result.stdout)] == list(paper_recipes())
    assert all(entry["claim"] and entry["scales"] for entry in json.loads(result.stdout))


def test_every_name_of_the_paper_is_a_command():
    """Also those of figures and tables that another command gives."""
    for name, other in (("fig8", "tab4"), ("fig11", "tab5"), ("tab2", "tab5"), ("fig12", "fig4")):
        assert paper_recipe(name) is paper_recipe(other)


@pytest.mark.parametrize(
    "name", [name for name in paper_recipes() if "data" in paper_recipe(name).at("paper")]
)
def test_what_the_paper_published_stands_at_every_scale(name):
    entry = paper_recipe(name)
    published = {place["label"]: place.get("published", {}) for place in entry.at("paper")["data"]}
    for scale in entry.scales:
        at = entry.at(scale)
        for place in at["data"]:
            assert place.get("published", {}) == published.get(place["label"], {})
    labels = {variant["label"] for variant in entry.at("paper")["variants"]}
    assert {label for of in published.values() for label in of} <= labels


@pytest.mark.parametrize("name", ["tab3", "tab-fixmatch-sam"])
def test_fixmatch_takes_the_papers_steps(name):
    """2²⁰ of them, to less than an epoch: 50,000 images less those set aside, 7 × 64 unlabeled ones a step."""
    entry = paper_recipe(name).at("paper")
    for place in entry["data"]:
        for label, own in place["of"].items():
            assert label.startswith("FixMatch")
            unlabeled = 50_000 - entry["base"]["num_unlabeled"] - place["labels"]
            steps = -(-unlabeled // (7 * entry["base"]["batch_size"]))
            assert 2**20 <= steps * own["epochs"] < 2**20 + steps


def test_unknown_names_and_scales_are_usage_errors():
    with pytest.raises(UsageError, match="did you mean 'fig6'"):
        paper_recipe("fig66")
    with pytest.raises(UsageError, match="fig6 has no scale 'small'; it has smoke, paper"):
        paper_recipe("fig6").at("small")
    with pytest.raises(
        UsageError, match=r"tab5 has no small scale. Choose --scale smoke \(.+\) or --scale paper \(.+GPU"
    ):
        _ = paper_recipe("tab5").default


def test_nothing_that_takes_a_gpu_is_run_unless_asked_for():
    for entry in paper_recipes().values():
        if entry.chosen:
            assert "GPU" not in entry.costs[entry.default]
        else:
            assert "GPU" in entry.costs["paper"]


SWEEP = {
    "base": {
        "data": "digits",
        "model": "mlp-8",
        "num_train": 60,
        "num_unlabeled": 40,
        "num_test": 60,
        "batch_size": 20,
    },
    "grid": {"lr": [0.1, 0.2, 1e-6], "seed": [0, 1]},
    "measure": {"measures": ["parameter_norm"]},
}


@pytest.mark.parametrize(("epochs", "done"), [(40, 4), (1, 0)])
def test_a_sweep_is_decided_on_runs_that_are_done(tmp_path, epochs, done):
    inline = SWEEP | {"base": SWEEP["base"] | {"epochs": epochs, "stop_ce": 1.0}}
    task = Task("fig1-6cnn", "small", tmp_path, notify=lambda _: None)
    found = scatter.study(task, expected={"parameter_norm": 1}, inline=inline)
    number, *_ = [row[-1].text for row in found.sheets[0].rows if row[1].text == "error gap"]
    assert number == str(done or 6)
    assert len(found.rows) == 6
    if done:
        assert f"Over {done} of 6 runs" in found.text
        assert "Left out: 2 × ended before reaching its stop_ce (lr1e-06-s0" in found.text
        assert "Over all 6 runs that finished" in found.text
    else:
        assert found.outcome == "cannot be told"
        assert "Only 0 of these reached the cross-entropy" in found.text
    assert "an interval needs 5" in found.text


# ---- the plane: dense matrices against the package's operators, which share no code with them


def test_dense_curvature_is_the_operators(network):
    x, y = network.mixture.x, network.mixture.y
    batches = Batches.from_tensors(x, batch_size=70)
    v = torch.randn(network.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = network.logits(x)
    torch.testing.assert_close(network.fisher() @ v, fisher(network.parameters, batches, logits).matvec(v))
    torch.testing.assert_close(network.hessian() @ v, hessian(network.parameters, batches, y).matvec(v))


def test_training_is_gradient_descent_and_yields_where_asked():
    network = Network(Mixture.draw(5, 0.5, 0), 4, 0)
    before, losses = network.theta, []
    for _ in network.train([0, 1, 4], 0.1, 0.0):
        losses.append(network.loss)
        if len(losses) == 2:
            again = Network(network.mixture, 4, 0)
            functional.cross_entropy(again.model(again.mixture.x), again.mixture.y).backward()
            step = again.parameters.join([p.grad for p in again.parameters.named.values()])
            torch.testing.assert_close(network.theta, before - 0.1 * step)
    assert losses[0] > losses[1] > losses[2]


def test_redrawn_labels_are_about_as_many_as_asked():
    one, other = Mixture.draw(1000, 0.5, 3), Mixture.draw(1000, 0.5, 3, flipped=0.3)
    assert torch.equal(one.x, other.x)
    assert float((one.y != other.y).double().mean()) == pytest.approx(0.3 * 2 / 3, abs=0.03)


# ---- Fig. 6


def test_one_step_aligns_with_v1_more_than_with_v2_v3_and_noise(network):
    _, vectors = descending(network.fisher())
    cosines, noise = theory.cosines_of(network, vectors[:, :3], 400, 0.1, 0.1, 0)
    for other in (cosines[:, 1], cosines[:, 2], noise[:, 0]):
        _, low, _ = mean_interval(cosines[:, 0] - other)
        assert low > 0


def test_one_step_is_a_product_with_the_fisher_matrix(network):
    """App. C: with coefficients a of the start, cos(δ, vᵢ) = λᵢaᵢ/√Σ λⱼ²aⱼ², where the start is small."""
    values, vectors = descending(network.fisher())
    scale = 1e-4  # of the starts: the quadratic regime
    cosines, _ = theory.cosines_of(network, vectors[:, :3], 20, 0.1, scale, 5)
    generator = torch.Generator().manual_seed(5)
    for found in cosines:
        a = vectors.T @ network.parameters.random(scale, generator)
        expected = (values * a).abs()[:3] / (values * a).norm()
        np.testing.assert_allclose(found, expected.numpy(), atol=2e-3)


# ---- Fig. 7


def test_algorithm_1_reaches_the_exact_maximum_within_1_percent_at_the_predicted_k(network, record_property):
    values, vectors = descending(network.fisher())
    rho = 1e-3
    needed = theory.steps_needed(values)
    assert 5 < needed < 30
    generator = torch.Generator().manual_seed(0)
    noises = [network.parameters.random(0.1, generator) for _ in range(60)]
    found = theory.climb(network, noises, rho, [1, 5, needed], vectors[:, 0])
    exact = rho**2 / 2 * float(values[0])
    errors = {k: np.abs(s / exact - 1) for k, (s, _) in found.items()}
    record_property("mean relative error at K = 5", float(errors[5].mean()))
    assert errors[needed].mean() < 0.01
    assert (errors[needed] < 0.01).mean() >= 0.98
    # one step is no negligible gap: the paper's claim needs steps
    assert errors[1].mean() > 0.1
    assert errors[1].mean() > errors[5].mean() > errors[needed].mean()


def test_projected_ascent_is_the_quadratic_maximum_at_small_radius_and_never_less_than_algorithm_1(network):
    values, vectors = descending(network.fisher())
    generator = torch.Generator().manual_seed(0)
    best = theory.projected_ascent(network, 5, 100, 1e-4, generator)
    assert best == pytest.approx(1e-8 / 2 * float(values[0]), rel=2e-3)
    best = theory.projected_ascent(network, 10, 100, 0.5, generator)
    noises = [network.parameters.random(0.1, generator) for _ in range(10)]
    reached, _ = theory.climb(network, noises, 0.5, [20], vectors[:, 0])[20]
    assert reached.max() <= best * (1 + 1e-6)


def test_steps_needed_by_hand():
    # λ = (1, ½): Σ λᵢ²/λ₁² = ¼; ¼/(a₁² · 0.01) · 4^−(K−1) ≤ 1 with a₁² = 1.5709e-4: 4^(K−1) ≥ 159,144, K − 1 = 8.64
    assert theory.steps_needed(torch.tensor([1.0, 0.5])) == 10


# ---- parts of a claim

ROWS = pd.DataFrame(
    {
        "seed": seed,
        "arm": arm,
        "loss": loss,
        "y": 3 * loss**power * (1 + 0.01 * seed * loss),
        "x": loss + seed,
        "z": power * (loss + 0.1 * seed),
    }
    for seed in range(4)
    for arm, power in (("a", 0.7), ("b", -0.2))
    for loss in np.geomspace(1, 1e-4, 20)
)


@pytest.mark.parametrize(
    ("test", "signs"),
    [
        ({"slope": ["y", "loss"], "unit": "seed"}, [1, -1]),
        ({"slope": ["y", "loss"], "unit": "seed", "where": "loss < 2e-4"}, [0, 0]),  # too few points
        ({"slope": ["y", "loss"], "unit": "seed", "where": "arm == 'a'"}, [1, 0]),  # b has no rows left
        ({"value": "y", "unit": "seed", "above": 1}, [-1, 1]),
        ({"value": "y", "unit": "seed", "below": 1}, [1, -1]),
        ({"value": "x - x.mean()", "unit": "seed"}, [0, 0]),
        ({"value": "y", "within": [0, 4]}, [1, -1]),
        ({"value": "y", "within": [3, 9], "median": True}, [-1, 1]),
        ({"tau": ["z", "loss"]}, [1, -1]),
        ({"tau": ["seed", "loss"]}, [0, 0]),
    ],
)
def test_each_kind_of_part_is_decided_for_each_group(test, signs):
    parts = list(parts_of(ROWS, {"says": "it", "by": "arm", **test}))
    assert [part.sign for part in parts] == signs
    assert [part.text.split(": ")[0] for part in parts] == ["it, start = a", "it, start = b"]


def test_a_mean_over_units_has_the_student_interval():
    [part] = parts_of(ROWS, {"says": "it", "value": "x", "unit": "seed"})
    means = ROWS.groupby("seed").x.mean()
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.99)
    assert part.text == f"it: {means.mean():.3g} (99 % CI {expected.low:.3g} to {expected.high:.3g})".replace(
        "-", "−"
    )


def test_a_slope_is_the_exponent_of_a_power_law():
    [part] = parts_of(ROWS, {"says": "it", "slope": ["y", "loss"], "unit": "seed", "where": "arm == 'a'"})
    assert float(part.text.split()[1]) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    ("signs", "theory", "comparison"),
    [
        ((1, 1), "shows", "shows"),
        ((1, -1), "shows in part", "shows in part"),
        ((0, -1), "does not show", "shows the opposite"),
        ((1, 0), "shows in part", "cannot be told"),
        ((0, 0), "cannot be told", "cannot be told"),
        ((), "cannot be told", "cannot be told"),
    ],
)
def test_outcomes_follow_the_signs(signs, theory, comparison):
    assert outcome_of_parts(signs) == theory
    assert outcome_of_tests(signs) == comparison


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "reproduce"


@pytest.mark.skipif(not RESULTS.is_dir(), reason="results are no part of a source distribution")
@pytest.mark.parametrize("name", ["fig2", "fig5", "fig6", "thm41", "appB"])
def test_the_claims_of_the_published_tables_are_decided_as_published(name):
    table = pd.read_csv(RESULTS / name / f"{name}.csv")
    if name == "thm41":
        table["last"] = table.groupby(["case", "seed"]).loss.transform("last")
    if name == "fig6":
        table["start"] = range(len(table))
    for rho in (0.01, 0.1, 1) if name == "appB" else ():
        table[f"quadratic_{rho:g}"] = table[f"s_{rho:g}"] / (rho**2 / 2 * table.lambda_max)
    signs = [part.sign for test in paper_recipe(name).at("paper")["tests"] for part in parts_of(table, test)]
    assert outcome_of_parts(signs) == json.loads((RESULTS / name / "result.json").read_text())["outcome"]


# ---- App. B


def test_what_diverged_in_app_b_is_said_and_where_all_did_is_an_error(tmp_path):
    entry = paper_recipe("appB").at("smoke")
    grid = {"num_train": [100], "lr": [0.02, 0.05, 1e30], "batch_size": [32], "seed": [0, 1]}
    found = theory.study(
        Task("appB", "smoke", tmp_path / "a", notify=lambda _: None), **{**entry, "grid": grid}
    )
    assert found.text.endswith(
        "Left out, because they diverged or are alone in their setting: "
        "2 of 6 runs (own start); 2 of 6 runs (common start)."
    )
    assert set(found.rows.lr) == {0.02, 0.05}
    grid["lr"] = [1e30]
    with pytest.raises(DivergedError):
        theory.study(Task("appB", "smoke", tmp_path / "b", notify=lambda _: None), **{**entry, "grid": grid})


# ---- tables of methods


def comparison(tmp_path: Path, errors: dict[str, list[float | None]]) -> Comparison:
    """Run folders with just the summaries that a comparison reads; None is a run that diverged."""
    arms = []
    for label, values in errors.items():
        paths = []
        for seed, error in enumerate(values):
            folder = tmp_path / f"{label}-{seed}"
            write_toml(folder / "config.toml", {"method": "sgd"})
            ended = {"status": "diverged"} if error is None else {"status": "finished", "test_error": error}
            write_json(folder / "summary.json", ended)
            (folder / "metrics.jsonl").touch()
            paths.append(folder)
        arms.append(Arm("data", label, TrainConfig(), tuple(paths), ""))
    return Comparison(tuple(arms))


def test_differences_are_paired_by_seed(tmp_path):
    # seeds differ by far more than the two variants do, whose difference is 1 point with a spread of 0.1
    found = comparison(tmp_path, {"a": [0.10, 0.30, 0.50], "b": [0.111, 0.310, 0.509]})
    test = Difference(found, "data", {"better": "a", "worse": "b"})
    expected = stats.ttest_rel([0.111, 0.310, 0.509], [0.10, 0.30, 0.50]).confidence_interval(0.95)
    assert test.interval() == pytest.approx([expected.low, expected.high])
    assert test.sign == 1
    assert "a against b: −1 points (−1.25 to −0.752; n = 3)" in str(test)
    assert Difference(found, "data", {"better": "b", "worse": "a"}).sign == -1


def test_the_rise_of_an_error_is_from_its_least_to_its_end(tmp_path):
    found = comparison(tmp_path, {"a": [0.31, None, 0.30], "b": [0.35, 0.3, 0.36]})
    for path in tmp_path.glob("*/summary.json"):
        summary = json.loads(path.read_text())
        if summary["status"] == "finished":
            write_json(path, summary | {"test_error_min": 0.30})
    assert found.arm("data", "a").values("error_rise") == pytest.approx([0.01, np.nan, 0], nan_ok=True)
    test = Difference(found, "data", {"better": "a", "worse": "b", "key": "error_rise"})
    assert test.differences == pytest.approx([0.04, 0.06])
    assert "a against b: −5 points" in str(test)


def test_one_of_many_comparisons_must_be_clearer_in_either_direction(tmp_path):
    a, b = [0.10, 0.30, 0.50, 0.20], [0.104, 0.311, 0.520, 0.212]
    found = comparison(tmp_path, {"a": a, "b": b})
    assert 0.05 / 2 < stats.ttest_rel(a, b).pvalue < 0.05
    claimed, reverse = {"better": "a", "worse": "b"}, {"better": "b", "worse": "a"}
    signs = {m: Difference(found, "data", reverse, m).sign for m in (1, 2)}
    assert signs == {1: -1, 2: 0}
    signs = {m: Difference(found, "data", claimed, m).sign for m in (1, 2)}
    assert signs == {1: 1, 2: 0}
    many = [Difference(found, "data", claimed, 2) for _ in range(2)]
    text = text_of(many, (), "", False)
    assert "each is decided, in either direction, by its 97.5 % interval (Bonferroni)" in text
    assert "0 of 2 comparisons go as claimed, 0 the opposite way." in text


def test_a_variant_that_alone_diverges_is_not_helped_by_it(tmp_path):
    low, high = [0.10, 0.30, 0.50, 0.20], [0.20, 0.41, 0.60, 0.31]
    lost = [*low[:3], None]
    cases = (  # better, worse, sign, what is said
        (low, high, 1, "; n = 4)"),
        (lost, high, 0, "; n = 3, a alone without a result in 1)"),
        (low, [*high[:3], None], 1, "; n = 3, b alone without a result in 1)"),
        (lost, [*high[:3], None], 1, "; n = 3)"),
        (high, low, -1, "; n = 4)"),
        (high, lost, 0, "; n = 3, b alone without a result in 1)"),
        ([*high[:3], None], low, -1, "; n = 3, a alone without a result in 1)"),
        ([None] * 4, low, 0, "no seed in which both ended (n = 0, a alone without a result in 4)"),
    )
    for number, (better, worse, sign, said) in enumerate(cases):
        found = comparison(tmp_path / str(number), {"a": better, "b": worse})
        test = Difference(found, "data", {"better": "a", "worse": "b"})
        assert test.sign == sign, number
        assert str(test).endswith(said)
        text = text_of([test], (), "", False)
        assert ("wins no comparison" in text) == ("alone" in said)


def tracked(folder: Path, label: str, config: TrainConfig, seeds: list[dict[int, float]]) -> Arm:
    """An arm of runs that have only probe errors, by epoch; one of a single value is a run that diverged."""
    paths = []
    for seed, track in enumerate(seeds):
        path = folder / f"{label}-{seed}"
        write_toml(path / "config.toml", {"method": "sgd"})
        write_json(path / "summary.json", {"status": "finished" if len(track) > 1 else "diverged"})
        lines = [
            {"epoch": 1, "running_loss": 1.0},
            *({"epoch": e, "probe_test_error": v} for e, v in track.items()),
        ]
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        paths.append(path)
    return Arm("data", label, config, tuple(paths), "")


def test_means_over_training_are_areas_and_are_paired_by_seed(tmp_path):
    config = TrainConfig(objective="simclr")
    # by hand: ½(0.8 + 0.6)·2 + ½(0.6 + 0.4)·4 = 3.4 over 6 epochs; the last run of a diverged
    a = tracked(tmp_path, "a", config, [{2: 0.8, 4: 0.6, 8: 0.4}, {2: 0.5, 8: 0.5}, {2: 0.1}])
    assert a.means_along("probe_test_error") == pytest.approx([3.4 / 6, 0.5, np.nan], nan_ok=True)
    b = tracked(tmp_path, "b", config, [{2: 0.8, 4: 0.8, 8: 0.4}, {2: 0.5, 8: 0.6}, {2: 0.3, 8: 0.3}])
    test = Difference(Comparison((a, b)), "data", {"better": "a", "worse": "b", "along": "probe_test_error"})
    # b − a: 0.2 more at epoch 4 is ½·0.2·6/6 = 0.1; 0.05
    np.testing.assert_allclose(test.differences, [0.1, 0.05])
    assert test.compared == "mean probe error over training"
    assert str(test).startswith("a against b: −7.5 points")
    assert str(test).endswith("; n = 2, a alone without a result in 1)")
    # a picture's means are over runs that ended, so that none jumps where another stops
    assert set(a.epochs.run) == {0, 1}


def test_a_panel_shows_means_by_group_or_points():
    table = pd.DataFrame({"k": [1, 1, 3, 3], "arm": list("aabb"), "y": [1.0, 3.0, 5.0, 5.0]})
    lines = {"by": "arm", "x": "k", "y": {"y": "10 * y"}, "level": 7.0, "title": "one"}
    figure = draw({"table": table}, [lines, {**lines, "kind": "points", "where": "arm == 'b'"}], 2)
    means, points = figure.axes
    assert [container.lines[0].get_ydata().tolist() for container in means.containers] == [[20.0], [50.0]]
    assert [text.get_text() for text in means.get_legend().get_texts()] == ["a, y", "b, y"]
    assert [line.get_ydata()[0] for line in points.lines[:1]] == [50.0]
    assert means.get_title("left") == "(a) one"


def test_the_verdict_says_what_was_tested_and_what_was_not(tmp_path):
    found = comparison(tmp_path, {"a": [0.10, 0.30, 0.50], "b": [0.111, 0.310, 0.509]})
    claimed = [Difference(found, "data", {"better": "a", "worse": "b"})]
    beside = [Difference(found, "data", {"better": "b", "worse": "a"})]
    text = text_of(claimed, beside, "its cost", False)
    assert text.startswith("The test, on data: ")
    # what is no part of the claim counts on neither side
    assert "1 of 1 comparisons go as claimed, 0 the opposite way." in text
    assert "These are not part of the claim. Final test error: b against a: +1 points" in text
    assert text.endswith("Not tested: its cost.")
    assert Finding("shows", text, pd.DataFrame(), []).verdict == "The claim shows."
    assert (
        Finding("shows", text, pd.DataFrame(), [], untested="x").verdict
        == "What was tested of the claim shows."
    )
    told = Finding("cannot be told", text, pd.DataFrame(), [], untested="x").verdict
    assert told == "Whether what was tested of the claim holds cannot be decided at this scale."


ERRORS = [
    name
    for name, entry in paper_recipes().items()
    if entry.study == "methods"
    and any(
        t.get("key", "test_error") in {"test_error", "test_error_min"}
        for t in entry.at("paper").get("tests", ())
    )
    # these are of rises, of probes, of a validation part, and of final errors, which the paper has not
    and name not in {"fig3", "fig4", "fig13", "tab4-cost"}
]


@pytest.mark.parametrize("name", ERRORS)
def test_the_least_error_is_tested_as_the_paper_reports_it_and_taken_over_several_looks(name):
    for scale in ("small", "paper"):
        if scale not in paper_recipe(name).scales:
            continue
        entry = paper_recipe(name).at(scale)
        assert all(
            test["key"] == "test_error_min" for test in entry["tests"] if "key" in test or scale == "small"
        )
        looks = set()
        for variant in entry["variants"]:
            labels = {key: value for key, value in entry["data"][0].items() if key == "labels"}
            config = configuration(entry["base"] | labels, variant)
            assert config.eval_every
            assert config.epochs // config.eval_every >= 4
            looks.add(config.epochs // config.eval_every)
        assert scale == "paper" or len(looks) == 1  # no least is over more looks than another


@pytest.mark.parametrize("name", ["tab1", "tab4"])
def test_the_one_sided_gradient_is_trained_beside(name):
    for scale in ("small", "paper"):
        assert {v.get("kl_grad", "both") for v in paper_recipe(name).at(scale)["variants"]} == {
            "both",
            "perturbed",
        }


def at_small(name):
    """label ↦ configuration"""
    entry = paper_recipe(name).at("small")
    assert entry["split_by_seed"]
    return {v["label"]: configuration(entry["base"], v) for v in entry["variants"]}


def tuned_by_table_1():
    """Its label, and the row of another that takes its radii."""
    along, steps, shares = (at_small(name) for name in ("fig3", "tab4", "msharp"))
    return [
        ("IAM-D", along["IAM-D"]),
        ("IAM-D", steps["K = 1"]),
        ("IAM-D, one-sided", steps["K = 1, one-sided"]),
        ("IAM-S", shares["m = 64"]),
    ]


PUBLISHED = RESULTS / "tab1" / "tab1.csv"


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="results are no part of a source distribution")
def test_their_radii_are_those_that_table_1_chose():
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["rho"]]
    chosen = {row["variant"]: (float(row["rho"]), float(row["beta"])) for row in rows}
    for label, one in tuned_by_table_1():
        assert (one.rho, one.beta) == chosen[label]


def test_a_difference_beyond_anothers(tmp_path):
    found = comparison(
        tmp_path,
        {"a": [0.10, 0.20, 0.30], "b": [0.15, 0.26, 0.33], "c": [0.5, 0.6, None], "d": [0.52, 0.61, 0.7]},
    )
    names = {"better": "a", "worse": "b", "beyond": {"better": "c", "worse": "d"}}
    test = Difference(found, "data", names)
    # (0.15 − 0.10) − (0.52 − 0.50) and (0.26 − 0.20) − (0.61 − 0.60)
    np.testing.assert_allclose(test.differences, [0.03, 0.05])
    assert str(test).startswith("a against b, beyond what c has against d: −4 points (")
    assert test.lost == {"better": 1, "worse": 0}


def test_what_is_compared_is_named():
    one = Arm("data", "a", TrainConfig(), (), "")
    simclr = Arm("data", "a", TrainConfig(objective="simclr"), (), "")
    cases = (
        (one, {}, "final test error"),
        (one, {"key": "test_error_min"}, "least test error over epochs"),
        (one, {"key": "local_inconsistency"}, "S_ρ"),
        (one, {"key": "train_error"}, "final training error"),
        (one, {"key": "error_rise"}, "rise of the test error from its least over epochs to its end"),
        (simclr, {}, "final probe error"),
        (simclr, {"along": "local_inconsistency"}, "mean S_ρ over training"),
    )
    for arm, test, words in cases:
        found = Difference(Comparison((arm,)), "data", {"better": "a", "worse": "a", **test})
        assert found.compared == words


def test_seeds_that_are_all_alike_tell_no_error(tmp_path):
    found = comparison(tmp_path, {"a": [0.25, 0.5], "b": [0.5, 0.75]})
    test = Difference(found, "data", {"better": "a", "worse": "b"})
    assert test.interval() is None
    assert test.sign == 0


def test_a_grid_is_one_variant_a_point():
    found = list(
        methods._expanded({"label": "x", "method": "iam-d", "grid": {"rho": [0.1, 1.0], "beta": [2.0]}})
    )
    assert found == [
        {"label": "x 0.1 2", "method": "iam-d", "rho": 0.1, "beta": 2.0},
        {"label": "x 1 2", "method": "iam-d", "rho": 1.0, "beta": 2.0},
    ]


def test_tuning_takes_the_point_of_least_validation_error(tmp_path):
    task = Task("tab1", "smoke", tmp_path, notify=lambda _: None)
    shared = DIGITS | {"num_train": 200, "num_test": 50, "batch_size": 128, "epochs": 4}
    variant = {"label": "x", "method": "sgd", "points": [{"lr": 1e-6}, {"lr": 0.05}]}
    chosen, rows = methods._tuned(
        task, shared, variant, {"label": "digits"}, {"validation": 0.1, "epochs": 3}
    )
    assert (chosen.lr, chosen.validation, chosen.epochs) == (0.05, None, 4)
    runs = [read_run(path) for path in (tmp_path / "runs" / "digits-tune").iterdir() if path.is_dir()]
    errors = {run.config["lr"]: run.summary["test_error"] for run in runs}
    assert errors[0.05] < errors[1e-6]
    assert all((run.config["validation"], run.config["epochs"]) == (0.1, 3) for run in runs)
    shown = [("lr = 1e-06", errors[1e-6]), ("lr = 0.05", errors[0.05])]
    assert [row[2:] for row in rows] == [
        (setting, "3", f"{100 * error:.2f}", chosen)
        for (setting, error), chosen in zip(shown, ("", "yes"), strict=True)
    ]
    bad = {**variant, "label": "bad", "points": [{"lr": 1e30}, {"lr": 1e31}]}
    chosen, rows = methods._tuned(task, shared, bad, {"label": "digits"}, {"validation": 0.1, "epochs": 1})
    assert chosen.lr == 1e30  # its own runs will be said to have diverged
    assert [row[4:] for row in rows] == [("— (1 diverged)", "")] * 2


DIGITS = {
    "model": "mlp-8",
    "num_train": 60,
    "num_unlabeled": 20,
    "num_test": 40,
    "batch_size": 10,
    "epochs": 1,
}
DIGITS |= {"threads": 1}
FEW_LABELS = DIGITS | {"objective": "joint", "labels": 20, "mu": 1}


def compared(folder: Path, name: str = "tab3", **given: Any) -> Finding:
    """SAM against SGD on digits, on two seeds, or what is ``given``."""
    settings = {
        "base": FEW_LABELS,
        "variants": [{"label": "SGD"}, {"label": "SAM", "method": "sam"}],
        "data": [{"label": "digits", "data": "digits"}],
        "seeds": 2,
        "tests": [{"better": "SAM", "worse": "SGD"}],
        "picture": "variant",
    }
    return methods.study(Task(name, "small", folder, notify=lambda _: None), **settings | given)


@pytest.mark.parametrize("split_by_seed", [True, False])
def test_a_seed_may_draw_its_split_and_labels_which_its_runs_share(tmp_path, split_by_seed):
    tests = [{"better": "SAM", "worse": "SGD"}, {"better": "SAM", "worse": "SGD", "key": "test_error_min"}]
    found = compared(tmp_path, tests=tests, split_by_seed=split_by_seed)
    parts = {}
    for path in (tmp_path / "runs" / "digits").glob("*/split.json"):
        config = read_run(path.parent).config
        parts[config["method"], config["seed"]] = json.loads(path.read_text())
    assert len(parts) == 4
    for seed in (0, 1):
        assert parts["sgd", seed] == parts["sam", seed]
    for part in ("train", "train_unlabeled", "unlabeled", "test"):
        assert (parts["sgd", 0][part] != parts["sgd", 1][part]) == split_by_seed, part
    said = "same split and labels, which each seed draws anew" if split_by_seed else "same data, start"
    assert said in found.text
    # the family is the claim's own comparisons
    assert "by its 97.5 % interval" in found.text


def test_a_data_set_may_have_fewer_seeds_and_published_numbers(tmp_path):
    many = {"label": "many", "data": "digits", "published": {"SGD": "1.23"}}
    few = {"label": "few", "data": "digits", "labels": 30, "seeds": 2}
    found = compared(tmp_path, data=[many, few], seeds=3)
    assert found.rows.data.value_counts().to_dict() == {"many": 6, "few": 4}
    assert "3 seeds of many and 2 seeds of few" in found.sheets[0].caption
    assert [row[-1].text for row in found.sheets[0].rows] == ["1.23", "—", "—", "—"]
    assert "on many" in found.text
    assert re.search(r"on few: [^;]*n = 2", found.text)


def test_a_variant_takes_the_rate_that_was_tuned_for_another(tmp_path):
    points = {"SGD": [{"lr": 1e-6}, {"lr": 0.05}], "SAM": [{"rho": 0.01}, {"rho": 0.02}]}
    variants = [
        {"label": "SGD", "points": points["SGD"]},
        {"label": "SAM", "method": "sam", "lr_of": "SGD", "points": points["SAM"]},
    ]
    found = compared(
        tmp_path, "fig4", base=DIGITS | {"num_train": 200, "epochs": 4}, variants=variants, seeds=1
    )
    assert set(found.rows.lr) == {0.05}
    _, tuning = found.sheets
    settings = ["lr = 1e-06", "lr = 0.05", "lr = 0.05, ρ = 0.01", "lr = 0.05, ρ = 0.02"]
    assert [row[2].text for row in tuning.rows] == settings


def test_one_data_set_only_can_be_replaced(tmp_path):
    task = Task("tab4", "paper", tmp_path, data="somewhere")
    with pytest.raises(UsageError, match=r"takes several data sets .*--only 'CIFAR-10'"):
        methods.study(task, **paper_recipe("tab4").at("paper"))


def test_one_data_set_can_be_chosen(tmp_path):
    arguments = ["tab1", "--scale", "smoke", "--out", str(tmp_path / "out"), "--json", "--only"]
    result = CliRunner().invoke(command, [*arguments, "fewer digits"])
    assert result.exception is None, result.output
    page = (tmp_path / "out" / "tab1.md").read_text()
    assert "--only 'fewer digits'`" in page
    assert "| digits |" not in page
    rows = csv.DictReader((tmp_path / "out" / "tab1.csv").read_text().splitlines())
    assert {row["data"] for row in rows} == {"fewer digits"}
    wrong = CliRunner().invoke(command, [*arguments, "digit"])
    assert str(wrong.exception) == "--only 'digit' is none of its data sets; did you mean 'digits'?"
    other = CliRunner().invoke(
        command, ["fig6", "--scale", "smoke", "--out", str(tmp_path / "x"), "--only", "y"]
    )
    assert "a single data set" in str(other.exception)


def test_a_folder_stands_for_all_rows_of_one_data_set(tmp_path):
    entry = paper_recipe("tab3").at("small")
    assert [place["labels"] for place in entry["data"]] == [250, 1000]
    task = Task("tab3", "small", tmp_path, data="somewhere")
    assert methods._chosen(task, entry["base"], entry["data"]) == entry["data"]
    assert task.place["data"] == "somewhere"


@pytest.mark.parametrize(("scale", "steps"), [("small", 16), ("paper", 352)])
def test_table_4_at_equal_cost_has_equal_gradient_evaluations(scale, steps):
    """Within an epoch, by rules that count their own passes; ``steps`` an epoch."""
    entry = paper_recipe("tab4-cost").at(scale)
    spent = {}
    for variant in entry["variants"]:
        config = configuration(entry["base"], variant)
        total = config.epochs * steps
        rule = make_rule(config, torch.nn.Linear(2, 2), torch.Generator(), total)
        spent[variant["label"]] = rule.cost(total) / 3 / steps
    full = spent.pop("K = 3, 2.5 × the cost")
    budget = 2 * entry["base"]["epochs"]
    assert full == pytest.approx(2.5 * budget)
    assert spent.pop("SGD, as many epochs") == pytest.approx(budget / 2)
    assert spent.pop("SGD, as few epochs as K = 1") == pytest.approx(budget / 3, rel=0.03)
    assert all(0.94 < value / budget < 1.06 for value in spent.values()), spent
