"""Counts work in gradient evaluations, so that every estimate can report what it cost."""

from __future__ import annotations

from collections.abc import Callable

# Costs are in forward passes. A backward pass costs about two, so one gradient evaluation is 3.
FORWARD = 1.0
GRADIENT = 3.0
JVP = 3.0  # the primal pass, and a tangent pass with two products per layer
REVERSE_JVP = 7.0  # a gradient, and a backward pass through it
NESTED_JVP = 9.0  # a jvp of a jvp
HESSIAN_PRODUCT = 9.0  # a gradient and its derivative along v, with two products for each of the gradient's
TRIPLE_BACKWARD = 18.0  # a Hessian product, and a backward pass to the weights of the examples
EXAMPLE_NORMS = 3.0  # a backward pass to every layer's output, and each example's own weight gradient


Expect = Callable[[float, float], None]
"""Called with the units of work that are done (random vectors or iterations) and their expected total."""


class Count(float):
    """Gradient evaluations done.

    Attributes:
        left: how many more the estimate at work is expected to take; None where that is unknown.
    """

    left: float | None = None


class Tally:
    """Adds up the work of several measurements in a row, for one ``notify`` of a stage's name and the total so far."""

    def __init__(self, notify: Callable[[str, float], None] | None) -> None:
        self._notify, self._done = notify, 0.0

    def next(self, prefix: str = "") -> Callable[[str, float], None]:
        """Return the ``notify`` of the next measurement, whose stages' names get the ``prefix``."""
        before = self._done

        def notify(name: str, evaluations: float) -> None:
            self._done = (
                before + evaluations if before else evaluations
            )  # a sum would lose a ``Count``'s ``left``
            if self._notify is not None:
                self._notify(f"{prefix}{name}", self._done)

        return notify


class Work:
    """A running count of gradient evaluations over all the examples.

    Args:
        num_examples: number of examples N, or of this process's share. A pass over a batch of B counts B/N.
        notify: called with the count after every batch (progress bars).
    """

    def __init__(self, num_examples: int, notify: Callable[[Count], None] | None = None) -> None:
        self.num_examples = num_examples
        self.evaluations = 0.0
        self._notify = notify
        self.begin()

    def begin(self) -> None:
        """Begin an estimate, and forget what was expected of the one before."""
        self._began: tuple[float, float] | None = (
            None  # evaluations and units at the first call of ``expect``
        )
        self._end: float | None = None

    def expect(self, done: float, total: float) -> None:
        """Note that an estimate has ``done`` units, of about ``total`` units of equal cost (vectors or iterations)."""
        if self._began is None or done <= self._began[1]:
            self._began, self._end = (self.evaluations, done), None
            return
        evaluations, units = self._began
        a_unit = (self.evaluations - evaluations) / (done - units)
        self._end = self.evaluations + a_unit * max(total - done, 0.0)

    def foresee(self, evaluations: float) -> None:
        """Note how many more ``evaluations`` the estimate at work will take."""
        self._end = self.evaluations + evaluations

    def add(self, passes: float, batch_size: int) -> None:
        """Count ``passes`` forward-equivalents over ``batch_size`` examples."""
        self.evaluations += passes / GRADIENT * batch_size / self.num_examples
        if self._notify is not None:
            count = Count(self.evaluations)
            if self._end is not None:
                count.left = max(self._end - self.evaluations, 0.0)
            self._notify(count)
