"""What pairs of models say of a training procedure, over one set of unlabeled examples.

Disagreement (Jiang et al. 2022), and the inconsistency and instability of Johnson & Zhang (2023). All of it comes
from outputs alone: no model is differentiated, none is compared with itself, and KL divergences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.errors import DataError, DivergedError, UsageError
from gm_probe.inconsistency.kl import kl_divergence
from gm_probe.measures.context import as_row

PAIR_MEASURES = {
    "disagreement": ("D", "fraction of examples on which two models predict different classes"),
    "conditional_inconsistency": (
        "C_θ",
        "KL between two models trained on the same set: mean over such pairs",
    ),
    "inconsistency": ("C_P", "the same within each training set, then averaged over the sets"),
    "instability": ("S_P", "KL between the mean predictions of two training sets: mean over pairs of sets"),
}
"""Name: symbol and definition."""
MODELS, SETS = "models", "training sets"
"""What a jackknife deletes one at a time."""
_CELLS = 2**20  # logits converted to float64 at a time: the KL's dozen temporaries stay below 100 MB


@dataclass(frozen=True, slots=True)
class PairEstimate:
    """One value over pairs.

    Attributes:
        value: mean over pairs and examples; None where it is undefined, and ``details['reason']`` says why.
        stderr: by a jackknife that deletes one model or one training set at a time, as
            ``details['stderr_over']`` says; None where there are too few (``details['reason_stderr']``).
        stderr_examples: standard error from the examples being a sample of N, models held fixed.
        num_pairs: unordered pairs averaged over: of models, for the instability of training sets.
        num_models: how many models are in those pairs.
        num_training_sets: how many training sets are.
    """

    value: float | None
    stderr: float | None
    stderr_examples: float | None
    num_pairs: int
    num_models: int
    num_training_sets: int
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return as_row(self)


@dataclass(frozen=True, slots=True)
class Pair:
    """Models ``a`` < ``b`` by position; ``kl_ab`` is mean KL(f_a ‖ f_b)."""

    a: int
    b: int
    disagreement: float
    kl_ab: float
    kl_ba: float
    same_training_set: bool


@dataclass(frozen=True, slots=True)
class PairReport:
    """What ``compare`` found: every pair, and the values by their names in ``PAIR_MEASURES``.

    ``num_classes`` is C: of each of several yes-or-no labels, 2.
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
    KL(f_θ ‖ f_θ'), both directions, over pairs with the same training set Z (paper §4.4, App. B; each set's own
    value is in its details). ``inconsistency`` C_P is the mean over sets of each set's value, and
    ``instability`` S_P the mean of KL(f̄_Z ‖ f̄_Z') over pairs of sets, f̄_Z being the mean of the probabilities
    that the models of Z give.

    A jackknife deletes what was drawn independently: models within their set for C_θ, sets for C_P and S_P; for
    the disagreement sets where there are 3, or else models within them. It exaggerates (up to √2, and more for
    a handful) where no model stands out from the others.

    Args:
        logits: (M, N, C), or M tensors (N, C), of any floating dtype; results are computed in float64. Of L
            independent yes-or-no labels (M, N, L, 2): divergences are summed over an example's labels, disagreement is
            averaged, and the mean prediction is each label's.
        training_sets: M labels that name each model's training set.
        names: of the models, for messages.
        notify: called with the pairs done so far.

    Raises:
        UsageError: fewer than two models, another number of labels, or one logit an example.
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

    labels = {label: index for index, label in enumerate(dict.fromkeys(training_sets))}
    indices = [labels[label] for label in training_sets]
    groups = torch.tensor(indices)
    num_examples, num_classes = len(models[0]), models[0].shape[-1]
    device = models[0].device
    predictions = [outputs.argmax(-1) for outputs in models]
    kl, differ = torch.zeros(2, len(models), len(models), dtype=torch.float64)
    differ_terms = torch.zeros(num_examples, dtype=torch.float64, device=device)
    within = torch.zeros(len(labels), num_examples, dtype=torch.float64, device=device)
    pairs: list[Pair] = []
    for a in range(len(models)):
        for b in range(a + 1, len(models)):
            apart = (predictions[a] != predictions[b]).double().view(num_examples, -1).mean(1)
            forth, back = _divergences(models[a], models[b])
            differ_terms += apart
            same = indices[a] == indices[b]
            if same:
                within[indices[a]] += (forth + back) / 2
            kl[a, b], kl[b, a] = forth.mean(), back.mean()
            differ[a, b] = differ[b, a] = apart.mean()
            pairs.append(Pair(a, b, float(differ[a, b]), float(kl[a, b]), float(kl[b, a]), same))
            if notify is not None:
                notify(len(pairs))
    symmetric = (kl + kl.T) / 2
    rows = {
        "disagreement": _disagreement(differ, differ_terms / len(pairs), groups),
        "conditional_inconsistency": _conditional_inconsistency(symmetric, within, groups, list(labels)),
        "inconsistency": _inconsistency(within, groups),
        "instability": _instability(models, groups),
    }
    return PairReport(num_examples, num_classes, tuple(pairs), rows)


def check_outputs(name: str, outputs: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``outputs`` are finite logits (N, C) or (N, L, 2) of the shape of ``other``'s.

    Raises:
        UsageError: one logit an example.
        DataError: another shape, or no example.
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
    """(N,) KL(p ‖ q) and (N,) KL(q ‖ p), in float64."""
    rows = max(1, _CELLS // p_logits[0].numel())
    parts = [
        (p.double(), q.double()) for p, q in zip(p_logits.split(rows), q_logits.split(rows), strict=True)
    ]
    return torch.cat([kl_divergence(p, q) for p, q in parts]), torch.cat(
        [kl_divergence(q, p) for p, q in parts]
    )


def _log_mean_prediction(models: Sequence[Tensor]) -> Tensor:
    """(N, ..., C) logarithm of the mean of the models' probabilities, never by way of a probability that is 0."""
    logs = (functional.log_softmax(outputs.double(), dim=-1) for outputs in models)
    return reduce(torch.logaddexp, logs) - math.log(len(models))


def _disagreement(differ: Tensor, terms: Tensor, groups: Tensor) -> PairEstimate:
    """``differ`` (M, M) with zeros on its diagonal, ``terms`` (N,) averaged over pairs, ``groups`` (M,)."""
    sizes = groups.bincount()
    pairs = 1 - torch.eye(len(differ), dtype=torch.float64)
    same = (groups[:, None] == groups[None, :]).double() * pairs
    details: dict[str, Any] = {
        "same_training_set": _mean(differ, same),
        "different_training_sets": _mean(differ, pairs - same),
    }
    error: float | None = None
    if len(sizes) >= 3:  # models of one set are no independent draws: each set goes as a whole
        of_set = functional.one_hot(groups).double().T  # (G, M)
        error = _jackknife(of_set @ differ @ of_set.T, of_set @ pairs @ of_set.T)
        details["stderr_over"] = SETS
    elif int(sizes.min()) >= 3:
        error = _jackknife(differ, pairs, groups)
        details["stderr_over"] = MODELS
    else:
        details["reason_stderr"] = "needs 3 models of every training set, or 3 training sets"
    return _estimate(terms, error, details, int(pairs.sum()) // 2, len(differ), len(sizes))


def _conditional_inconsistency(
    symmetric: Tensor, within: Tensor, groups: Tensor, labels: Sequence[Hashable]
) -> PairEstimate:
    """``symmetric`` (M, M), ``within`` (G, N) sums over each set's pairs, ``groups`` (M,), ``labels`` G."""
    sizes = groups.bincount()
    paired = [index for index, size in enumerate(sizes.tolist()) if size > 1]
    if not paired:
        return _undefined("no training set has two models")
    rows: list[dict[str, Any]] = []
    variance, total = 0.0, sum(_pairs(int(sizes[index])) for index in paired)
    for index in paired:
        size = int(sizes[index])
        members = groups == index
        own = symmetric[members][:, members]
        # two models make one pair: there is nothing to tell their spread from
        error = _jackknife(own, 1 - torch.eye(size, dtype=torch.float64)) if size > 2 else None
        value = float(within[index].mean()) / _pairs(size)
        rows.append({"training_set": labels[index], "value": value, "stderr": error, "num_models": size})
        variance += math.nan if error is None else (_pairs(size) / total * error) ** 2
    details: dict[str, Any] = {"by_training_set": rows}
    if math.isnan(variance):
        details["reason_stderr"] = "a training set with only two models makes one pair, which has no spread"
    else:
        details["stderr_over"] = MODELS
    error = None if math.isnan(variance) else math.sqrt(variance)
    return _estimate(within.sum(0) / total, error, details, total, int(sizes[paired].sum()), len(paired))


def _inconsistency(within: Tensor, groups: Tensor) -> PairEstimate:
    """``within`` (G, N) sums over each set's pairs, ``groups`` (M,)."""
    sizes = groups.bincount()
    paired = (sizes > 1).nonzero()[:, 0]
    if len(paired) == 0:
        return _undefined("no training set has two models")
    counts = sizes[paired] * (sizes[paired] - 1) // 2
    terms = within[paired.to(within.device)] / counts.to(within.device)[:, None]  # (G, N)
    error, details = None, {}
    if len(paired) > 1:
        error = _jackknife(terms.mean(1).cpu().diag(), torch.eye(len(paired), dtype=torch.float64))
        details["stderr_over"] = SETS
    else:
        details["reason_stderr"] = (
            "a single training set has no spread over sets; conditional_inconsistency has the spread over "
            "its models"
        )
    return _estimate(terms.mean(0), error, details, int(counts.sum()), int(sizes[paired].sum()), len(paired))


def _instability(models: Sequence[Tensor], groups: Tensor) -> PairEstimate:
    """``models`` M of (N, C), ``groups`` (M,)."""
    sizes = groups.bincount().tolist()
    details: dict[str, Any] = {"models_per_training_set": sizes}
    if len(sizes) < 2:
        return _undefined("all models have the same training set")
    means = [
        _log_mean_prediction([outputs for outputs, own in zip(models, groups, strict=True) if own == index])
        for index in range(len(sizes))
    ]
    matrix = torch.zeros(len(sizes), len(sizes), dtype=torch.float64)
    terms = torch.zeros(len(means[0]), dtype=torch.float64, device=means[0].device)
    for a in range(len(sizes)):
        for b in range(a + 1, len(sizes)):
            forth, back = _divergences(means[a], means[b])  # logarithms of probabilities are logits
            terms += (forth + back) / 2
            matrix[a, b] = matrix[b, a] = (forth.mean() + back.mean()) / 2
    error = None
    if len(sizes) > 2:
        error = _jackknife(matrix, 1 - torch.eye(len(sizes), dtype=torch.float64))
        details["stderr_over"] = SETS
    else:
        details["reason_stderr"] = "two training sets make one pair, which has no spread"
    count = _pairs(len(sizes))
    return _estimate(terms / count, error, details, count, len(models), len(sizes))


def _pairs(count: int) -> int:
    return count * (count - 1) // 2


def _mean(values: Tensor, counts: Tensor) -> float | None:
    return float((values * counts).sum() / counts.sum()) if bool(counts.any()) else None


def _undefined(reason: str) -> PairEstimate:
    return PairEstimate(None, None, None, 0, 0, 0, {"reason": reason})


def _estimate(
    terms: Tensor,
    error: float | None,
    details: dict[str, Any],
    num_pairs: int,
    num_models: int,
    num_sets: int,
) -> PairEstimate:
    """The mean of ``terms`` (N,), which are averaged over pairs, and the error from N."""
    examples_error = float(terms.std()) / math.sqrt(len(terms)) if len(terms) > 1 else None
    if examples_error is None:
        details = {**details, "reason_stderr_examples": "one example has no spread"}
    return PairEstimate(float(terms.mean()), error, examples_error, num_pairs, num_models, num_sets, details)


def _jackknife(sums: Tensor, counts: Tensor, strata: Tensor | None = None) -> float:
    """Delete-one standard error of Σ sums / Σ counts over U units, each drawn within its stratum.

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
    """(U,) the sum of a symmetric ``table`` (U, U) without each unit's row and column."""
    return table.sum() - 2 * table.sum(1) + table.diagonal()
