"""The training methods by name. This is the only place that lists them; the code of each is in its own file.

Nothing here imports torch, so that an unknown method or a bad option is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Method:
    """A choice of `gmprobe train --method`.

    Attributes:
        home: ``module:class`` of its rule.
        settings: fields of ``TrainConfig`` that the rule takes as options of the same names.
        positive: those of the settings that may not be 0.
    """

    home: str
    settings: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()

    @property
    def rule(self) -> Any:
        """The class of its gradient rule."""
        module, name = self.home.split(":")
        return vars(import_module(module))[name]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Build the rule."""
        return self.rule(*args, **options)


_SAM, _IAM = "gm_probe.training.methods.sam", "gm_probe.training.methods.iam"
_WHEN = ("every", "tail")
_ASCENT = ("rho", "k_steps", "noise_scale")

METHODS: dict[str, Method] = {
    "sgd": Method("gm_probe.training.rule:Rule"),
    "sam": Method(f"{_SAM}:SAM", ("rho", *_WHEN)),
    "asam": Method(f"{_SAM}:ASAM", ("rho", "eta", *_WHEN)),
    # at δ = 0 the KL has no gradient to ascend
    "iam-d": Method(f"{_IAM}:IAMD", (*_ASCENT, "beta", "kl_grad", *_WHEN), ("noise_scale",)),
    # δ follows the gradient of β·KL
    "iam-d-onepass": Method(f"{_IAM}:OnePassIAMD", ("rho", "beta", "kl_grad", *_WHEN), ("beta",)),
    "iam-s": Method(f"{_IAM}:IAMS", (*_ASCENT, "sign", *_WHEN), ("noise_scale",)),
}
