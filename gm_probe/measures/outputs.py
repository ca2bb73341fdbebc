"""Measures of the outputs: errors, confidence, and sensitivity to the input."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.data.batches import cut
from gm_probe.data.fields import tensors_of, with_tensors
from gm_probe.inconsistency.kl import sum_over_labels
from gm_probe.linalg.work import FORWARD, GRADIENT
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.estimates import Estimate, example_error, mean_over_labels
from gm_probe.models.parameters import dense
from gm_probe.runtime.processes import gather_examples

NO_INPUT_GRADIENT = "the outputs have no gradient with respect to the inputs"
SHIFT = 4  # pixels, as in the usual crop augmentation


def error(context: MeasurementContext) -> Estimate:
    """Return the fraction of wrong predictions, or of wrong labels where there are several (the Hamming loss)."""
    assert context.labels is not None
    return context.mean(mean_over_labels(context.logits.argmax(-1) != context.labels))


def cross_entropy(context: MeasurementContext) -> Estimate:
    """Return the mean over examples of the loss, summed over an example's labels, whose Hessian is measured."""
    assert context.labels is not None
    log_p = context.logits.double().log_softmax(-1)
    return context.mean(sum_over_labels(-log_p.gather(-1, context.labels[..., None])[..., 0]))


def mean_entropy(context: MeasurementContext) -> Estimate:
    """Return the mean over examples; the entropies of independent labels add."""
    log_p = context.logits.double().log_softmax(-1)
    return context.mean(sum_over_labels(-(log_p.exp() * log_p).sum(-1)))


def mean_confidence(context: MeasurementContext) -> Estimate:
    """Return the mean over examples and their labels, like the error."""
    return context.mean(mean_over_labels(context.logits.double().softmax(-1).amax(-1)))


def input_jacobian_norm(context: MeasurementContext) -> Estimate:
    """Return the root mean square over examples of ‖∂f_θ(x)/∂x‖_F (Novak et al. 2018), by a backward pass per class.

    f_θ(x) are all probabilities; a yes-or-no label has both p and 1 − p.
    """
    rows = []
    for batch, logits in zip(context.batches, cut(context.logits, context.batches), strict=True):
        if not batch.x.is_floating_point():
            return Estimate.undefined("the inputs are integers, so they have no derivative")
        x = with_tensors(batch.x, {key: _leaf(value) for key, value in tensors_of(batch.x).items()})
        by = [value for value in tensors_of(x).values() if value.requires_grad]
        squares = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        with torch.enable_grad():
            p = context.differentiable.logits(x, context.parameters.values()).softmax(-1).flatten(1)
            found: list[Tensor] = []
            for c in range(p.shape[1] if p.requires_grad else 0):
                gradients = torch.autograd.grad(p[:, c].sum(), by, retain_graph=True, allow_unused=True)
                found = [dense(g) for g in gradients if g is not None]
                for g in found:
                    squares += g.double().flatten(1).square().sum(1)
            if not found:
                return Estimate.undefined(NO_INPUT_GRADIENT)
        context.work.add(FORWARD + p.shape[1] * (GRADIENT - FORWARD), len(logits))
        rows.append(squares)
    squares = gather_examples(torch.cat(rows))
    value = math.sqrt(float(squares.mean()))
    spread = example_error(squares)
    return Estimate(value, stderr_examples=None if spread is None or value == 0 else spread / (2 * value))


def _leaf(value: Tensor) -> Tensor:
    """Return a leaf to differentiate by for a floating-point input, and other inputs as they are."""
    return value.detach().requires_grad_() if value.is_floating_point() else value


def flip_rate(context: MeasurementContext) -> Estimate:
    """Return the fraction of predictions that change when the image is mirrored left to right."""
    return _changed(context, mirrored_logits(context))


def mirrored_logits(context: MeasurementContext) -> Tensor | None:
    """Return this process's logits of the images mirrored left to right; None for other inputs."""
    return context.once("mirrored", lambda: _transformed(context, lambda x, _: x.flip(-1)))


def crop_rate(context: MeasurementContext) -> Estimate:
    """Return the fraction of predictions that change when the image moves by up to 4 pixels (border reflected)."""

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

    return _changed(context, _transformed(context, moved))


def _changed(context: MeasurementContext, transformed: Tensor | None) -> Estimate:
    """Return the fraction of predictions that differ from those of the logits ``transformed``."""
    if transformed is None:
        return Estimate.undefined("the inputs are not images")
    return context.mean(mean_over_labels(transformed.argmax(-1) != context.logits.argmax(-1)))


def _transformed(context: MeasurementContext, transform: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """Return this process's logits of transformed images; None for other inputs.

    Args:
        transform: maps images (B, C, H, W) and their own uniform random numbers (B, 2) to images.
    """
    batches, rows = context.batches, []
    # drawn for all examples at once, so that no shift depends on the batch size or on the process
    generator = context.generator("crop")
    numbers = torch.rand(batches.total, 2, generator=generator, device=generator.device)
    mine = numbers[batches.first : batches.first + batches.num_examples].split(batches.batch_size)
    for batch, some in zip(batches, mine, strict=True):
        if not isinstance(batch.x, Tensor) or batch.x.dim() != 4 or not batch.x.is_floating_point():
            return None
        with torch.no_grad():
            rows.append(context.parameters.logits(transform(batch.x, some)))
        context.work.add(FORWARD, len(rows[-1]))
    return torch.cat(rows)
