"""gm_probe: tell how well a trained classifier will generalize, from its checkpoint and unlabeled data.

The public Python API. Names are imported when first used, so that ``import gm_probe`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gm_probe.accuracy.estimate import estimate as estimate
    from gm_probe.accuracy.report import EstimateReport as EstimateReport
    from gm_probe.analysis.correlation import correlate as correlate
    from gm_probe.analysis.results import Correlations as Correlations
    from gm_probe.curvature.fisher_trace import fisher_trace as fisher_trace
    from gm_probe.curvature.operators import fisher as fisher
    from gm_probe.curvature.operators import hessian as hessian
    from gm_probe.data.batches import Batches as Batches
    from gm_probe.data.datasets import open_source as open_source
    from gm_probe.data.examples import Examples as Examples
    from gm_probe.data.normalization import Normalization as Normalization
    from gm_probe.errors import BusyError as BusyError
    from gm_probe.errors import CheckpointError as CheckpointError
    from gm_probe.errors import DataError as DataError
    from gm_probe.errors import DerivativeError as DerivativeError
    from gm_probe.errors import DeviceError as DeviceError
    from gm_probe.errors import DivergedError as DivergedError
    from gm_probe.errors import NotInstalledError as NotInstalledError
    from gm_probe.errors import PrecisionError as PrecisionError
    from gm_probe.errors import ProbeError as ProbeError
    from gm_probe.errors import ResourceError as ResourceError
    from gm_probe.errors import StorageError as StorageError
    from gm_probe.errors import UsageError as UsageError
    from gm_probe.inconsistency.kl import kl_divergence as kl_divergence
    from gm_probe.linalg.lanczos import eigenpairs as eigenpairs
    from gm_probe.linalg.lanczos import lanczos as lanczos
    from gm_probe.linalg.operator import Operator as Operator
    from gm_probe.linalg.trace import trace as trace
    from gm_probe.measures.catalogue import MEASURES as MEASURES
    from gm_probe.measures.estimates import Estimate as Estimate
    from gm_probe.measures.measure import Report as Report
    from gm_probe.measures.measure import measure as measure
    from gm_probe.measures.pairwise import PairEstimate as PairEstimate
    from gm_probe.measures.pairwise import PairReport as PairReport
    from gm_probe.measures.pairwise import compare as compare
    from gm_probe.measures.settings import Settings as Settings
    from gm_probe.models.checkpoints import read_checkpoint as read_checkpoint
    from gm_probe.models.checkpoints import save_checkpoint as save_checkpoint
    from gm_probe.models.contrastive import Contrastive as Contrastive
    from gm_probe.models.contrastive import as_encoder as as_encoder
    from gm_probe.models.contrastive import partners as partners
    from gm_probe.models.contrastive import projector as projector
    from gm_probe.models.door import Outputs as Outputs
    from gm_probe.models.fitting import load_weights as load_weights
    from gm_probe.models.parameters import Parameters as Parameters
    from gm_probe.models.pretrained import load_pretrained as load_pretrained
    from gm_probe.models.zoo import ModelSpec as ModelSpec
    from gm_probe.models.zoo import build_model as build_model
    from gm_probe.runtime.machine import keep_freed_memory as keep_freed_memory
    from gm_probe.training.config import TrainConfig as TrainConfig
    from gm_probe.training.loop import train as train
    from gm_probe.training.methods.iam import IAMD as IAMD
    from gm_probe.training.methods.iam import IAMS as IAMS
    from gm_probe.training.methods.iam import OnePassIAMD as OnePassIAMD
    from gm_probe.training.methods.sam import ASAM as ASAM
    from gm_probe.training.methods.sam import SAM as SAM
    from gm_probe.training.objectives.fixmatch import FixMatch as FixMatch
    from gm_probe.training.objectives.joint import Joint as Joint
    from gm_probe.training.rule import Rule as Rule

_HOMES = {
    "accuracy.estimate": "estimate",
    "accuracy.report": "EstimateReport",
    "analysis.correlation": "correlate",
    "analysis.results": "Correlations",
    "curvature.fisher_trace": "fisher_trace",
    "curvature.operators": "fisher hessian",
    "data.batches": "Batches",
    "data.datasets": "open_source",
    "data.examples": "Examples",
    "data.normalization": "Normalization",
    "errors": "BusyError CheckpointError DataError DerivativeError DeviceError DivergedError "
    "NotInstalledError PrecisionError ProbeError ResourceError StorageError UsageError",
    "inconsistency.kl": "kl_divergence",
    "linalg.lanczos": "eigenpairs lanczos",
    "linalg.operator": "Operator",
    "linalg.trace": "trace",
    "measures.catalogue": "MEASURES",
    "measures.estimates": "Estimate",
    "measures.measure": "Report measure",
    "measures.pairwise": "PairEstimate PairReport compare",
    "measures.settings": "Settings",
    "models.checkpoints": "read_checkpoint save_checkpoint",
    "models.contrastive": "Contrastive as_encoder partners projector",
    "models.door": "Outputs",
    "models.fitting": "load_weights",
    "models.parameters": "Parameters",
    "models.pretrained": "load_pretrained",
    "models.zoo": "ModelSpec build_model",
    "runtime.machine": "keep_freed_memory",
    "training.config": "TrainConfig",
    "training.loop": "train",
    "training.methods.iam": "IAMD IAMS OnePassIAMD",
    "training.methods.sam": "ASAM SAM",
    "training.objectives.fixmatch": "FixMatch",
    "training.objectives.joint": "Joint",
    "training.rule": "Rule",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name == "optim":
        return import_module(f"{__name__}.optim")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, "optim"]
