"""Measures of the outputs and weights alone: confidence, sensitivity to the input, norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.data.batches import cut
from gm_probe.data.fields import tensors_of, with_tensors
from gm_probe.inconsistency.kl import over_rows
from gm_probe.linalg.work import FORWARD, GRADIENT
from gm_probe.measures.context import Figure, Probe, example_error
from gm_probe.models.parameters import dense
from gm_probe.runtime.processes import gather_examples

NO_INPUT_GRADIENT = "the outputs have no gradient with respect to the inputs"
SHIFT = 4  # pixels, as in the usual crop augmentation


def error(probe: Probe) -> Figure:
    """Fraction of wrong predictions; of several labels an example, of wrong labels (the Hamming loss)."""
    assert probe.labels is not None
    return probe.mean(_over_labels(probe.clean.argmax(-1) != probe.labels))


def cross_entropy(probe: Probe) -> Figure:
    """Mean over examples; of several labels an example, of their sum, whose Hessian is measured."""
    assert probe.labels is not None
    log_p = probe.clean.double().log_softmax(-1)
    return probe.mean(over_rows(-log_p.gather(-1, probe.labels[..., None])[..., 0]))


def mean_entropy(probe: Probe) -> Figure:
    """Mean over examples; independent labels' entropies add."""
    log_p = probe.clean.double().log_softmax(-1)
    return probe.mean(over_rows(-(log_p.exp() * log_p).sum(-1)))


def mean_confidence(probe: Probe) -> Figure:
    """Mean over examples and their labels, as the error is."""
    return probe.mean(_over_labels(probe.clean.double().softmax(-1).amax(-1)))


def _over_labels(values: Tensor) -> Tensor:
    """(n,) of values (n,) as they are, and of values (n, L) of L labels an example their means."""
    return values if values.dim() == 1 else values.double().mean(1)


def input_jacobian_norm(probe: Probe) -> Figure:
    """Root mean square over examples of ‖∂f_θ(x)/∂x‖_F (Novak et al. 2018), exact: one backward pass a class.

    f_θ(x) are all probabilities, of a yes-or-no label both of p and 1 − p.
    """
    rows = []
    for batch, clean in zip(probe.batches, cut(probe.clean, probe.batches), strict=True):
        if not batch.x.is_floating_point():
            return None, None, None, False, {"reason": "the inputs are integers, so they have no derivative"}
        x = with_tensors(batch.x, {key: _leaf(value) for key, value in tensors_of(batch.x).items()})
        by = [value for value in tensors_of(x).values() if value.requires_grad]
        squares = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        with torch.enable_grad():
            p = probe.differentiable.logits(x, probe.parameters.values()).softmax(-1).flatten(1)
            found: list[Tensor] = []
            for c in range(p.shape[1] if p.requires_grad else 0):
                gradients = torch.autograd.grad(p[:, c].sum(), by, retain_graph=True, allow_unused=True)
                found = [dense(g) for g in gradients if g is not None]
                for g in found:
                    squares += g.double().flatten(1).square().sum(1)
            if not found:
                return None, None, None, False, {"reason": NO_INPUT_GRADIENT}
        probe.work.add(FORWARD + p.shape[1] * (GRADIENT - FORWARD), len(clean))
        rows.append(squares)
    squares = gather_examples(torch.cat(rows))
    value = math.sqrt(float(squares.mean()))
    spread = example_error(squares)
    return value, None, None if spread is None or value == 0 else spread / (2 * value), True, {}


def _leaf(value: Tensor) -> Tensor:
    """What autograd differentiates by, of an input of floating-point numbers; others as they are."""
    return value.detach().requires_grad_() if value.is_floating_point() else value


def flip_rate(probe: Probe) -> Figure:
    """Fraction of predictions that change where the image is mirrored left to right."""
    return _changed(probe, lambda x, _: x.flip(-1))


def crop_rate(probe: Probe) -> Figure:
    """Fraction of predictions that change where the image moves by up to 4 pixels (reflected at the border)."""

    def moved(x: Tensor, shifts: Tensor) -> Tensor:
        pad = min(SHIFT, min(x.shape[2:]) - 1)
        padded = functional.pad(x, (pad,) * 4, mode="reflect")
        rows = [torch.arange(size, device=x.device) for size in x.shape[2:]]
        down, right = (shifts.to(x.device) * (2 * pad + 1)).long().unbind(1)
        pictures = torch.arange(len(x), device=x.device)[:, None, None]
        found = padded.permute(0, 2, 3, 1)[
            pictures, (down[:, None] + rows[0])[:, :, None], (right[:, None] + rows[1])[:, None, :]
        ]
        return found.permute(0, 3, 1, 2)

    return _changed(probe, moved)


def _changed(probe: Probe, transform: Callable[[Tensor, Tensor], Tensor]) -> Figure:
    """``transform`` maps images (B, C, H, W) and uniform numbers (B, 2) of their own to images."""
    batches, rows = probe.batches, []
    # for all examples at once, so that no shift hangs on the batch size or on the process
    numbers = torch.rand(batches.total, 2, generator=probe.generator("crop"))
    mine = numbers[batches.first : batches.first + batches.num_examples].split(batches.batch_size)
    for batch, clean, some in zip(batches, cut(probe.clean, batches), mine, strict=True):
        if not isinstance(batch.x, Tensor) or batch.x.dim() != 4 or not batch.x.is_floating_point():
            return None, None, None, False, {"reason": "the inputs are not images"}
        with torch.no_grad():
            logits = probe.parameters.logits(transform(batch.x, some))
        probe.work.add(FORWARD, len(clean))
        rows.append(_over_labels(logits.argmax(-1) != clean.argmax(-1)))
    return probe.mean(torch.cat(rows))


def parameter_norm(probe: Probe) -> Figure:
    """‖θ‖ over the measured parameters."""
    return _length(probe.parameters.named)


def distance_from_initialization(probe: Probe) -> Figure:
    """‖θ − θ₀‖ over the measured parameters, θ₀ those that training started from."""
    if probe.initial is None:
        return None, None, None, False, {"reason": "the initial parameters are known for run folders only"}
    before = dict(probe.initial.named_parameters())
    return _length(
        {name: p.detach() - before[name].to(p.device) for name, p in probe.parameters.named.items()}
    )


def _length(tensors: Mapping[str, Tensor]) -> Figure:
    squares = sum(float(t.detach().double().square().sum()) for t in tensors.values())
    return math.sqrt(squares), None, None, True, {"reason_stderr_examples": "needs no examples"}
