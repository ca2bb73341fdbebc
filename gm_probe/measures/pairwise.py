"""Measures of a training procedure from pairs of models over one set of unlabeled examples.

They are the disagreement (Jiang et al. 2022), and the inconsistency and instability of Johnson & Zhang (2023). All come
from outputs alone: no model is differentiated, none is compared with itself, and KL divergences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.errors import DataError, DivergedError, UsageError
from gm_probe.inconsistency.kl import kl_divergence
from gm_probe.measures.estimates import as_row

MODELS, SETS = "models", "training sets"
"""What a jackknife deletes one at a time."""
_CELLS = 2**20  # logits converted to float64 at a time, so that the KL's dozen temporaries stay below 100 MB


@dataclass(frozen=True, slots=True)
class PairEstimate:
    """One value over pairs.

    Attributes:
        value: mean over pairs and examples; None where it is undefined, and ``details['reason']`` says why.
        stderr: from a jackknife that deletes one model or one training set at a time, as ``details['stderr_over']``
            says; None where there are too few (``details['reason_stderr']``).
        stderr_examples: standard error from the examples being a sample of N, with the models held fixed.
        num_pairs: number of unordered pairs of models or, for the instability, of training sets.
        num_models: number of models in those pairs.
        num_training_sets: number of training sets in those pairs.
    """

    value: float | None
    stderr: float | None
    stderr_examples: float | None
    num_pairs: int
    num_models: int
    num_training_sets: int
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return as_row(self)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models at the positions ``a`` < ``b``; ``kl_ab`` is the mean KL(f_a ‖ f_b)."""

    a: int
    b: int
    disagreement: float
    kl_ab: float
    kl_ba: float
    same_training_set: bool


@dataclass(frozen=True, slots=True)
class PairReport:
    """What ``compare`` found: every pair, and the values by their names in ``PAIR_MEASURES``.

    ``num_classes`` is C, which is 2 where examples have several yes-or-no labels.
    """

    num_examples: int
    num_classes: int
    pairs: tuple[Pair, ...]
    rows: dict[str, PairEstimate]


def compare(
    logits: Tensor | Sequence[Tensor],
    training_sets: Sequence[Hashable],
    *,
    names: Sequence[str] | None = None,
    notify: Callable[[int], None] | None = None,
) -> PairReport:
    """Compare M models by their logits over the same N examples.

    ``disagreement`` counts all pairs of models. ``conditional_inconsistency`` C_θ is the mean of
    KL(f_θ ‖ f_θ'), in both directions, over pairs with the same training set Z (paper §4.4, App. B); its details have
    each set's own value. ``inconsistency`` C_P is the mean over sets of each set's value. ``instability`` S_P is the
    mean of KL(f̄_Z ‖ f̄_Z') over pairs of sets, where f̄_Z is the mean probability over the models of Z.

    The jackknife deletes what was drawn independently: models within their set for C_θ, and sets for C_P and S_P. For
    the disagreement it deletes sets where there are 3, otherwise models within them. It overestimates (up to √2, and
    more for a handful of models) where no model stands out from the others.

    Args:
        logits: (M, N, C), or M tensors (N, C), of any floating dtype; results are computed in float64. With L
            independent yes-or-no labels they are (M, N, L, 2): divergences are summed over an example's labels,
            disagreement is averaged, and every label has its own mean prediction.
        training_sets: M labels that name each model's training set.
        names: names of the models, for messages.
        notify: called with the number of pairs done so far.

    Raises:
        UsageError: there are fewer than two models, another number of labels, or one logit per example.
        DataError: outputs that differ in shape.
        DivergedError: outputs that are not finite.
    """
    models = [outputs.detach().to(logits[0].device) for outputs in logits]
    names = names or [f"model {index}" for index in range(len(models))]
    if len(models) < 2:
        raise UsageError(f"pairs need at least 2 models, got {len(models)}")
    if not len(models) == len(training_sets) == len(names):
        raise UsageError(
            f"{len(models)} models need as many labels and names, got {len(training_sets)} and {len(names)}"
        )
    for name, outputs in zip(names, models, strict=True):
        check_outputs(name, outputs, names[0], models[0])
    found = _Pairs(models, training_sets)
    for done, (a, b) in enumerate(combinations(range(len(models)), 2), 1):
        found.add(a, b)
        if notify is not None:
            notify(done)
    rows = {
        "disagreement": _disagreement(found),
        "conditional_inconsistency": _conditional_inconsistency(found),
        "inconsistency": _inconsistency(found),
        "instability": _instability(found),
    }
    return PairReport(len(models[0]), models[0].shape[-1], tuple(found.pairs), rows)


def check_outputs(name: str, outputs: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``outputs`` are finite logits (N, C) or (N, L, 2) with the shape of ``other``.

    Raises:
        UsageError: there is one logit per example.
        DataError: they have another shape, or no example.
        DivergedError: a value is not finite.
    """
    if outputs.dim() not in (2, 3) or outputs.numel() == 0:
        raise DataError(f"{name}: its outputs have shape {tuple(outputs.shape)}; they must be logits (N, C)")
    if outputs.shape[-1] == 1:
        raise UsageError(
            f"{name} has one logit per example, whose softmax is always 1. For a yes-or-no model with "
            "logits z (N, L), give torch.stack([torch.zeros_like(z), z], -1)"
        )
    if outputs.dim() == 3 and outputs.shape[1:] != other.shape[1:]:
        raise DataError(
            f"{name} has outputs of shape {tuple(outputs.shape)} but {other_name} of {tuple(other.shape)}; "
            "only models with the same labels can be compared"
        )
    if outputs.shape[1:] != other.shape[1:]:
        raise DataError(
            f"{name} has {outputs.shape[1]} classes but {other_name} has {other.shape[1]}; only models "
            "with the same classes can be compared"
        )
    if len(outputs) != len(other):
        raise DataError(
            f"{name} has outputs for {len(outputs)} examples but {other_name} for {len(other)}; "
            "all models need the same examples"
        )
    finite = torch.isfinite(outputs).flatten(1).all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise DivergedError(
            f"{name}: its output on example {row} is not finite. Check weights and normalisation"
        )


def _divergences(p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N,) KL(p ‖ q) and (N,) KL(q ‖ p), in float64."""
    rows = max(1, _CELLS // p_logits[0].numel())
    forth, back = [], []
    for p, q in zip(p_logits.split(rows), q_logits.split(rows), strict=True):
        p, q = p.double(), q.double()
        forth.append(kl_divergence(p, q))
        back.append(kl_divergence(q, p))
    return torch.cat(forth), torch.cat(back)


def _log_mean_prediction(models: Sequence[Tensor]) -> Tensor:
    """Return (N, ..., C) the logarithm of the models' mean probabilities, without underflow to 0."""
    logs = (functional.log_softmax(outputs.double(), dim=-1) for outputs in models)
    return reduce(torch.logaddexp, logs) - math.log(len(models))


class _Pairs:
    """All pairs of M models over N examples, and the sums over them from which the measures are made.

    Attributes:
        labels: the G training sets.
        groups: (M,) the index of each model's training set.
        sizes: (G,) number of models of each set.
        differ, kl: (M, M) the disagreement of each pair, and KL(f_a ‖ f_b); both have zeros on the diagonal.
        differ_terms: (N,) each example's disagreement, summed over pairs.
        within: (G, N) each example's symmetric KL, summed over the pairs of each set.
    """

    def __init__(self, models: Sequence[Tensor], training_sets: Sequence[Hashable]) -> None:
        count, examples, device = len(models), len(models[0]), models[0].device
        self.models, self.labels = models, list(dict.fromkeys(training_sets))
        self._sets = [self.labels.index(label) for label in training_sets]
        self.groups = torch.tensor(self._sets)
        self.sizes = self.groups.bincount()
        self.differ, self.kl = torch.zeros(2, count, count, dtype=torch.float64)
        self.differ_terms = torch.zeros(examples, dtype=torch.float64, device=device)
        self.within = torch.zeros(len(self.labels), examples, dtype=torch.float64, device=device)
        self.pairs: list[Pair] = []
        self._predictions = [outputs.argmax(-1) for outputs in models]

    def add(self, a: int, b: int) -> None:
        """Compare the models at ``a`` < ``b``."""
        one, other = self.models[a], self.models[b]
        apart = (self._predictions[a] != self._predictions[b]).double().view(len(one), -1).mean(1)
        forth, back = _divergences(one, other)
        same = self._sets[a] == self._sets[b]
        self.differ_terms += apart
        if same:
            self.within[self._sets[a]] += (forth + back) / 2
        self.kl[a, b], self.kl[b, a] = forth.mean(), back.mean()
        self.differ[a, b] = self.differ[b, a] = apart.mean()
        self.pairs.append(Pair(a, b, float(apart.mean()), float(self.kl[a, b]), float(self.kl[b, a]), same))


def _disagreement(found: _Pairs) -> PairEstimate:
    differ, groups = found.differ, found.groups
    pairs = _off_diagonal(len(differ))
    same = (groups[:, None] == groups[None, :]).double() * pairs
    details = {
        "same_training_set": _mean(differ, same),
        "different_training_sets": _mean(differ, pairs - same),
    }
    error, over = None, ""
    if (
        len(found.sizes) >= 3
    ):  # models of one set are not independent draws, so each set is deleted as a whole
        of_set = functional.one_hot(groups).double().T  # (G, M)
        error, over = _jackknife(of_set @ differ @ of_set.T, of_set @ pairs @ of_set.T), SETS
    elif int(found.sizes.min()) >= 3:
        error, over = _jackknife(differ, pairs, groups), MODELS
    lacking = "needs 3 models of every training set, or 3 training sets"
    counts = len(found.pairs), len(differ), len(found.sizes)
    return _estimate(found.differ_terms / len(found.pairs), error, over, lacking, details, counts)


def _conditional_inconsistency(found: _Pairs) -> PairEstimate:
    symmetric, sizes = (found.kl + found.kl.T) / 2, found.sizes.tolist()
    paired = [index for index, size in enumerate(sizes) if size > 1]
    if not paired:
        return _undefined("no training set has two models")
    rows: list[dict[str, Any]] = []
    variance, total = 0.0, sum(math.comb(sizes[index], 2) for index in paired)
    for index in paired:
        size, members = sizes[index], found.groups == index
        # two models make one pair, which has no spread
        error = _jackknife(symmetric[members][:, members], _off_diagonal(size)) if size > 2 else None
        value = float(found.within[index].mean()) / math.comb(size, 2)
        label = found.labels[index]
        rows.append({"training_set": label, "value": value, "stderr": error, "num_models": size})
        variance += math.nan if error is None else (math.comb(size, 2) / total * error) ** 2
    error = None if math.isnan(variance) else math.sqrt(variance)
    lacking = "a training set with only two models makes one pair, which has no spread"
    counts = total, sum(sizes[index] for index in paired), len(paired)
    details = {"by_training_set": rows}
    return _estimate(found.within.sum(0) / total, error, MODELS, lacking, details, counts)


def _inconsistency(found: _Pairs) -> PairEstimate:
    sizes, within = found.sizes, found.within
    paired = (sizes > 1).nonzero()[:, 0]
    if len(paired) == 0:
        return _undefined("no training set has two models")
    counts = sizes[paired] * (sizes[paired] - 1) // 2
    terms = within[paired.to(within.device)] / counts.to(within.device)[:, None]  # (G, N)
    error = None
    if len(paired) > 1:
        error = _jackknife(terms.mean(1).cpu().diag(), torch.eye(len(paired), dtype=torch.float64))
    lacking = (
        "a single training set has no spread over sets; conditional_inconsistency has the spread over "
        "its models"
    )
    numbers = int(counts.sum()), int(sizes[paired].sum()), len(paired)
    return _estimate(terms.mean(0), error, SETS, lacking, {}, numbers)


def _instability(found: _Pairs) -> PairEstimate:
    sizes = found.sizes.tolist()
    if len(sizes) < 2:
        return _undefined("all models have the same training set")
    means = [
        _log_mean_prediction([z for z, own in zip(found.models, found.groups, strict=True) if own == index])
        for index in range(len(sizes))
    ]
    matrix = torch.zeros(len(sizes), len(sizes), dtype=torch.float64)
    terms = torch.zeros(len(means[0]), dtype=torch.float64, device=means[0].device)
    for a, b in combinations(range(len(sizes)), 2):
        forth, back = _divergences(means[a], means[b])  # logarithms of probabilities are logits
        terms += (forth + back) / 2
        matrix[a, b] = matrix[b, a] = (forth.mean() + back.mean()) / 2
    error = _jackknife(matrix, _off_diagonal(len(sizes))) if len(sizes) > 2 else None
    lacking = "two training sets make one pair, which has no spread"
    count = math.comb(len(sizes), 2)
    details = {"models_per_training_set": sizes}
    return _estimate(terms / count, error, SETS, lacking, details, (count, len(found.models), len(sizes)))


def _off_diagonal(size: int) -> Tensor:
    """Return (size, size) ones with zeros on the diagonal."""
    return 1 - torch.eye(size, dtype=torch.float64)


def _mean(values: Tensor, counts: Tensor) -> float | None:
    return float((values * counts).sum() / counts.sum()) if bool(counts.any()) else None


def _undefined(reason: str) -> PairEstimate:
    return PairEstimate(None, None, None, 0, 0, 0, {"reason": reason})


def _estimate(
    terms: Tensor,
    error: float | None,
    over: str,
    lacking: str,
    details: Mapping[str, Any],
    counts: tuple[int, int, int],
) -> PairEstimate:
    """Return the mean of ``terms`` (N,), which are means over pairs, with its standard errors.

    Args:
        error: the standard error over models or sets, as ``over`` says; None where there is none, because it is
            ``lacking`` something.
        counts: of pairs, models and training sets.
    """
    found = dict(details) | ({"reason_stderr": lacking} if error is None else {"stderr_over": over})
    examples_error = float(terms.std()) / math.sqrt(len(terms)) if len(terms) > 1 else None
    if examples_error is None:
        found["reason_stderr_examples"] = "one example has no spread"
    return PairEstimate(float(terms.mean()), error, examples_error, *counts, found)


def _jackknife(sums: Tensor, counts: Tensor, strata: Tensor | None = None) -> float:
    """Return the delete-one standard error of Σ sums / Σ counts over U units, each drawn within its stratum.

    Args:
        sums, counts: (U, U), symmetric; deleting a unit deletes its row and column.
        strata: (U,) indices; None = one stratum.
    """
    left = _without_each(sums) / _without_each(counts)
    strata = torch.zeros(len(left), dtype=torch.int64) if strata is None else strata
    variance = 0.0
    for stratum in strata.unique():
        values = left[strata == stratum]
        variance += float(values.var()) * (len(values) - 1) ** 2 / len(values)
    return math.sqrt(variance)


def _without_each(table: Tensor) -> Tensor:
    """Return (U,) the sum of a symmetric ``table`` (U, U) without each unit's row and column."""
    return table.sum() - 2 * table.sum(1) + table.diagonal()
