"""The spectral density of a symmetric operator by stochastic Lanczos quadrature. Never sees a model.

Lin, Saad & Yang 2016; on networks Papyan 2018 and Ghorbani et al. 2019. Lanczos from a random unit vector v gives the
Gauss quadrature of v's own spectral measure Σ_i (vᵀu_i)² δ(λ − λ_i), whose expectation over v is the density
(1/P) Σ_i δ(λ − λ_i).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from gm_probe.errors import UsageError
from gm_probe.linalg.lanczos import Krylov
from gm_probe.linalg.operator import Operator, random_signs

LUMP = 0.5  # a node with this share of the mass is the bulk, however well it is resolved
SAME = 1e-6  # nodes this near, relative to the largest |Ritz value|, are one
NOTHING = 1e-6  # a node that weighs less, in eigenvalues, is made by rounding
LINEAR = 1e-3  # the axis of the spectrum turns logarithmic at this share of the largest |Ritz value|
SIGMA = 0.003  # least standard deviation of a node in a curve, relative to the range of nodes
VIEW = 2.0  # a curve spans at least this much asinh(λ/width) on either side of 0
TAILS = 4  # a curve continues this many SIGMA beyond the extreme nodes


class Sampled(NamedTuple):
    """A mean over random vectors, and its standard error (None of a single vector)."""

    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class Outlier:
    """An isolated eigenvalue, or several that are too close together to be separated.

    Attributes:
        value: the outermost of the vectors' Ritz values. The eigenvalue may lie further out, by ``residual`` at most.
        residual: the largest of their residuals.
        count: P times its mean weight. Its expectation for one eigenvalue is 1, with a relative standard deviation of
            √(2/num_probes).
    """

    value: float
    residual: float
    count: Sampled


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """A spectral density as one quadrature rule per random vector: nodes are Ritz values, and weights add up to 1.

    Attributes:
        size: P.
        nodes, weights: (steps,) float64 for every vector, nodes ascending. There are fewer where its Krylov space was
            exhausted; the rule is then its spectral measure itself.
        residuals: (steps,) for every vector. Some eigenvalue lies within the residual of each node.
        num_products: number of products with the operator.
    """

    size: int
    nodes: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    residuals: tuple[np.ndarray, ...]
    num_products: int

    @property
    def largest(self) -> float:
        """The largest Ritz value: λ_max is no smaller."""
        return max(float(nodes[-1]) for nodes in self.nodes)

    @property
    def smallest(self) -> float:
        """The smallest Ritz value: λ_min is no larger."""
        return min(float(nodes[0]) for nodes in self.nodes)

    @property
    def trace(self) -> Sampled:
        """tr A. The vectors are random signs, so this is Hutchinson's estimator."""
        return self.moment(1)

    @property
    def frobenius(self) -> Sampled:
        """‖A‖_F² = Σ_i λ_i²."""
        return self.moment(2)

    @property
    def linear_width(self) -> float:
        """The power of ten at which an axis from the bulk at 0 to the outliers turns from linear to logarithmic."""
        scale = LINEAR * max(abs(self.smallest), abs(self.largest))
        return 10.0 ** round(math.log10(scale)) if scale else 1.0

    def moment(self, order: int) -> Sampled:
        """Return Σ_i λ_iᵒʳᵈᵉʳ. Each vector's own is exact up to order 2·steps − 1."""
        return _sampled([self.size * float(w @ nodes**order) for nodes, w in self._rules()])

    def mass(self, low: float, high: float) -> Sampled:
        """Return the share of eigenvalues in [low, high], which is uncertain by the nodes next to its ends, too."""
        return _sampled([float(w[(nodes >= low) & (nodes <= high)].sum()) for nodes, w in self._rules()])

    def curve(self, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the eigenvalues per unit of asinh(λ/linear_width) at ``grid`` (G,), and their standard error (G,).

        Along this axis every node becomes a Gaussian. Its standard deviation is ``SIGMA`` of the range of nodes or,
        where that is more, the node's residual, up to half the way to the next node. So eigenvalues that are resolved
        stay sharp, and the bulk shows no waves from its nodes. A single vector has no standard error.
        """
        width = self.linear_width
        x, places = np.arcsinh(grid / width), [np.arcsinh(nodes / width) for nodes in self.nodes]
        least = SIGMA * _range(min(p[0] for p in places), max(p[-1] for p in places))
        rows = []
        for place, nodes, weight, residual in zip(
            places, self.nodes, self.weights, self.residuals, strict=True
        ):
            blur = np.maximum(least, np.minimum(residual / np.hypot(nodes, width), _nearest(place) / 2))
            bells = np.exp(-0.5 * ((x[:, None] - place) / blur) ** 2) / (blur * math.sqrt(2 * math.pi))
            rows.append(self.size * (bells @ weight))
        stack = np.stack(rows)
        error = stack.std(0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else None
        return stack.mean(0), error

    def outliers(self, tolerance: float = 0.01) -> tuple[Outlier, ...]:
        """Return the eigenvalues that stand out of the bulk, descending.

        From either end inward, these are the nodes that every vector found at the same place. They stop at the first
        that some vector did not find, or that holds more than ``LUMP`` of the mass. A resolved spectrum may be listed
        whole.

        Args:
            tolerance: for residuals and for differences between vectors, relative to the value.
        """
        above = list(self._from_end(-1, tolerance))
        # where both ends reach the same eigenvalue, their values differ as vectors do
        reached = above[-1].value - tolerance * abs(above[-1].value) if above else math.inf
        below = [one for one in self._from_end(1, tolerance) if one.value < reached]
        return (*above, *reversed(below))

    def as_dict(self, *, points: int = 1000) -> dict[str, Any]:
        """Return a JSON object: the rules, what they say, and the curve at ``points`` values, for ``density_plot``."""
        width = self.linear_width
        # 0 and the linear range around it are always in view
        least, most = (math.asinh(edge / width) for edge in (self.smallest, self.largest))
        margin = TAILS * SIGMA * _range(least, most)
        least, most = min(least, -VIEW), max(most, VIEW)
        grid = width * np.sinh(np.linspace(least - margin, most + margin, points))
        curve, error = self.curve(grid)
        return {
            "num_parameters": self.size,
            "num_probes": len(self.nodes),
            "num_steps": max(map(len, self.nodes)),
            "num_products": self.num_products,
            "largest": self.largest,
            "smallest": self.smallest,
            "trace": self.trace._asdict(),
            "frobenius": self.frobenius._asdict(),
            "near_zero": {"within": width, **self.mass(-width, width)._asdict()},
            "outliers": [{**asdict(one), "count": one.count._asdict()} for one in self.outliers()],
            "curve": {
                "linear_width": width,
                "sigma": SIGMA,
                "x": grid.tolist(),
                "y": curve.tolist(),
                "stderr": None if error is None else error.tolist(),
            },
            "nodes": [nodes.tolist() for nodes in self.nodes],
            "weights": [weights.tolist() for weights in self.weights],
            "residuals": [residuals.tolist() for residuals in self.residuals],
        }

    def _rules(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return zip(self.nodes, self.weights, strict=True)

    def _from_end(self, step: int, tolerance: float) -> Iterator[Outlier]:
        """Yield outliers from the top (``step`` −1) or the bottom (+1) inward."""
        vectors = zip(self.nodes, self.weights, self.residuals, strict=True)
        merged = [self._merged(*vector)[::step] for vector in vectors]
        for rows in zip(*merged, strict=False):
            values, weights, residuals = np.array(rows).T
            outermost = float(values.min() if step > 0 else values.max())
            allowed = tolerance * abs(outermost)
            if residuals.max() > allowed or np.ptp(values) > allowed or weights.mean() > LUMP:
                return
            yield Outlier(outermost, float(residuals.max()), _sampled((self.size * weights).tolist()))

    def _merged(self, nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray) -> list[np.ndarray]:
        """Return (value, weight, residual) of a vector's nodes, with equal ones merged and weightless ones left out.

        Rounding makes both where it hides that a Krylov space is exhausted: Lanczos then finds copies of eigenvalues.
        """
        near = SAME * max(abs(self.smallest), abs(self.largest))
        groups = np.split(np.arange(len(nodes)), np.flatnonzero(np.diff(nodes) > near) + 1)
        return [
            np.array([np.average(nodes[g], weights=weights[g]), weights[g].sum(), residuals[g].max()])
            for g in groups
            if weights[g].sum() * self.size > NOTHING
        ]


def density(
    operator: Operator,
    *,
    generator: torch.Generator,
    num_probes: int = 4,
    num_steps: int = 40,
) -> Density:
    """Return the spectral density by ``num_probes`` times ``num_steps`` products, started from random signs.

    Signs have less variance than Gaussian vectors, and none for a diagonal matrix.

    Raises:
        UsageError: ``num_probes`` or ``num_steps`` is below 1.
        DivergedError: a product is not finite.
    """
    if num_probes < 1 or num_steps < 1:
        raise UsageError(f"a density needs at least one probe and one step, not {num_probes} and {num_steps}")
    nodes, weights, residuals, products = [], [], [], 0
    for _ in range(num_probes):
        krylov = Krylov(operator, random_signs(operator, generator, torch.float64))
        while not krylov.exhausted and len(krylov.basis) < num_steps:
            krylov.extend()
            products += 1
        values, vectors = krylov.eigen()
        nodes.append(values)
        weights.append(vectors[0] ** 2)
        residuals.append(krylov.off_diagonal[-1] * np.abs(vectors[-1]))
    return Density(operator.size, tuple(nodes), tuple(weights), tuple(residuals), products)


def _nearest(places: np.ndarray) -> np.ndarray:
    """Return the distance from each of (steps,) ascending places to the nearest other; 0 for a single one."""
    gaps = np.diff(places)
    return np.minimum(np.r_[np.inf, gaps], np.r_[gaps, np.inf]) if len(gaps) else np.zeros(1)


def _range(least: float, most: float) -> float:
    """Return the range of nodes. A single node has none; its own size replaces it, or 1 at 0."""
    size = max(abs(float(least)), abs(float(most)))
    spread = float(most - least)
    return spread if spread > SAME * size else size or 1.0


def _sampled(values: list[float]) -> Sampled:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Sampled(float(np.mean(values)), error)
