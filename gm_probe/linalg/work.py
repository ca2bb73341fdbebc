"""Counts work in gradient evaluations, so that every figure can say what it cost."""

from __future__ import annotations

from collections.abc import Callable

# In forward passes; a backward pass costs about two. One gradient evaluation = 3.
FORWARD = 1.0
GRADIENT = 3.0
JVP = 3.0  # the primal pass, and a tangent pass of two products a layer
REVERSE_JVP = 7.0  # a gradient, and back through its backward pass
NESTED_JVP = 9.0  # a jvp of a jvp
HESSIAN_PRODUCT = 9.0  # a gradient and its derivative along v, two products for each of a gradient's
TRIPLE_BACKWARD = 18.0  # and once more, by the weights of the examples alone
EXAMPLE_NORMS = 3.0  # back to every layer's output, and its weights' gradient example by example


Expect = Callable[[float, float], None]
"""Called with the units of work that are done, random vectors or iterations, and about how many there will be."""


class Count(float):
    """Gradient evaluations done.

    Attributes:
        left: how many more the estimate at work is expected to take; None where that is unknown.
    """

    left: float | None = None


class Work:
    """A running count of gradient evaluations over all the examples.

    Args:
        num_examples: number of the examples, or of this process's share; a pass over a batch of B counts B/size.
        notify: called with the count after every batch (progress bars).
    """

    def __init__(self, num_examples: int, notify: Callable[[Count], None] | None = None) -> None:
        self.num_examples = num_examples
        self.evaluations = 0.0
        self._notify = notify
        self.begin()

    def begin(self) -> None:
        """Begin an estimate: what was expected of the one before no longer holds."""
        self._began: tuple[float, float] | None = None  # evaluations and units when it first told of itself
        self._end: float | None = None

    def expect(self, done: float, total: float) -> None:
        """Note that an estimate has ``done`` so many of about ``total`` units of equal cost, vectors or iterations."""
        if self._began is None or done <= self._began[1]:
            self._began, self._end = (self.evaluations, done), None
            return
        evaluations, units = self._began
        a_unit = (self.evaluations - evaluations) / (done - units)
        self._end = self.evaluations + a_unit * max(total - done, 0.0)

    def foresee(self, evaluations: float) -> None:
        """Note that the estimate at work will take so many more ``evaluations``."""
        self._end = self.evaluations + evaluations

    def add(self, passes: float, batch_size: int) -> None:
        """Count ``passes`` forward-equivalents over ``batch_size`` examples."""
        self.evaluations += passes / GRADIENT * batch_size / self.num_examples
        if self._notify is not None:
            count = Count(self.evaluations)
            if self._end is not None:
                count.left = max(self._end - self.evaluations, 0.0)
            self._notify(count)
