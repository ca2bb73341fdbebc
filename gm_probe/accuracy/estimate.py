"""The public entry: models and data in, a ranked report with intervals and one conclusion out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gm_probe.accuracy.evidence import Evidence, gather
from gm_probe.accuracy.report import MIRRORED, EstimateReport
from gm_probe.accuracy.sets import examine
from gm_probe.accuracy.verdict import EstimateRequest, judge
from gm_probe.data.batches import Batches
from gm_probe.data.collecting import Data, as_batches
from gm_probe.errors import UsageError, one_device
from gm_probe.measures.measure import measure
from gm_probe.measures.names import check_names, expanded
from gm_probe.measures.settings import Settings
from gm_probe.models.door import Outputs
from gm_probe.models.layout import in_layout_taken
from gm_probe.models.parameters import Parameters


@one_device()
@torch.inference_mode(False)
def estimate(
    models: nn.Module | Mapping[str, nn.Module] | Sequence[nn.Module],
    unlabeled: Data,
    *,
    validation: Data | None = None,
    few_labels: Data | None = None,
    class_shares: str | Tensor | Sequence[float] = "auto",
    measures: Sequence[str] = (),
    level: float = 0.9,
    outputs: Outputs | None = None,
    settings: Settings | None = None,
    notify: Callable[[str, int], None] | None = None,
) -> EstimateReport:
    """Estimate how accurate ``models`` are on ``unlabeled`` data, and rank them.

    Without labels no accuracy is claimed, only an order. With a labeled ``validation`` set of the training distribution
    each estimate has an interval, learned on synthetic shifts of it (images in [0, 1] alone; of other data on random
    halves of it). With ``few_labels``, a labeled random sample of the unlabeled data, the interval is a confidence
    interval that needs no assumption on the shift.

    Args:
        models: one, several, or several by name.
        unlabeled: the data in question, in any form that ``measure`` takes. Images keep their pixels as ``Batches`` of
            ``Examples`` with a ``Normalization``.
        validation: a labeled set of the training distribution, in such a form.
        few_labels: a labeled random sample of the unlabeled data, in such a form.
        class_shares: of the unlabeled data: ``validation`` (those of the validation set), ``uniform``, ``estimated``
            (by EM), or K numbers. ``auto`` tests whether they changed, and shows both readings where it cannot tell.
        measures: names of ``MEASURES`` or of their groups, to add to each row.
        level: of every interval.
        settings: of the measures, and the seed of every random draw.
        notify: called with a model's name and the number of examples that it has done.

    Raises:
        UsageError, DataError: sets that do not fit each other or the models, or options that cannot be used.
        CheckpointError, DivergedError: weights or outputs that are not finite.
    """
    settings = settings or Settings()
    named = _named(models)
    request = EstimateRequest.of(class_shares, level, settings.seed)
    names = expanded(measures, labeled=False, validation=validation is not None)
    check_names([name for name in names if name != MIRRORED], labeled=False)
    sets = [None if data is None else as_batches(data) for data in (unlabeled, validation, few_labels)]
    notes = examine(*(None if one is None else one.examples for one in sets))
    evidence: list[Evidence] = []
    rows: dict[str, dict[str, Any]] = {}
    for name, model in named.items():
        own = [None if one is None else _fitted(model, one) for one in sets]
        tick = None if notify is None else partial(notify, name)
        found, rows[name] = of_model(name, model, own, names, settings, outputs, tick)
        evidence.append(found)
    return judge(evidence, request, rows, notes)


def of_model(
    name: str,
    model: nn.Module,
    sets: Sequence[Batches | None],
    names: Collection[str],
    settings: Settings,
    outputs: Outputs | None = None,
    notify: Callable[[int], None] | None = None,
) -> tuple[Evidence, dict[str, Any]]:
    """Run one model over all sets; return its evidence, and its measures ``names`` as JSON has them.

    Args:
        sets: the unlabeled data, the validation set and the few labels, fitted to the model.
        notify: called with the number of examples of each batch that is done.
    """
    unlabeled, validation, few_labels = sets
    assert unlabeled is not None
    labeled = (validation, few_labels)
    mirror, seed = MIRRORED in names, settings.seed
    evidence = gather(
        name, model, unlabeled, *labeled, outputs=outputs, mirror=mirror, seed=seed, notify=notify
    )
    extra = [name for name in names if name != MIRRORED]
    if not extra:
        return evidence, {}
    report = measure(model, unlabeled, extra, settings, outputs=outputs, validation=validation)
    return evidence, {key: row.as_dict() for key, row in report.rows.items()}


def _named(models: nn.Module | Mapping[str, nn.Module] | Sequence[nn.Module]) -> dict[str, nn.Module]:
    if isinstance(models, Mapping | nn.ModuleDict):
        named = dict(models.items())
    elif isinstance(models, Sequence | nn.ModuleList):
        named = {f"model {index}": model for index, model in enumerate(models)}
    elif isinstance(models, nn.Module):
        named = {"model": models}
    else:
        raise UsageError(
            f"models is a {type(models).__name__}; give an nn.Module, a list, or a dict of them by name"
        )
    if not named:
        raise UsageError("no model is given; give one, a list, or a dict of them by name")
    return named


def _fitted(model: nn.Module, batches: Batches) -> Batches:
    """Return ``batches`` on the model's device, in its dtype and memory format."""
    parameters = Parameters(model, or_frozen=True)
    return in_layout_taken(model, batches.on(parameters.device).of_dtype(parameters.dtype))
