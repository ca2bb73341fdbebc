"""Measures of the weights: norms, the spectra of the layers' matrices, and lengths along paths."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from gm_probe.errors import DivergedError, UsageError, foreign_or
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.estimates import Estimate, example_error
from gm_probe.models.door import unwrapped

LEAST, MOST = 20, 15_000
"""Number of eigenvalues that a power law is fitted to: fewer do not show a tail, and more take too long."""
AFFINE = 1e-3
"""Maximum deviation from affine along a ray of positive inputs, relative to the slope, for squared weights."""
NO_EXAMPLES = {"reason_stderr_examples": "needs no examples"}
NO_LAYERS = "there is no linear, convolutional or embedding layer"


def parameter_norm(context: MeasurementContext) -> Estimate:
    """Return ‖θ‖ over the measured parameters."""
    return _length(context.parameters.named)


def distance_from_initialization(context: MeasurementContext) -> Estimate:
    """Return ‖θ − θ₀‖ over the measured parameters, where training started from θ₀."""
    if context.initial is None:
        return Estimate.undefined("the initial parameters are known for run folders only")
    before = dict(unwrapped(context.initial).named_parameters())
    for name, p in context.parameters.named.items():
        if name not in before or before[name].shape != p.shape:
            raise UsageError(
                f"the initial model is another network, without a parameter {name!r} of shape {tuple(p.shape)}. Give "
                "the model as it was before training"
            )
    return _length(
        {name: p.detach() - before[name].to(p.device) for name, p in context.parameters.named.items()}
    )


def _length(tensors: Mapping[str, Tensor]) -> Estimate:
    squares = sum(float(t.detach().double().square().sum()) for t in tensors.values())
    return Estimate(math.sqrt(squares), details=dict(NO_EXAMPLES))


def fisher_rao(context: MeasurementContext) -> Estimate:
    """Return θᵀFθ (Liang et al. 2019)."""
    terms = context.fisher.terms(context.parameters.join(context.parameters.values().values()))
    return Estimate(float(terms.double().mean()), stderr_examples=example_error(terms))


# ---- spectra of layers


def _weights(context: MeasurementContext) -> Iterator[Tensor]:
    """Return the weights, in float64, of the layers that have a measured parameter.

    They are read during a pass: until then weight_norm, spectral_norm and pruning keep those of before a loaded file.
    """
    found: dict[nn.Module, Tensor] = {}
    for prefix, module in context.parameters.model.named_modules():
        measured = any(name.startswith(f"{prefix}." if prefix else "") for name in context.parameters.named)
        if isinstance(module, nn.Linear | _ConvNd | nn.Embedding) and measured:
            found[module] = module.weight

    def note(module: Any, *_: object) -> None:
        found[module] = module.weight

    with ExitStack() as stack, torch.no_grad():
        for module in found:
            stack.callback(module.register_forward_hook(note, prepend=True).remove)
        context.parameters.taken(next(iter(context.batches)).x[context.batches.trial_slice(1)])
    return (weight.detach().double() for weight in found.values())


def eigenvalues(weight: Tensor) -> np.ndarray:
    """Return the ascending eigenvalues of WᵀW of a weight (O, I), or of all slices (O, I) of a kernel (O, I, ...).

    Eigenvalues that may be rounding alone are left out.
    """
    slices = weight[None] if weight.dim() == 2 else weight.flatten(2).permute(2, 0, 1)
    values = torch.linalg.svdvals(slices.double())
    least = float(values.max()) * max(slices.shape[1:]) * torch.finfo(torch.float32).eps
    return np.sort(values[values > least].square().cpu().numpy())


def power_law(values: np.ndarray) -> float:
    """Return the exponent α of p(λ) ∝ λ^−α on the tail λ ≥ λ_min of ascending ``values``.

    α is the maximum likelihood estimate. λ_min is the value with the smallest Kolmogorov-Smirnov distance between tail
    and fit (Clauset et al. 2009), as in WeightWatcher (Martin and Mahoney 2021).
    """
    logs, size = np.log(values), len(values)
    best, found = math.inf, math.nan
    for start in range(size - 1):
        tail = logs[start:] - logs[start]
        if tail.sum() <= 0:
            continue
        alpha = 1 + len(tail) / tail.sum()
        distance = np.abs(1 - np.exp(tail * (1 - alpha)) - np.arange(len(tail)) / len(tail)).max()
        if distance < best:
            best, found = distance, alpha
    return found


def _mean_over_layers(values: list[float]) -> Estimate:
    if not values:
        return Estimate.undefined(NO_LAYERS)
    return Estimate(float(np.mean(values)), details={**NO_EXAMPLES, "num_layers": len(values)})


def stable_rank(context: MeasurementContext) -> Estimate:
    """Return the mean over layers of ‖W‖²_F / ‖W‖²₂."""
    spectra = (eigenvalues(weight) for weight in _weights(context))
    return _mean_over_layers([float(found.sum() / found[-1]) for found in spectra if len(found)])


def power_law_alpha(context: MeasurementContext) -> Estimate:
    """Return the mean exponent over layers that have ``LEAST`` to ``MOST`` eigenvalues."""
    spectra = [eigenvalues(weight) for weight in _weights(context)]
    fits = [power_law(found) for found in spectra if LEAST <= len(found) <= MOST]
    if spectra and not fits:
        return Estimate.undefined(f"no layer has {LEAST} to {MOST:,} eigenvalues")
    return _mean_over_layers(fits)


def log_spectral_norm(context: MeasurementContext) -> Estimate:
    """Return Σ over layers of log ‖W‖₂, with a kernel as one matrix (O, I·k·k)."""
    norms = [float(torch.linalg.matrix_norm(weight.flatten(1), 2)) for weight in _weights(context)]
    if not norms:
        return Estimate.undefined(NO_LAYERS)
    if min(norms) == 0:
        return Estimate.undefined("a layer's weights are all 0")
    return Estimate(sum(map(math.log, norms)), details={**NO_EXAMPLES, "num_layers": len(norms)})


# ---- paths


def path_norm(context: MeasurementContext) -> Estimate:
    """Return √Σ over outputs of f(1; θ²), the network with squared weights on an input of ones (Neyshabur et al. 2015).

    It is defined where that network is affine along the ray of positive inputs, so without squashing functions or
    normalisation by an example's own statistics. BatchNorm counts as its scale and shift in eval mode.
    """
    x = next(iter(context.batches)).x[:1]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return Estimate.undefined("the inputs are not floating-point numbers of one tensor")
    modules = context.parameters.model.modules()
    if any(is_parametrized(module) or isinstance(vars(module).get("weight"), Tensor) for module in modules):
        return Estimate.undefined(
            "a layer makes its weight of other parameters. Fold them by remove_parametrizations, remove_weight_norm, "
            "remove_spectral_norm or prune.remove of torch.nn.utils"
        )

    def fails(cause: str) -> DivergedError:
        return DivergedError(f"the network cannot be run with squared weights: {cause}")

    with foreign_or(fails), torch.no_grad():
        model = _squared(context.parameters.model)
        first, second, third = (
            context.parameters.outputs.taken(model(torch.full_like(x, scale, dtype=torch.float64)), 1)
            for scale in (1.0, 2.0, 3.0)
        )
    rise = float((second - first).abs().max())
    bent = float((third - 2 * second + first).abs().max())
    # where the inputs are normalised, or paths are lost to rounding, nothing rises
    flat = rise <= AFFINE**2 * float(first.abs().max())
    if not math.isfinite(rise) or flat or bent > AFFINE * rise or bool((first < 0).any()):
        return Estimate.undefined("the network is not piecewise linear, so its paths have no lengths")
    return Estimate(math.sqrt(float(first.sum())), details=dict(NO_EXAMPLES))


def _squared(model: nn.Module) -> nn.Module:
    """Return a float64 copy of ``model`` with squared weights, also of BatchNorm's scale γ/σ and shift β − γμ/σ."""
    found = copy.deepcopy(model).double()
    with torch.no_grad():
        for module in found.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                scale = (module.running_var + module.eps).rsqrt()
                shift = -module.running_mean * scale
                if module.affine:
                    scale, shift = scale * module.weight, shift * module.weight + module.bias
                module.affine, module.weight, module.bias = True, nn.Parameter(scale), nn.Parameter(shift)
                module.running_mean.zero_()
                module.running_var.fill_(1 - module.eps)
        for p in found.parameters():
            p.square_()
    return found
