"""Counts work in gradient evaluations, so that every figure can say what it cost."""

from __future__ import annotations

from collections.abc import Callable

# In forward passes; a backward pass costs about two (METHOD.md). One gradient evaluation = 3.
FORWARD = 1.0
GRADIENT = 3.0
JVP = 3.0  # the primal pass, and a tangent pass of two products a layer
REVERSE_JVP = 7.0  # a gradient, and back through its backward pass
NESTED_JVP = 9.0  # a jvp of a jvp
FORWARD_OVER_REVERSE = 9.0  # a gradient and its tangent, two products for each of a gradient's
THROUGH_GRADIENT = 6.0  # a gradient through a gradient's own graph, which no forward pass precedes
TRIPLE_BACKWARD = 18.0  # and once more, by the weights of the examples alone
EXAMPLE_NORMS = 3.0  # back to every layer's output, and its weights' gradient example by example


class Work:
    """A running count of gradient evaluations over the whole probe set.

    Args:
        num_examples: size of the probe set, or of this process's share; a pass over a batch of B counts B/size.
        notify: called with the count after every batch (progress bars).
    """

    def __init__(self, num_examples: int, notify: Callable[[float], None] | None = None) -> None:
        self.num_examples = num_examples
        self.evaluations = 0.0
        self._notify = notify

    def add(self, passes: float, batch_size: int) -> None:
        """Count ``passes`` forward-equivalents over ``batch_size`` examples."""
        self.evaluations += passes / GRADIENT * batch_size / self.num_examples
        if self._notify is not None:
            self._notify(self.evaluations)
