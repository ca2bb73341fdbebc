"""The paper's App. C at full size: a small network on three Gaussians in the plane, its curvature as dense matrices.

The network's sizes, the Gaussians and the training are lost from the paper's text: ours. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torch.nn import functional

from gm_probe.data.batches import Batches
from gm_probe.inconsistency.ascent import Divergence
from gm_probe.linalg.work import Work
from gm_probe.models.parameters import Parameters
from gm_probe.models.zoo import ModelSpec, initial_model

CLASSES = 3


@dataclass(frozen=True, slots=True)
class Mixture:
    """Points x (N, 2) of three Gaussians and whose they are, y (N,)."""

    x: Tensor
    y: Tensor

    @classmethod
    def draw(cls, per_class: int, spread: float, seed: int, *, flipped: float = 0.0) -> Mixture:
        """Draw ``per_class`` points each about the corners of an equilateral triangle at distance 2 from the origin.

        Args:
            spread: standard deviation.
            flipped: share of points whose label is drawn again at random.
        """
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(CLASSES).repeat_interleave(per_class)
        angle = math.pi / 2 + 2 * math.pi / CLASSES * y.double()
        centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
        x = centre + spread * torch.randn(len(y), 2, generator=generator, dtype=torch.float64)
        again = torch.rand(len(y), generator=generator) < flipped
        labels = torch.randint(0, CLASSES, (len(y),), generator=generator)
        return cls(x, torch.where(again, labels, y))


class Network:
    """A ReLU network with two hidden layers of ``width`` units, as one point in parameter space."""

    def __init__(self, mixture: Mixture, width: int, seed: int) -> None:
        self.mixture = mixture
        spec = ModelSpec(f"mlp-{width}-{width}", (2,), CLASSES)
        self.model: nn.Module = initial_model(spec, seed).double().eval()
        self.parameters = Parameters(self.model)
        self.size = self.parameters.size

    def train(self, at: Iterable[int], lr: float, momentum: float) -> Iterator[int]:
        """Train by full-batch gradient descent, and yield after each number of steps in ``at``, ascending."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)
        done = 0
        for step in at:
            for _ in range(step - done):
                optimizer.zero_grad()
                functional.cross_entropy(self.model(self.mixture.x), self.mixture.y).backward()
                optimizer.step()
            done = step
            yield step

    def trained(self, steps: int, lr: float, momentum: float) -> Network:
        """Train, and return the network itself."""
        for _ in self.train([steps], lr, momentum):
            pass
        return self

    @property
    def theta(self) -> Tensor:
        """Return the parameters (P,) now."""
        return self.parameters.join(self.parameters.values().values())

    def logits(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return logits (B, C) at θ + ``offset`` (P,)."""
        moved = self.theta if offset is None else self.theta + offset
        return self._at(moved, x).detach()

    def _at(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.parameters.logits(x, self.parameters.split(theta))

    @property
    def loss(self) -> float:
        return float(functional.cross_entropy(self.logits(self.mixture.x), self.mixture.y))

    @property
    def error(self) -> float:
        return float((self.logits(self.mixture.x).argmax(1) != self.mixture.y).double().mean())

    @property
    def divergence(self) -> Divergence:
        """Return what Algorithm 1 climbs: δ ↦ mean KL(f_θ ‖ f_{θ+δ}) over the mixture, without labels."""
        batches = Batches.from_tensors(self.mixture.x, batch_size=len(self.mixture.x))
        return Divergence(self.parameters, batches, self.logits(self.mixture.x), Work(len(self.mixture.x)))

    def fisher(self) -> Tensor:
        """Return F (P, P) from every example's whole Jacobian; it shares no code with ``curvature.operators``."""
        x, theta = self.mixture.x, self.theta
        jacobian = vmap(lambda one: jacrev(lambda t: self._at(t, one[None])[0])(theta))(x)  # (N, C, P)
        p = self.logits(x).softmax(1)
        centred = jacobian - torch.einsum("nc,ncp->np", p, jacobian)[:, None]
        rows = (p.sqrt()[:, :, None] * centred).flatten(0, 1)
        return rows.T @ rows / len(x)

    def hessian(self) -> Tensor:
        """Return H (P, P) of the mean cross-entropy with the mixture's labels."""
        x, y = self.mixture.x, self.mixture.y

        def loss(theta: Tensor) -> Tensor:
            return functional.cross_entropy(self._at(theta, x), y)

        matrix = jacrev(grad(loss))(self.theta)
        return (matrix + matrix.T) / 2


def trained_network(
    *, per_class: int, spread: float, width: int, steps: int, lr: float, momentum: float, seed: int
) -> Network:
    """Return a network after ``steps`` of training on a mixture of its own."""
    return Network(Mixture.draw(per_class, spread, seed), width, seed).trained(steps, lr, momentum)


def descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (P,) of a symmetric ``matrix``, largest first, and their unit vectors (P, P) as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)
