"""Measures over NT-Xent logits against explicit Jacobians and Hessians of a tiny encoder, batch by batch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import seeded
from test_training_loop import config
from torch import Tensor
from torch.func import functional_call, hessian, jacrev

from gm_probe.cli import main
from gm_probe.data.batches import Batches
from gm_probe.data.examples import Examples
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError, UsageError
from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.measuring.checkpoint import measure_checkpoint
from gm_probe.models.contrastive import Contrastive
from gm_probe.models.parameters import Parameters
from gm_probe.models.zoo import ModelSpec, initial_model
from gm_probe.sweep.manifest import write_sweep
from gm_probe.sweep.recipe import parse_recipe
from gm_probe.sweep.runner import run_recipe
from gm_probe.sweep.status import sweep_status
from gm_probe.training.contrastive_batches import contrastive_batches
from gm_probe.training.loop import train

SPEC = ModelSpec("mlp-3", (1, 3, 3), 2, 0.4)
IMAGES, BATCH = 13, 4


def images(count: int = IMAGES) -> Examples:
    x = torch.randint(0, 256, (count, 1, 3, 3), generator=seeded(0), dtype=torch.uint8)
    return Examples(x, None, (), "made up")


def tiny() -> Contrastive:
    model = initial_model(SPEC, 1).double().eval()
    assert isinstance(model, Contrastive)
    with torch.no_grad():  # away from the origin, where all outputs point one way
        for p in model.parameters():
            p.mul_(2)
    return model


def batches() -> Batches:
    normalization = Normalization((0.5,), (0.3,))
    return contrastive_batches(images(), normalization, images=BATCH, seed=7, dtype=torch.float64)


class Brute:
    """Everything written out: similarities as a matrix whose diagonal is masked, one batch after another."""

    def __init__(self, model: Contrastive) -> None:
        self.model, self.parameters = model, Parameters(model)
        self.theta = self.parameters.join(p.detach() for p in model.parameters())
        self.views = [batch.x for batch in batches()]

    def log_p(self, flat: Tensor, x: Tensor) -> Tensor:
        """(2B, 2B) log-probabilities, -∞ on the diagonal."""
        values = self.parameters.split(flat)
        encoder = {n.removeprefix("encoder."): v for n, v in values.items() if n.startswith("encoder.")}
        head = {n.removeprefix("head."): v for n, v in values.items() if n.startswith("head.")}
        z = functional_call(self.model.head, head, functional_call(self.model.encoder, encoder, x))
        z = z / z.norm(dim=1, keepdim=True)
        return (z @ z.T / 0.4).masked_fill(torch.eye(len(x), dtype=torch.bool), -math.inf).log_softmax(1)

    def loss(self, flat: Tensor, x: Tensor) -> Tensor:
        n = len(x)
        return -torch.stack([self.log_p(flat, x)[i, (i + n // 2) % n] for i in range(n)]).mean()

    def kl(self, flat: Tensor, moved: Tensor, x: Tensor) -> Tensor:
        p, q = self.log_p(flat, x), self.log_p(moved, x)
        off = ~torch.eye(len(x), dtype=torch.bool)
        return (p.exp()[off] * (p[off] - q[off])).sum() / len(x)

    def fisher(self, x: Tensor) -> Tensor:
        """(P, P): (1/n) Σ_rows Σ_c p_c ∇log p_c ∇log p_cᵀ."""
        n = len(x)
        off = ~torch.eye(n, dtype=torch.bool)
        slopes = jacrev(lambda flat: self.log_p(flat, x)[off])(self.theta)
        p = self.log_p(self.theta, x).exp()[off]
        return slopes.T @ (p[:, None] * slopes) / n

    def mean(self, function: Any) -> Tensor:
        return torch.stack([function(x) for x in self.views]).mean(0)


def test_the_matrices_are_those_of_explicit_jacobians() -> None:
    model = tiny()
    brute = Brute(model)
    assert len(brute.views) == 3  # of 13 images 12 fill batches of 4
    names = ["fisher_lambda_max", "fisher_trace", "hessian_lambda_max", "hessian_lambda_min", "hessian_trace"]
    names += ["cross_entropy", "effective_rank", "local_inconsistency"]
    settings = Settings(
        rho=1e-4, noise_scale=1e-4, k_steps=60, num_starts=2, max_probes=100, eigen_tolerance=1e-6
    )
    report = measure(model, batches(), names, settings)
    rows = report.rows
    each = torch.stack([brute.fisher(x) for x in brute.views])
    fisher = each.mean(0)
    curvature = brute.mean(lambda x: hessian(lambda flat: brute.loss(flat, x))(brute.theta))
    top = float(torch.linalg.eigvalsh(fisher)[-1])
    spectrum = torch.linalg.eigvalsh(curvature)
    assert rows["fisher_lambda_max"].value == pytest.approx(top, rel=1e-5)
    assert rows["hessian_lambda_max"].value == pytest.approx(float(spectrum[-1]), rel=1e-4)
    assert rows["hessian_lambda_min"].value == pytest.approx(float(spectrum[0]), rel=1e-4)
    assert rows["hessian_trace"].details["labels"] == "partner"
    for name, matrix in (("fisher_trace", fisher), ("hessian_trace", curvature)):
        row = rows[name]
        assert row.stderr is not None
        assert abs(row.value - float(matrix.trace())) < 4 * row.stderr
        # Hutchinson's own: of one vector at most √2 ‖A‖_F, here less a margin for chance
        assert row.stderr < 1.3 * (2 / row.details["num_probes"]) ** 0.5 * float(matrix.norm())
    assert rows["cross_entropy"].value == pytest.approx(
        float(brute.mean(lambda x: brute.loss(brute.theta, x)))
    )
    assert rows["effective_rank"].value == pytest.approx(float(fisher.trace()) / top, rel=0.2)
    # Algorithm 1 on a quadratic is power iteration: ½ρ²λ_max, which shares no code with Lanczos
    assert rows["local_inconsistency"].value == pytest.approx(0.5e-8 * top, rel=0.01)
    # standard errors are over the batches
    vectors = torch.linalg.eigh(fisher).eigenvectors[:, -1]
    spread = (vectors @ each @ vectors).std() / 3**0.5
    assert rows["fisher_lambda_max"].stderr_examples == pytest.approx(float(spread), rel=1e-3)


def test_the_divergence_is_that_of_moved_encoders() -> None:
    """At a radius far beyond the quadratic: mean over batches of the KL at Algorithm 1's δ, by finite differences."""
    model = tiny()
    brute = Brute(model)
    row = measure(model, batches(), ["local_inconsistency"], Settings(rho=0.5, num_starts=1, seed=3)).rows
    from gm_probe.linalg.work import Work
    from gm_probe.measures.context import MeasurementContext

    [start] = MeasurementContext(model, batches(), Settings(num_starts=1, seed=3), Work(24)).starts()

    def kl(delta: Tensor) -> Tensor:
        return brute.mean(lambda x: brute.kl(brute.theta, brute.theta + delta, x))

    eps = 1e-6
    moves = eps * torch.eye(len(start), dtype=torch.float64)
    slope = torch.stack([(kl(start + e) - kl(start - e)) / (2 * eps) for e in moves])
    expected = kl(0.5 * slope / slope.norm())
    assert float(expected) > 1e-3
    assert row["local_inconsistency"].value == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", [name for name, each in MEASURES.items() if each.independent])
def test_measures_of_single_examples_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="NT-Xent"):
        measure(tiny(), batches(), [name])


def test_a_batch_is_neither_cut_nor_shared() -> None:
    with pytest.raises(UsageError, match="depend on each other"):
        batches().of_size(4)
    shares = [batches().shard(rank, 2) for rank in range(2)]
    assert [share.first for share in shares] == [0, 2 * BATCH]
    assert [len(share) for share in shares] == [1, 2]
    assert torch.equal(torch.cat([share.examples.x for share in shares]), batches().examples.x)
    with pytest.raises(DataError, match="3 batches are too few for 4 processes"):
        batches().shard(0, 4)
    with pytest.raises(DataError, match="do not fill"):
        Batches(images(), batch_size=4, batch_dependent=True)
    with pytest.raises(DataError, match="too few for a batch of 14"):
        contrastive_batches(images(), Normalization(), images=14, seed=0)


# a run, and the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "simclr"
    train(config(objective="simclr", batch_size=32, epochs=1, temperature=0.3, track_every=1), out)
    return out


@dataclass
class Result:
    exit_code: int
    stdout: str
    stderr: str


Invoke = Callable[..., Result]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        code = 0
        try:
            main([*map(str, arguments), "--device", "cpu"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return call


def test_measures_a_run(run: Path, invoke: Invoke) -> None:
    result = invoke("measure", run, "--head", "simclr", "--batch-size", 16, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    [found] = json.loads(result.stdout)
    settings = found["settings"]
    assert settings["head"] == "simclr"
    assert settings["temperature"] == 0.3
    assert (settings["batch_images"], settings["num_images"], settings["num_examples"]) == (16, 48, 60)
    assert found["num_examples"] == 96
    assert "view" in settings["per_example"]
    assert list(found["measures"]) == [
        "local_inconsistency",
        "fisher_lambda_max",
        "fisher_trace",
        "hessian_lambda_max",
        "hessian_trace",
        "cross_entropy",
    ]
    assert all(row["value"] is not None for row in found["measures"].values())


def test_tracking_and_measuring_see_the_same_views(run: Path) -> None:
    from gm_probe.runs.records import read_metrics
    from gm_probe.training.run_splits import own_unlabeled

    [row] = read_metrics(run)
    found = measure_checkpoint(
        run,
        own_unlabeled(run),
        ["local_inconsistency"],
        Settings(rho=0.1, noise_scale=0.1),
        head="simclr",
        batch_size=32,
    )
    assert found["measures"]["local_inconsistency"]["value"] == pytest.approx(
        row["local_inconsistency"], rel=1e-4
    )


def test_the_temperature_can_be_another(run: Path, invoke: Invoke) -> None:
    values = {}
    for temperature in (0.3, 3.0):
        options = ("--head", "simclr", "--temperature", temperature, "--batch-size", 16, "--json", "-q")
        result = invoke("measure", run, *options, "--measures", "mean_entropy")
        [found] = json.loads(result.stdout)
        values[found["settings"]["temperature"]] = found["measures"]["mean_entropy"]["value"]
    assert values[0.3] < values[3.0] < math.log(31)


def test_the_table_says_what_it_depends_on(run: Path, invoke: Invoke) -> None:
    result = invoke(
        *(
            "measure",
            run,
            "--head",
            "simclr",
            "--batch-size",
            16,
            "--measures",
            "mean_entropy",
            "--device",
            "cpu",
        )
    )
    text = " ".join(result.stdout.split())
    assert "NT-Xent logits, τ = 0.3, of 48 of 60 images in batches of 16" in text
    assert "over batches" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--head simclr"),
        (("--head", "simclr", "--labeled", "digits"), "reads no labels"),
        (("--head", "simclr", "--temperature", 0), "temperature"),
        (("--head", "simclr", "--measures", "error"), "counts classes"),
        (("--head", "simclr", "--batch-size", 100), "batch of 100"),
    ],
)
def test_refusals(run: Path, options: tuple[object, ...], says: str, invoke: Invoke) -> None:
    result = invoke("measure", run, *options)
    assert result.exit_code in {2, 4}
    assert says in result.stderr


def test_a_classifier_has_no_projector(tmp_path: Path, invoke: Invoke) -> None:
    train(config(epochs=1), tmp_path / "run")
    for options, says in ((("--head", "simclr"), "classifier"), (("--temperature", 1), "--head simclr")):
        result = invoke("measure", tmp_path / "run", *options)
        assert result.exit_code == 2
        assert says in result.stderr


def test_saved_measures_are_known_by_temperature_and_batch(run: Path, invoke: Invoke) -> None:
    """The second time nothing is measured again; at another temperature, all is."""
    options = ("--head", "simclr", "--batch-size", 16, "--measures", "mean_entropy", "--save", "--json", "-q")

    def saved(*more: object) -> Any:
        result = invoke("measure", run.parent, *options, *more)
        assert result.exit_code == 0, result.stderr
        [found] = json.loads(result.stdout)
        return found["measures"]["mean_entropy"]["value"], (run / "measures.json").stat().st_mtime_ns

    first, written = saved()
    assert saved() == (first, written)
    other, rewritten = saved("--temperature", 3)
    assert other > first
    assert rewritten > written


def test_a_sweep_measures_again_at_another_batch_size(tmp_path: Path) -> None:
    """Of a classifier the batch size is memory and speed; of NT-Xent logits it is the measure."""
    settings = {"data": "digits", "model": "mlp-4", "num_train": 64, "epochs": 1, "device": "cpu"}

    def sweep(size: int, **base: Any) -> list[str]:
        plan = {"measures": ["mean_entropy"], "batch_size": size, "max_examples": 64}
        recipe = parse_recipe({"base": {**settings, **base}, "measure": plan})
        out = tmp_path / str(base.get("objective"))
        write_sweep(recipe, out)
        before = sweep_status(out).counts.get("finished", 0)
        return [outcome.status for outcome in run_recipe(recipe, out)] + [f"{before} before"]

    encoder = {"objective": "simclr", "batch_size": 32}
    assert sweep(16, **encoder) == ["finished", "0 before"]
    assert sweep(16, **encoder) == ["skipped", "1 before"]
    assert sweep(32, **encoder) == ["finished", "0 before"]
    assert sweep(16) == ["finished", "0 before"]
    assert sweep(32) == ["skipped", "1 before"]


def test_images_of_one_class_are_not_compared_among_themselves_alone() -> None:
    """A folder's images lie class by class; a batch of them holds all classes, as in training."""
    shades = (
        torch.arange(4).repeat_interleave(32).mul(60)
    )  # four classes, each of one shade: no view changes that
    x = shades.to(torch.uint8)[:, None, None, None].expand(-1, 1, 3, 3).contiguous()
    dealt = contrastive_batches(Examples(x, None, (), "made up"), Normalization(), images=32, seed=0)
    again = contrastive_batches(Examples(x, None, (), "made up"), Normalization(), images=32, seed=0)
    other = contrastive_batches(Examples(x, None, (), "made up"), Normalization(), images=32, seed=1)
    assert torch.equal(dealt.examples.x, again.examples.x)
    assert not torch.equal(dealt.examples.x, other.examples.x)
    firsts = [batch.x[:32].mean((1, 2, 3)) for batch in dealt]
    dark = [int((first < 0.05).sum()) for first in firsts]  # of shade 0, black in any view
    assert sum(dark) == 32
    assert max(dark) < 20
