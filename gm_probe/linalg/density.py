"""The spectral density of a symmetric operator by stochastic Lanczos quadrature. Never sees a model.

Lin, Saad & Yang 2016; on networks Papyan 2018 and Ghorbani et al. 2019. Lanczos from a random unit vector v gives the
Gauss quadrature of v's own spectral measure Σ_i (vᵀu_i)² δ(λ − λ_i), whose expectation over v is the density
(1/P) Σ_i δ(λ − λ_i).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from gm_probe.errors import UsageError
from gm_probe.linalg.lanczos import Krylov
from gm_probe.linalg.operator import Operator
from gm_probe.linalg.random_vectors import random_signs

LUMP = 0.5  # mass from which on a node is the bulk, however well it is resolved
SAME = 1e-6  # of the largest |Ritz value|: nodes as near as this are one
NOTHING = 1e-6  # eigenvalues: the weight of a node that rounding made
LINEAR = 1e-3  # of the largest |Ritz value|: where an axis of the whole spectrum turns logarithmic
VIEW = 2.0  # asinh(λ/width) that a curve spans at least on either side of 0
TAILS = 4  # broadening widths that a curve goes on beyond the extreme nodes


class Sampled(NamedTuple):
    """A mean over random vectors; ``stderr`` is its standard error, None of a single one."""

    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class Outlier:
    """An isolated eigenvalue, or several too close together to be told apart.

    Attributes:
        value: the outermost of the vectors' Ritz values; the eigenvalue may lie further out, by ``residual`` at most.
        residual: the largest of their residuals.
        count: P times its mean weight: 1 in expectation for one eigenvalue, with a relative standard deviation of
            √(2/num_probes).
    """

    value: float
    residual: float
    count: Sampled


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """A spectral density as quadrature rules, one a random vector: nodes are Ritz values, weights are of sum 1.

    Attributes:
        size: P.
        nodes, weights: (steps,) float64 of every vector, nodes ascending; fewer where its Krylov space was exhausted,
            when the rule is its spectral measure itself.
        residuals: (steps,) of every vector: some eigenvalue lies within it of the node.
        num_products: products with the operator that it took.
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
        """tr A; the vectors are signs, so that this is Hutchinson's estimator."""
        return self.moment(1)

    @property
    def frobenius(self) -> Sampled:
        """‖A‖_F² = Σ_i λ_i²."""
        return self.moment(2)

    @property
    def linear_width(self) -> float:
        """Where an axis from the bulk at 0 to the outliers turns from linear to logarithmic: a power of ten."""
        scale = LINEAR * max(abs(self.smallest), abs(self.largest))
        return 10.0 ** round(math.log10(scale)) if scale else 1.0

    def moment(self, order: int) -> Sampled:
        """Σ_i λ_iᵒʳᵈᵉʳ: of each vector exact up to an order of 2·steps − 1."""
        return _sampled([self.size * float(w @ nodes**order) for nodes, w in self._rules()])

    def mass(self, low: float, high: float) -> Sampled:
        """The share of eigenvalues in [low, high]; uncertain by the weights of the nodes next to its ends, too."""
        return _sampled([float(w[(nodes >= low) & (nodes <= high)].sum()) for nodes, w in self._rules()])

    def smoothed(
        self,
        grid: np.ndarray,
        sigma: float = 0.01,
        *,
        linear_width: float | None = None,
        by_residual: bool = False,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The density per unit of λ with every node broadened to a Gaussian, and its standard error over vectors.

        Args:
            grid: (G,) values of λ.
            sigma: the Gaussians' standard deviation, relative to the range from the smallest node to the largest.
            linear_width: broaden along asinh(λ/linear_width) instead of along λ: evenly on a logarithmic axis.
            by_residual: broaden a node by its residual where that is more, up to half the way to the next node.
                Eigenvalues that are resolved stay sharp, and the bulk shows no waves, which would be the nodes' own.

        Returns:
            Both (G,); no error of a single vector.

        Raises:
            UsageError: sigma or linear_width is not positive.
        """
        if not sigma > 0 or (linear_width is not None and not linear_width > 0):
            raise UsageError(f"a broadening must be positive, not {sigma} along {linear_width}")
        x, stretch = np.asarray(grid, dtype=float), np.ones(1)
        places, blurs = self.nodes, self.residuals
        if linear_width is not None:
            stretch = 1 / np.hypot(x, linear_width)  # d asinh(λ/width)/dλ
            blurs = tuple(r / np.hypot(n, linear_width) for n, r in zip(self.nodes, blurs, strict=True))
            x, places = np.arcsinh(x / linear_width), tuple(np.arcsinh(n / linear_width) for n in self.nodes)
        least = sigma * _range(min(p[0] for p in places), max(p[-1] for p in places))
        rows = []
        for place, weight, blur in zip(places, self.weights, blurs, strict=True):
            width = np.maximum(least, np.minimum(blur, _nearest(place) / 2)) if by_residual else least
            bells = np.exp(-0.5 * ((x[:, None] - place) / width) ** 2) / (width * math.sqrt(2 * math.pi))
            rows.append(stretch * (bells @ weight))
        stack = np.stack(rows)
        error = stack.std(0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else None
        return stack.mean(0), error

    def outliers(self, tolerance: float = 0.01) -> tuple[Outlier, ...]:
        """Eigenvalues that stand out of the bulk, descending.

        From either end inward, those that every vector found at the same place, up to the first that they did not or
        that holds more than ``LUMP`` of the mass. Where all of a spectrum is resolved, that may be all of it.

        Args:
            tolerance: of residuals and of the vectors' differences, relative to the value.
        """
        above = list(self._from_end(-1, tolerance))
        # what both ends reach, each has to its vectors' differences
        reached = above[-1].value - tolerance * abs(above[-1].value) if above else math.inf
        below = [one for one in self._from_end(1, tolerance) if one.value < reached]
        return (*above, *reversed(below))

    def as_dict(self, *, sigma: float = 0.003, points: int = 1000) -> dict[str, Any]:
        """A JSON object: the rules, what they say, and a curve that ``density_plot`` draws.

        The curve is P times the density per unit of asinh(λ/linear_width), eigenvalues per e-fold of λ, broadened by
        ``sigma`` of that axis or a node's residual.
        """
        width = self.linear_width
        # always with 0 and the linear range around it in view
        least, most = (math.asinh(edge / width) for edge in (self.smallest, self.largest))
        margin = TAILS * sigma * _range(least, most)
        least, most = min(least, -VIEW), max(most, VIEW)
        grid = width * np.sinh(np.linspace(least - margin, most + margin, points))
        curve, error = self.smoothed(grid, sigma, linear_width=width, by_residual=True)
        scale = self.size * np.hypot(grid, width)
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
                "sigma": sigma,
                "x": grid.tolist(),
                "y": (scale * curve).tolist(),
                "stderr": None if error is None else (scale * error).tolist(),
            },
            "nodes": [nodes.tolist() for nodes in self.nodes],
            "weights": [weights.tolist() for weights in self.weights],
            "residuals": [residuals.tolist() for residuals in self.residuals],
        }

    def _rules(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return zip(self.nodes, self.weights, strict=True)

    def _from_end(self, step: int, tolerance: float) -> Iterator[Outlier]:
        """From the top (``step`` −1) or the bottom (+1) inward."""
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
        """(value, weight, residual) of a vector's nodes, those at one place as one and without those of no weight.

        Both are what rounding leaves of a Krylov space that was exhausted without notice: it goes on into copies of
        eigenvalues that it has.
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
    notify: Callable[[int, int], None] | None = None,
) -> Density:
    """The spectral density by ``num_probes`` times ``num_steps`` products, from random signs as start vectors.

    Signs have less variance than Gaussian vectors: of a diagonal matrix, none.

    Args:
        notify: called after every product with the products done and the most there may be.

    Raises:
        UsageError: no vector or no step.
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
            if notify is not None:
                notify(products, num_probes * num_steps)
        values, vectors = krylov.eigen()
        nodes.append(values)
        weights.append(vectors[0] ** 2)
        residuals.append(krylov.off_diagonal[-1] * np.abs(vectors[-1]))
    return Density(operator.size, tuple(nodes), tuple(weights), tuple(residuals), products)


def _nearest(places: np.ndarray) -> np.ndarray:
    """How far the next of (steps,) ascending places is from each; 0 from a single one."""
    gaps = np.diff(places)
    return np.minimum(np.r_[np.inf, gaps], np.r_[gaps, np.inf]) if len(gaps) else np.zeros(1)


def _range(least: float, most: float) -> float:
    """Of nodes; a single one has none: its own size stands in, or 1 at 0."""
    size = max(abs(float(least)), abs(float(most)))
    spread = float(most - least)
    return spread if spread > SAME * size else size or 1.0


def _sampled(values: list[float]) -> Sampled:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Sampled(float(np.mean(values)), error)
