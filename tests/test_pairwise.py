"""Disagreement, inconsistency and instability against plain numpy, by hand, and in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from gm_probe.errors import DataError, DivergedError, UsageError
from gm_probe.measures import pairwise
from gm_probe.measures.catalogue import PAIR_MEASURES
from gm_probe.measures.pairwise import PairReport, compare


def values(report: PairReport) -> list[float | None]:
    assert list(report.rows) == list(PAIR_MEASURES)
    return [row.value for row in report.rows.values()]


# ---- an oracle that shares nothing with the code: numpy, naive formulas, the full (M, M, N) table


class Oracle:
    """Figures of any subset of models, so that jackknives are done by doing everything again."""

    def __init__(self, logits: np.ndarray, sets: Sequence[str]) -> None:
        exp = np.exp(logits - logits.max(2, keepdims=True))
        self.p, self.sets = exp / exp.sum(2, keepdims=True), np.array(sets)

    @staticmethod
    def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p * (np.log(p) - np.log(q))).sum(1)

    def terms(self, name: str, keep: Sequence[int]) -> np.ndarray:
        """(N,) the figure's average over ordered pairs, for every example."""
        p, sets = self.p[list(keep)], self.sets[list(keep)]
        ordered = list(itertools.permutations(range(len(p)), 2))
        if name == "disagreement":
            return np.mean([p[a].argmax(1) != p[b].argmax(1) for a, b in ordered], 0)
        if name == "conditional_inconsistency":
            return np.mean([self.kl(p[a], p[b]) for a, b in ordered if sets[a] == sets[b]], 0)
        means = []
        for one in dict.fromkeys(sets):
            own = p[sets == one]
            if name == "instability":
                means.append(own.mean(0))
            elif len(own) > 1:
                means.append(np.mean([self.kl(a, b) for a, b in itertools.permutations(own, 2)], 0))
        if name == "inconsistency":
            return np.mean(means, 0)
        return np.mean([self.kl(a, b) for a, b in itertools.permutations(means, 2)], 0)

    def value(self, name: str, keep: Sequence[int] | None = None) -> float:
        return float(self.terms(name, range(len(self.p)) if keep is None else keep).mean())

    def delete_sets(self, name: str) -> float:
        sets = dict.fromkeys(self.sets)
        if name == "inconsistency":  # a set of one model does not enter
            sets = [one for one in sets if (self.sets == one).sum() > 1]
        left = [self.value(name, [i for i, own in enumerate(self.sets) if own != one]) for one in sets]
        return math.sqrt((len(left) - 1) / len(left) * np.square(left - np.mean(left)).sum())

    def delete_models(self, name: str) -> float:
        everyone, variance = range(len(self.p)), 0.0
        for one in dict.fromkeys(self.sets):
            left = [
                self.value(name, [j for j in everyone if j != i]) for i in everyone if self.sets[i] == one
            ]
            variance += (len(left) - 1) / len(left) * np.square(left - np.mean(left)).sum()
        return math.sqrt(variance)


@pytest.fixture
def logits() -> np.ndarray:
    return 2 * np.random.default_rng(0).normal(size=(10, 17, 4))


DESIGNS = {
    "one set": "aaaaaaaaaa",
    "two sets": "aaaabbbbbb",
    "three sets": "abbccaabcc",
    "one of a single model": "aaabbbbccd",
    "single models": "abcdefghij",
}


@pytest.mark.parametrize("sets", DESIGNS.values(), ids=DESIGNS)
@pytest.mark.parametrize("name", PAIR_MEASURES)
def test_values_and_errors_are_the_oracles(logits: np.ndarray, sets: str, name: str) -> None:
    oracle, report = Oracle(logits, list(sets)), compare(torch.from_numpy(logits), list(sets))
    row = report.rows[name]
    if (name == "instability" and len(set(sets)) == 1) or (
        "inconsistency" in name and len(set(sets)) == len(sets)
    ):
        assert (row.value, row.stderr, row.stderr_examples, row.num_pairs) == (None, None, None, 0)
        assert row.details["reason"]
        return
    terms = oracle.terms(name, range(10))
    assert row.value == pytest.approx(terms.mean(), rel=1e-12)
    assert row.stderr_examples == pytest.approx(terms.std(ddof=1) / math.sqrt(17), rel=1e-10)
    if row.stderr is None:
        assert row.details["reason_stderr"]
        assert "stderr_over" not in row.details
    elif row.details["stderr_over"] == "training sets":
        assert row.stderr == pytest.approx(oracle.delete_sets(name), rel=1e-9)
    elif name == "disagreement":
        assert row.stderr == pytest.approx(oracle.delete_models(name), rel=1e-9)
    else:  # sets are independent of each other, and weigh by their pairs
        total = 0.0
        for one in dict.fromkeys(sets):
            own = [i for i, label in enumerate(sets) if label == one]
            part = Oracle(logits[own], [one] * len(own))
            weight = len(own) * (len(own) - 1) / 2 / row.num_pairs
            total += (weight * part.delete_models(name)) ** 2
        assert row.stderr == pytest.approx(math.sqrt(total), rel=1e-9)


@pytest.mark.parametrize(
    ("sets", "over"),
    [
        ("aaa", ["models", "models", None, None]),
        ("aa", [None, None, None, None]),
        ("ab", [None, None, None, None]),
        ("aabb", [None, None, "training sets", None]),
        ("aaabbb", ["models", "models", "training sets", None]),
        ("aaabb", [None, None, "training sets", None]),
        ("aabbcc", ["training sets", None, "training sets", "training sets"]),
        ("abc", ["training sets", None, None, "training sets"]),
        ("aaabc", ["training sets", "models", None, "training sets"]),
    ],
)
def test_an_error_is_given_only_where_there_are_enough(
    logits: np.ndarray, sets: str, over: list[str | None]
) -> None:
    report = compare(torch.from_numpy(logits[: len(sets)]), list(sets))
    assert [row.details.get("stderr_over") for row in report.rows.values()] == over
    for row, unit in zip(report.rows.values(), over, strict=True):
        assert (row.stderr is None) == (unit is None)
        if unit is None:
            assert ("reason" in row.details) == (row.value is None)
            assert row.value is None or row.details["reason_stderr"]
        else:
            assert row.stderr is not None
            assert row.stderr > 0


def test_counts_of_pairs_models_and_sets(logits: np.ndarray) -> None:
    rows = compare(torch.from_numpy(logits), list("aaabbbbccd")).rows
    counts = {name: (row.num_pairs, row.num_models, row.num_training_sets) for name, row in rows.items()}
    assert counts == {
        "disagreement": (45, 10, 4),
        "conditional_inconsistency": (3 + 6 + 1, 9, 3),
        "inconsistency": (3 + 6 + 1, 9, 3),
        "instability": (6, 10, 4),
    }
    assert rows["instability"].details["models_per_training_set"] == [3, 4, 2, 1]


def test_pairs_and_details_are_the_oracles(logits: np.ndarray) -> None:
    sets = "aabbb"
    oracle, report = Oracle(logits[:5], list(sets)), compare(torch.from_numpy(logits[:5]), list(sets))
    assert [(pair.a, pair.b) for pair in report.pairs] == list(itertools.combinations(range(5), 2))
    for pair in report.pairs:
        p, q = oracle.p[pair.a], oracle.p[pair.b]
        assert pair.kl_ab == pytest.approx(oracle.kl(p, q).mean(), rel=1e-12)
        assert pair.kl_ba == pytest.approx(oracle.kl(q, p).mean(), rel=1e-12)
        assert pair.disagreement == np.mean(p.argmax(1) != q.argmax(1))
        assert pair.same_training_set == (sets[pair.a] == sets[pair.b])
    same = [pair.disagreement for pair in report.pairs if pair.same_training_set]
    other = [pair.disagreement for pair in report.pairs if not pair.same_training_set]
    details = report.rows["disagreement"].details
    assert details["same_training_set"] == pytest.approx(np.mean(same))
    assert details["different_training_sets"] == pytest.approx(np.mean(other))
    [first, second] = report.rows["conditional_inconsistency"].details["by_training_set"]
    for row, label, start, stop in ((first, "a", 0, 2), (second, "b", 2, 5)):
        part = Oracle(logits[start:stop], [label] * (stop - start))
        assert (row["training_set"], row["num_models"]) == (label, stop - start)
        assert row["value"] == pytest.approx(part.value("conditional_inconsistency"))
    assert first["stderr"] is None
    assert second["stderr"] == pytest.approx(part.delete_models("conditional_inconsistency"))


# ---- by hand


def test_a_case_by_hand() -> None:
    """Two examples, two classes; probabilities 1/2 or 1/4, 3/4, so that every KL is a short logarithm."""
    even, low, high = [0.0, 0.0], [0.0, math.log(3)], [math.log(3), 0.0]
    models = [torch.tensor(rows, dtype=torch.float64) for rows in ([low, low], [low, high], [even, high])]
    report = compare(models, ["Z", "Z", "Z'"])
    # KL((1/4, 3/4) ‖ (3/4, 1/4)) = ½ ln 3, either way
    # KL((1/2, 1/2) ‖ (1/4, 3/4)) = ½ ln(4/3), the other way ¾ ln 3 - ln 2
    apart, forth, back = math.log(3) / 2, math.log(4 / 3) / 2, 0.75 * math.log(3) - math.log(2)
    kls = [(pair.kl_ab, pair.kl_ba) for pair in report.pairs]
    expected = [(apart / 2, apart / 2), ((back + apart) / 2, (forth + apart) / 2), (back / 2, forth / 2)]
    for got, want in zip(kls, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-14)
    # argmax of a tie is the first class
    assert [pair.disagreement for pair in report.pairs] == [0.5, 1.0, 0.5]
    # the mean prediction of Z is (1/4, 3/4) on the first example and (1/2, 1/2) on the second
    stability = ((back + forth) / 2 + (forth + back) / 2) / 2
    assert values(report) == pytest.approx([2 / 3, apart / 2, apart / 2, stability], rel=1e-14)
    assert report.rows["disagreement"].stderr_examples == pytest.approx(0.0)
    assert report.rows["inconsistency"].stderr_examples == pytest.approx(apart / 2)


def test_identical_models_give_exactly_zero(logits: np.ndarray) -> None:
    one = torch.from_numpy(30 * logits[0])
    report = compare([one, one.clone(), one, one], ["a", "b", "a", "b"])
    assert values(report)[:3] == [0.0, 0.0, 0.0]
    assert values(report)[3] == 0.0
    assert all(pair.kl_ab == pair.kl_ba == 0 for pair in report.pairs)


def test_labels_may_be_anything_hashable(logits: np.ndarray) -> None:
    z = torch.from_numpy(logits[:4])
    assert values(compare(z, [1, "1", 1, "1"])) == values(compare(z, [("a", 0), None, ("a", 0), None]))


def test_extreme_outputs_stay_finite() -> None:
    sure = torch.tensor([[1000.0, 0.0, -1000.0]], dtype=torch.float64)
    report = compare([sure, sure.flip(1), sure, sure.flip(1)], list("abab"))
    assert values(report)[:3] == pytest.approx([4 / 6, 0, 0])
    # f̄_a puts exp(-2000) on the last class: as a probability it would be 0, and its logarithm -∞
    assert values(report)[3] == pytest.approx(2000.0)
    mixed = compare([sure, sure.flip(1), sure, sure], list("aabb"))
    assert values(mixed)[3] == pytest.approx((math.log(2) + (2000 - 2 * math.log(2)) / 2) / 2)


def test_float32_outputs_are_compared_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, 5, generator=generator)
    models = [base, base + 1e-2 * torch.randn(50, 5, generator=generator)]
    exact = Oracle(np.stack([outputs.double().numpy() for outputs in models]), ["a", "a"])
    row = compare(models, ["a", "a"]).rows["inconsistency"]
    assert row.value == pytest.approx(exact.value("inconsistency"), rel=1e-10, abs=0)  # float32: 1e-8 off


def test_rows_are_cut_into_pieces_without_a_trace(
    logits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = list("aaabbbbccd")
    whole = compare(torch.from_numpy(logits), sets)
    monkeypatch.setattr(pairwise, "_CELLS", 20)  # pieces of 5, 5, 5 and 2 examples
    assert compare(torch.from_numpy(logits), sets) == whole


def test_one_example_has_no_spread(logits: np.ndarray) -> None:
    row = compare(torch.from_numpy(logits[:3, :1]), ["a"] * 3).rows["inconsistency"]
    assert row.stderr_examples is None
    assert row.as_dict()["reason_stderr_examples"]
    assert row.value is not None


def test_outputs_that_autograd_follows_are_taken_as_they_are(logits: np.ndarray) -> None:
    z = torch.from_numpy(logits[:3])
    assert compare(z.clone().requires_grad_(), list("aab")) == compare(z, list("aab"))


def test_progress_is_told_pair_by_pair(logits: np.ndarray) -> None:
    seen: list[int] = []
    compare(torch.from_numpy(logits[:4]), ["a"] * 4, notify=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]


# ---- what the theory says


def test_conditional_inconsistency_is_sigma_squared_times_the_fisher_trace() -> None:
    """App. B for softmax regression z = xW: tr F = mean (1 - Σp²)‖x‖² and C_θ ≈ σ² tr F."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    center = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    p = (x @ center).softmax(1)
    trace = float(((1 - p.square().sum(1)) * x.square().sum(1)).mean())
    for sigma in (1e-5, 1e-2):
        drawn = torch.randn(60, 3, 4, generator=generator, dtype=torch.float64)
        row = compare(x @ (center + sigma * drawn), ["Z"] * 60).rows["conditional_inconsistency"]
        assert row.value is not None
        assert row.stderr is not None
        assert row.stderr < 0.1 * row.value
        assert abs(row.value - sigma**2 * trace) < 3 * row.stderr


def one_set(generator: torch.Generator) -> tuple[Tensor, list[int]]:
    return torch.randn(8, 6, 3, generator=generator, dtype=torch.float64), [0] * 8


def uneven(generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Models that keep more or less to one class: each has a disagreement with the others of its own."""
    z, sets = one_set(generator)
    scale = torch.randn(8, 1, 1, generator=generator, dtype=torch.float64).exp()
    return torch.tensor([2.0, 0.0, 0.0]) + scale * z, sets


def many_sets(generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Six sets whose centers differ as much as their three models do."""
    centers = torch.randn(6, 1, 6, 3, generator=generator, dtype=torch.float64)
    models = centers + torch.randn(6, 3, 6, 3, generator=generator, dtype=torch.float64)
    return models.flatten(0, 1), [index // 3 for index in range(18)]


def uneven_sets(generator: torch.Generator) -> tuple[Tensor, list[int]]:
    z, sets = many_sets(generator)
    scale = torch.randn(6, 1, 1, generator=generator, dtype=torch.float64).exp().repeat_interleave(3, dim=0)
    return torch.tensor([2.0, 0.0, 0.0]) + scale * z, sets


@pytest.mark.parametrize(
    ("draw", "most"),
    [
        (uneven, {"disagreement": 1.3, "conditional_inconsistency": 1.3}),
        (uneven_sets, {"disagreement": 1.3, "inconsistency": 1.3, "instability": 1.3}),
        # where no model stands out from the others, deleting one exaggerates: up to √2 · √(M/(M - 2)) in theory
        (one_set, {"disagreement": 1.9, "conditional_inconsistency": 1.9}),
        (many_sets, {"disagreement": 1.9, "inconsistency": 1.9, "instability": 1.9}),
    ],
)
def test_the_jackknife_tells_the_spread_over_repetitions(
    draw: Callable[[torch.Generator], tuple[Tensor, list[int]]], most: dict[str, float]
) -> None:
    generator = torch.Generator().manual_seed(3)
    reports = [compare(*draw(generator)).rows for _ in range(75)]  # they tell σ within 8 %
    for name, factor in most.items():
        found = torch.tensor([rows[name].value for rows in reports], dtype=torch.float64).std()
        errors = torch.tensor([rows[name].stderr for rows in reports], dtype=torch.float64)
        assert 0.8 < float(errors.square().mean().sqrt() / found) < factor, name


# ---- what is refused


@pytest.mark.parametrize(
    ("count", "labels", "message"),
    [(1, 1, "pairs need at least 2 models, got 1"), (0, 0, "got 0"), (3, 2, "3 models need as many labels")],
)
def test_too_few(logits: np.ndarray, count: int, labels: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(torch.from_numpy(logits[:count]), ["a"] * labels)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((17, 5), r"b\.pt has 5 classes but a\.pt has 4"),
        ((16, 4), r"b\.pt has outputs for 16 examples but a\.pt for 17"),
        ((17,), r"b\.pt: its outputs have shape \(17,\)"),
        ((0, 4), r"b\.pt: its outputs have shape \(0, 4\)"),
    ],
)
def test_shapes_that_differ_are_named(logits: np.ndarray, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare([torch.from_numpy(logits[0]), torch.zeros(shape)], ["Z", "Z"], names=["a.pt", "b.pt"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_named(logits: np.ndarray, bad: float) -> None:
    logits[1, 3, 2] = bad
    with pytest.raises(DivergedError, match="model 1: its output on example 3 is not finite"):
        compare(torch.from_numpy(logits), ["a"] * 10)
