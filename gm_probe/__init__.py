"""gm_probe: tell how well a trained classifier will generalize, from its checkpoint and unlabeled data.

The public Python API. Names are imported when first used, so that ``import gm_probe`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gm_probe.accuracy.estimate import estimate as estimate
    from gm_probe.accuracy.report import EstimateReport as EstimateReport
    from gm_probe.core.batches import Batches as Batches
    from gm_probe.core.batches import Normalization as Normalization
    from gm_probe.core.checkpoints import load_weights as load_weights
    from gm_probe.core.checkpoints import read_checkpoint as read_checkpoint
    from gm_probe.core.checkpoints import save_checkpoint as save_checkpoint
    from gm_probe.core.contrastive import Contrastive as Contrastive
    from gm_probe.core.contrastive import as_encoder as as_encoder
    from gm_probe.core.contrastive import partners as partners
    from gm_probe.core.contrastive import projector as projector
    from gm_probe.core.datasets import Examples as Examples
    from gm_probe.core.datasets import open_source as open_source
    from gm_probe.core.devices import keep_freed_memory as keep_freed_memory
    from gm_probe.core.door import Outputs as Outputs
    from gm_probe.core.errors import BusyError as BusyError
    from gm_probe.core.errors import CheckpointError as CheckpointError
    from gm_probe.core.errors import DataError as DataError
    from gm_probe.core.errors import DerivativeError as DerivativeError
    from gm_probe.core.errors import DeviceError as DeviceError
    from gm_probe.core.errors import DivergedError as DivergedError
    from gm_probe.core.errors import PrecisionError as PrecisionError
    from gm_probe.core.errors import ProbeError as ProbeError
    from gm_probe.core.errors import ResourceError as ResourceError
    from gm_probe.core.errors import StorageError as StorageError
    from gm_probe.core.errors import UsageError as UsageError
    from gm_probe.core.models import ModelSpec as ModelSpec
    from gm_probe.core.models import build_model as build_model
    from gm_probe.core.parameters import Parameters as Parameters
    from gm_probe.core.pretrained import load_pretrained as load_pretrained
    from gm_probe.probe.fisher_trace import fisher_trace as fisher_trace
    from gm_probe.probe.kl import kl_divergence as kl_divergence
    from gm_probe.probe.measures import MEASURES as MEASURES
    from gm_probe.probe.measures import Report as Report
    from gm_probe.probe.measures import measure as measure
    from gm_probe.probe.operator import Operator as Operator
    from gm_probe.probe.operators import fisher as fisher
    from gm_probe.probe.operators import hessian as hessian
    from gm_probe.probe.pairwise import PairEstimate as PairEstimate
    from gm_probe.probe.pairwise import PairReport as PairReport
    from gm_probe.probe.pairwise import compare as compare
    from gm_probe.probe.probe import Estimate as Estimate
    from gm_probe.probe.settings import Settings as Settings
    from gm_probe.probe.spectrum import eigenpairs as eigenpairs
    from gm_probe.probe.spectrum import lanczos as lanczos
    from gm_probe.probe.trace import trace as trace
    from gm_probe.training.config import TrainConfig as TrainConfig
    from gm_probe.training.loop import train as train
    from gm_probe.training.objectives import FixMatch as FixMatch
    from gm_probe.training.objectives import Joint as Joint
    from gm_probe.training.rule import Rule as Rule
    from gm_probe.training.rules import ASAM as ASAM
    from gm_probe.training.rules import IAMD as IAMD
    from gm_probe.training.rules import IAMS as IAMS
    from gm_probe.training.rules import SAM as SAM
    from gm_probe.training.rules import OnePassIAMD as OnePassIAMD

_HOMES = {
    "accuracy.estimate": ("estimate",),
    "accuracy.report": ("EstimateReport",),
    "core.batches": ("Batches", "Normalization"),
    "core.checkpoints": ("load_weights", "read_checkpoint", "save_checkpoint"),
    "core.contrastive": ("Contrastive", "as_encoder", "partners", "projector"),
    "core.datasets": ("Examples", "open_source"),
    "core.devices": ("keep_freed_memory",),
    "core.door": ("Outputs",),
    "core.errors": (
        "BusyError",
        "CheckpointError",
        "DataError",
        "DerivativeError",
        "DeviceError",
        "DivergedError",
        "PrecisionError",
        "ProbeError",
        "ResourceError",
        "StorageError",
        "UsageError",
    ),
    "core.models": ("ModelSpec", "build_model"),
    "core.parameters": ("Parameters",),
    "core.pretrained": ("load_pretrained",),
    "probe.fisher_trace": ("fisher_trace",),
    "probe.kl": ("kl_divergence",),
    "probe.measures": ("MEASURES", "Report", "measure"),
    "probe.operator": ("Operator",),
    "probe.operators": ("fisher", "hessian"),
    "probe.probe": ("Estimate",),
    "probe.settings": ("Settings",),
    "probe.pairwise": ("PairEstimate", "PairReport", "compare"),
    "probe.spectrum": ("eigenpairs", "lanczos"),
    "probe.trace": ("trace",),
    "training.config": ("TrainConfig",),
    "training.loop": ("train",),
    "training.objectives": ("FixMatch", "Joint"),
    "training.rule": ("Rule",),
    "training.rules": ("ASAM", "IAMD", "IAMS", "OnePassIAMD", "SAM"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
