"""Every setting of one training run, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from gm_probe.checks import one_of, optional, real, whole
from gm_probe.data.reading import Reading
from gm_probe.data.sources import NAMES
from gm_probe.errors import UsageError, did_you_mean
from gm_probe.files.atomic import as_named

CHOICES = {
    "objective": ("supervised", "joint", "fixmatch", "simclr"),
    "unlabeled_mean": ("batch", "mask"),
    "method": ("sgd", "sam", "asam", "iam-d", "iam-d-onepass", "iam-s"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("constant", "cosine", "linear", "multi-step"),
    "sign": ("random", "none", "loss"),
    "kl_grad": ("both", "perturbed"),
    "amp": ("none", "bf16", "fp16"),
}


WHOLE = {
    **dict.fromkeys(("epochs", "batch_size", "k_steps", "mu", "m", "labels", "checkpoint_every"), 1),
    **dict.fromkeys(("num_train", "num_unlabeled", "num_test"), 1),
    **dict.fromkeys(("eval_every", "track_every", "probe_every"), 0),
}
"""Settings that are whole numbers, and their least."""
REAL: dict[str, dict[str, float]] = {
    **{
        name: {"least": 0} for name in ("rho", "beta", "noise_scale", "eta", "lr", "momentum", "weight_decay")
    },
    **{name: {"least": 0} for name in ("gamma", "min_lr", "warmup_epochs", "lambda_u")},
    **{name: {"above": 0} for name in ("temperature", "track_rho", "stop_ce", "clip_norm")},
    "threshold": {"least": 0, "most": 1},
    "ema_decay": {"least": 0, "below": 1},
    "label_smoothing": {"least": 0, "below": 1},
    "validation": {"above": 0, "below": 1},
}
"""Settings that are finite numbers, and their bounds."""
MOST = 2**31 - 1
"""Of a whole number, so that it fits wherever it goes: into an index, a size or a file."""
MOST_THREADS = 1024
"""With many more torch takes the process down."""
PLACE = frozenset({"data_root", "download", "device", "threads", "checkpoint_every"})
"""Settings of where and how a run is computed, no part of what it computes."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of one run; the paper's where METHOD.md fixes them.

    Attributes:
        data: folder, array file, ``digits``, or a torchvision name (data.datasets.open_source).
        image_size, resize, crop: of a folder's images (data.images.Reading).
        skip_bad: leave out images that cannot be decoded; split.json lists them.
        num_train, num_unlabeled, num_test: sizes of the disjoint parts; None = data.splits.split's defaults.
        labels: training examples that keep their labels, as many of each class (None = all).
        validation: share of the training part, drawn by ``split_seed``, that is held out in the test part's place, so
            that settings can be chosen without it (None = none: the test part itself).
        split_seed: draws the parts; apart from ``seed``, so that the runs of a sweep share their data.
        init: checkpoint file or run folder whose weights training starts from; a head for other classes starts
            afresh (models.pretrained.load_pretrained).
        objective: what is learned (training.objectives): from labeled examples alone, jointly with the inconsistency
            of unlabeled ones, or by FixMatch. Batches then hold ``mu`` unlabeled examples for each of the
            ``batch_size`` labeled ones, and an epoch is a pass over the unlabeled ones (training.feeds). SimCLR learns
            from two views of each image, without labels; these serve its linear probes alone.
        threshold, lambda_u, unlabeled_mean: of FixMatch: confidence from which a weak view labels the strong one,
            weight of that loss, and what it is averaged over.
        temperature, probe_every: of SimCLR: τ of NT-Xent, and epochs between linear probes (0 = only at the end).
        method: gradient rule. ``rho`` None takes the rule's own default.
        beta, k_steps, noise_scale, kl_grad, sign, eta: of the rules (training.rules).
        m: batches are worked off in sub-batches of this size: gradient accumulation, and for the rules that
            perturb m-sharpness. None = whole.
        optimizer: base optimizer; ``momentum`` and ``nesterov`` belong to sgd.
        schedule: of the learning rate after ``warmup_epochs`` of linear warm-up; multi-step multiplies by
            ``gamma`` at each of ``milestones`` (epochs), cosine and linear end at ``min_lr``.
        clip_norm: gradients are scaled down to this norm (None = never).
        ema_decay: keep an exponential moving average of the weights, updated every step with this decay. It, with
            the model's own BatchNorm statistics, is what is evaluated, tracked and saved; at the end the weights
            themselves are kept too (runs.records.RAW).
        augment: zero-pad by 4, crop and flip.
        stop_ce: stop once the training cross-entropy (un-augmented, eval mode) is at most this.
        eval_every: epochs between evaluations on the train and test parts (0 = only at the end). With it the weights
            of the lowest test error are kept too: chosen on the test part, their error there is no fair one.
        track_every: epochs between measurements of S_ρ on the unlabeled part (0 = never), by the paper's
            protocol with one step, radius ``track_rho`` and starts of that length.
        checkpoint_every: steps between saved states, beside one an epoch.
        amp: bf16 and fp16 run forward and backward passes under autocast; parameters stay float32. fp16 scales
            the loss; a step whose gradient overflows is skipped.
        tf32: on an NVIDIA GPU, take products of float32 in TF32, faster and to 3 digits; measurements stay in float32.
        deterministic: use only algorithms that give the same bits in every run (on a CPU all do).
        threads: CPU threads, set by the command line and the sweep (None = torch's own choice).
    """

    data: str = "digits"
    data_root: str | None = None
    download: bool = False
    image_size: int | None = None
    resize: int | None = None
    crop: int | None = None
    skip_bad: bool = False
    num_train: int | None = None
    labels: int | None = None
    num_unlabeled: int | None = None
    num_test: int | None = None
    validation: float | None = None
    split_seed: int = 0
    model: str = "6cnn"
    init: str | None = None
    objective: str = "supervised"
    mu: int = 7
    threshold: float = 0.95
    lambda_u: float = 1.0
    unlabeled_mean: str = "batch"
    temperature: float = 0.5
    probe_every: int = 0
    method: str = "sgd"
    rho: float | None = None
    beta: float = 1.0
    k_steps: int = 1
    noise_scale: float = 0.1
    kl_grad: str = "both"
    sign: str = "random"
    eta: float = 0.01
    m: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    epochs: int = 30
    batch_size: int = 128
    schedule: str = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.2
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    clip_norm: float | None = None
    ema_decay: float | None = None
    label_smoothing: float = 0.0
    augment: bool = False
    stop_ce: float | None = None
    eval_every: int = 0
    track_every: int = 0
    track_rho: float = 0.1
    amp: str = "none"
    tf32: bool = False
    deterministic: bool = False
    checkpoint_every: int | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), hint))
        for name, choices in CHOICES.items():
            one_of(name, getattr(self, name), choices)
        for name, least in WHOLE.items():
            optional(whole, name, getattr(self, name), least, MOST)
        optional(whole, "threads", self.threads, 1, MOST_THREADS)
        for name in ("seed", "split_seed"):
            whole(name, getattr(self, name), 0, 2**32 - 1)
        for name, bounds in REAL.items():
            optional(real, name, getattr(self, name), **bounds)
        if self.method == "iam-d-onepass":  # it follows the gradient of β·KL
            real("beta", self.beta, above=0)
        if self.method in {"iam-d", "iam-s"}:  # at δ = 0 the KL has no gradient to ascend
            real("noise_scale", self.noise_scale, above=0)
        for epoch in self.milestones:
            whole("milestones", epoch, 0, MOST)
        if self.min_lr and (self.schedule not in {"cosine", "linear"} or self.min_lr > self.lr):
            raise UsageError(
                f"min_lr = {self.min_lr} must be at most lr = {self.lr}; a cosine or linear schedule ends "
                "there"
            )
        Reading(None, self.image_size, self.resize, self.crop)  # which checks them
        self._check_objective()
        if self.nesterov and self.momentum == 0:
            raise UsageError("nesterov needs a momentum above 0")
        if self.schedule == "multi-step" and not self.milestones:
            raise UsageError(
                "schedule = 'multi-step' needs milestones (epochs at which lr is multiplied by gamma)"
            )

    def _check_objective(self) -> None:
        if self.objective == "supervised":
            return
        if self.objective == "simclr":
            self._check_simclr()
            return
        if self.labels is None:
            raise UsageError(
                f"objective = {self.objective!r} needs labels, the number of training examples that keep "
                "their labels"
            )
        if self.m is not None:
            raise UsageError(f"m splits supervised batches only, not those of objective = {self.objective!r}")
        if self.objective == "fixmatch" and self.augment:
            raise UsageError("fixmatch has its own augmentations. Leave out augment")

    def _check_simclr(self) -> None:
        if self.batch_size < 2:
            raise UsageError("simclr compares images: batch_size must be at least 2")
        refused = {
            "m": (self.m is not None, "NT-Xent compares all views of a batch, so the batch cannot be split"),
            "augment": (self.augment, "simclr has its own augmentations"),
            "stop_ce": (self.stop_ce is not None, "an encoder has no training cross-entropy to stop at"),
            "label_smoothing": (self.label_smoothing > 0, "there are no labels to smooth"),
            "eval_every": (
                self.eval_every > 0,
                "an encoder is evaluated by linear probes, probe_every epochs",
            ),
        }
        for name, (given, reason) in refused.items():
            if given:
                raise UsageError(f"simclr takes no {name}: {reason}")

    def idle(self) -> dict[str, str]:
        """Settings that this run does not use, and which other one would make it."""
        used_by = {
            "mu": ("objective", self.objective in {"joint", "fixmatch"}),
            "rho": ("method", self.method != "sgd"),
            "beta": ("method", self.method.startswith("iam-d")),
            "kl_grad": ("method", self.method.startswith("iam-d")),
            "k_steps": ("method", self.method in {"iam-d", "iam-s"}),
            "noise_scale": ("method", self.method in {"iam-d", "iam-s"}),
            "sign": ("method", self.method == "iam-s"),
            "eta": ("method", self.method == "asam"),
            "momentum": ("optimizer", self.optimizer == "sgd"),
            "nesterov": ("optimizer", self.optimizer == "sgd"),
            "milestones": ("schedule", self.schedule == "multi-step"),
            "gamma": ("schedule", self.schedule == "multi-step"),
            "min_lr": ("schedule", self.schedule in {"cosine", "linear"}),
            "track_rho": ("track_every", self.track_every > 0),
        }
        used_by |= dict.fromkeys(
            ("threshold", "lambda_u", "unlabeled_mean"), ("objective", self.objective == "fixmatch")
        )
        used_by |= dict.fromkeys(("temperature", "probe_every"), ("objective", self.objective == "simclr"))
        return {name: by for name, (by, used) in used_by.items() if not used}

    def unreached(self) -> dict[str, str]:
        """Settings whose epoch does not come within this run, and what does not happen therefore."""
        late = [epoch for epoch in self.milestones if epoch >= self.epochs]
        found = {}
        if self.warmup_epochs > self.epochs:
            found["warmup_epochs"] = f"lr never rises to {self.lr:g}"
        if self.schedule == "multi-step" and late:
            found["milestones"] = f"lr is never lowered at {', '.join(map(str, late))}"
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Check names and types.

        Raises:
            UsageError: an unknown setting, or one of another type.
        """
        hints = _hints()
        checked: dict[str, Any] = {}
        for name, value in values.items():
            if name not in hints:
                raise UsageError(f"no setting {name!r}; {did_you_mean(name, hints)}")
            checked[name] = _typed(name, value, hints[name])
        paths = {
            name: checked[name] for name in ("data", "data_root", "init") if checked.get(name) is not None
        }
        checked |= {name: as_named(path) for name, path in paths.items()}
        data = checked.get("data", "digits")
        if data not in NAMES and Path(data).exists():  # a run must find its data from any folder
            checked["data"] = str(Path(data).resolve())
        if checked.get("init") is not None:
            checked["init"] = str(Path(checked["init"]).resolve())
        return cls(**checked)

    @classmethod
    def from_record(cls, config: Mapping[str, Any]) -> TrainConfig:
        """The settings in a run's config.toml."""
        return cls.from_dict({key: value for key, value in config.items() if key != "environment"})

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "milestones": list(self.milestones)}

    def identity(self) -> dict[str, Any]:
        """What the run computes: every setting that is not at its default and no matter of place.

        Defaults are left out, so that a setting added later changes no existing run's identity.
        """
        default = TrainConfig().as_dict()
        return {
            key: value for key, value in self.as_dict().items() if key not in PLACE and value != default[key]
        }

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with ``changes``, checked anew."""
        return TrainConfig.from_dict({**self.as_dict(), **changes})


SETTINGS = tuple(field.name for field in fields(TrainConfig))


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def _typed(name: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None:
        if type(None) in kinds:
            return None
        raise UsageError(f"{name} needs a value")
    if name == "milestones":
        if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            return tuple(value)
        raise UsageError(f"milestones = {value!r} must be a list of epochs")
    kind = next(k for k in kinds if k is not type(None))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{name} = {value!r} must be of type {kind.__name__}")
    return value
