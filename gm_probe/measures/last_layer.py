"""Scores from the inputs of a network's last linear layer, as sums over examples during a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gm_probe.runtime.processes import everywhere, sum_over_processes

POWER = 0.3
"""The power p of the gradient's length; small powers predict best (Xie et al. 2024, GdScore)."""


class LastLayer:
    """Sums over examples from the last layer's inputs h (B, D) and outputs z (B, K).

    They are unknown where the logits are not the outputs of an nn.Linear.
    """

    def __init__(self) -> None:
        self.known = True
        self._sums: Tensor | None = None  # (2K, D + 1): Σ (p − onehot) hᵀ, then Σ onehot (h, 1)ᵀ
        self._seen: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note the inputs and outputs of the last nn.Linear of ``model`` that runs in this context."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if args and args[0].dim() == 2:
                self._seen = args[0], output

        with ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def add(self, logits: Tensor) -> None:
        """Add the batch that has just run, whose logits are (B, K)."""
        seen, self._seen = self._seen, None
        if not (self.known and seen and seen[1].shape == logits.shape and torch.equal(seen[1], logits)):
            self.known, self._sums = False, None
            return
        features = nn.functional.pad(seen[0].double(), (0, 1), value=1.0)
        classes = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).double()
        gradient = logits.double().softmax(1) - classes
        sums = torch.cat([gradient, classes], 1).T @ features
        self._sums = sums if self._sums is None else self._sums + sums

    def scores(self, device: torch.device) -> tuple[float | None, float | None]:
        """Return dispersion and gradient norm over the examples of all processes; None where they are unknown.

        The dispersion is log Σ_k (n_k / N) ‖μ_k − μ‖² over the mean features μ_k of the predicted classes, or None if
        that sum is 0. The norm is (mean |g|^p)^(1/p) over the entries g of the cross-entropy's gradient in the weights.
        """
        if not everywhere(self.known and self._sums is not None, device):
            return None, None
        assert self._sums is not None
        gradient, totals = sum_over_processes(self._sums.clone()).chunk(2)
        counts = totals[:, -1]
        size = counts.sum()
        held = counts > 0
        means = totals[held, :-1] / counts[held, None]
        away = (means - totals[:, :-1].sum(0) / size).square().sum(1)
        spread = float((counts[held] / size * away).sum())
        norm = float((gradient[:, :-1] / size).abs().pow(POWER).mean().pow(1 / POWER))
        return math.log(spread) if spread > 0 else None, norm
