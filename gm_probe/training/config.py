"""Every setting of one training run, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from gm_probe.checks import optional, real, whole
from gm_probe.data.image_reading import ImageReading
from gm_probe.data.names import NAMES
from gm_probe.errors import UsageError, did_you_mean
from gm_probe.files.atomic import as_named
from gm_probe.setting import setting, validate
from gm_probe.training.methods import METHODS
from gm_probe.training.objectives import OBJECTIVES, trains_encoder

MOST = 2**31 - 1
"""Upper bound of whole numbers, so that they fit into an index, a size or a file."""
MOST_SEED = 2**32 - 1
MOST_THREADS = 1024
"""Upper bound of threads; with many more, torch ends the process."""
PLACE = frozenset({"data_root", "download", "device", "threads", "checkpoint_every"})
"""Settings of where and how a run is computed, which do not change its result."""


MAIN, DATA, OBJECTIVE, METHOD = "Main options", "Data", "Objective", "Method"
OPTIMIZER, EVALUATION, MACHINE = "Optimizer and schedule", "Evaluation", "Machine and precision"
GROUPS = (MAIN, DATA, OBJECTIVE, METHOD, OPTIMIZER, EVALUATION, MACHINE)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of one run: each field has its help, its group and its bounds (see ``setting``)."""

    data: str = setting("digits", MAIN, "Image folder, array file or data set name; see `gmprobe datasets`.")
    data_root: str | None = setting(None, DATA, "Folder in which torchvision keeps its data sets.")
    download: bool = setting(False, DATA, "Let torchvision download what is missing.")
    image_size: int | None = setting(
        None, DATA, "Resize images to this many pixels a side, whatever their aspect ratio."
    )
    resize: int | None = setting(
        None, DATA, "Resize the shorter side of images to this many pixels, as torchvision does."
    )
    crop: int | None = setting(None, DATA, "Then cut this many pixels a side from the centre.")
    skip_bad: bool = setting(False, DATA, "Leave out images that cannot be decoded; split.json lists them.")
    num_train: int | None = setting(
        None, DATA, "Number of training examples.", unset="all that remain", least=1
    )
    labels: int | None = setting(
        None,
        OBJECTIVE,
        "Keep the labels of this many training examples, the same number of each class.",
        unset="all",
        least=1,
    )
    num_unlabeled: int | None = setting(
        None,
        DATA,
        "Number of unlabeled examples, disjoint from the training examples.",
        unset="a quarter, at most 5000",
        least=1,
    )
    num_test: int | None = setting(
        None, DATA, "Number of test examples.", unset="the data's test part, or a quarter", least=1
    )
    validation: float | None = setting(
        None,
        EVALUATION,
        "Hold out this share of the training part and evaluate on it in place of the test part.",
        unset="none",
        above=0,
        below=1,
    )
    split_seed: int = setting(
        0,
        DATA,
        "Seed of the split. Runs that differ only in --seed share their data.",
        least=0,
        most=MOST_SEED,
    )
    model: str = setting("6cnn", MAIN, "Network; see `gmprobe models`.")
    init: str | None = setting(
        None,
        OBJECTIVE,
        "Start from the weights of this checkpoint. A head for another number of classes starts afresh.",
    )
    objective: str = setting(
        "supervised",
        OBJECTIVE,
        "What is learned. joint and fixmatch need --labels; simclr reads no labels.",
        choices=OBJECTIVES,
    )
    mu: int = setting(7, OBJECTIVE, "Unlabeled examples per labeled example in joint and fixmatch.", least=1)
    threshold: float = setting(
        0.95, OBJECTIVE, "FixMatch takes a prediction of this confidence as a label.", least=0, most=1
    )
    lambda_u: float = setting(1.0, OBJECTIVE, "Weight of FixMatch's loss on unlabeled examples.", least=0)
    unlabeled_mean: str = setting(
        "batch",
        OBJECTIVE,
        "Average FixMatch's loss over the whole batch, or over the examples above the threshold.",
        choices=("batch", "mask"),
    )
    temperature: float = setting(0.5, OBJECTIVE, "Temperature of SimCLR's NT-Xent loss.", above=0)
    probe_every: int = setting(
        0, EVALUATION, "Epochs between SimCLR's linear probes; 0 probes only at the end.", least=0
    )
    method: str = setting(
        "sgd",
        MAIN,
        "Gradient rule.",
        choices=METHODS,
    )
    rho: float | None = setting(
        None,
        MAIN,
        "Radius of the perturbation in parameter space.",
        unset="0.05 for sam, 0.5 for asam, 0.1 for iam-*",
        least=0,
    )
    beta: float = setting(1.0, METHOD, "Weight of IAM-D's KL term.", least=0)
    k_steps: int = setting(1, METHOD, "Ascent steps of IAM.", least=1)
    noise_scale: float = setting(0.1, METHOD, "Length of the random start of IAM's ascent.", least=0)
    kl_grad: str = setting(
        "both",
        METHOD,
        "IAM-D differentiates both sides of the KL divergence, or the perturbed side only.",
        choices=("both", "perturbed"),
    )
    sign: str = setting(
        "random",
        METHOD,
        "IAM-S flips its perturbation at random, never, or so that the loss rises.",
        choices=("random", "none", "loss"),
    )
    eta: float = setting(0.01, METHOD, "ASAM's stabiliser, added to the weights' magnitudes.", least=0)
    every: int = setting(
        1, METHOD, "Perturb in each step of this number only; the others are plain steps.", least=1
    )
    tail: float = setting(
        1.0, METHOD, "Perturb in this last share of all steps only, such as 0.3.", above=0, most=1
    )
    m: int | None = setting(
        None,
        METHOD,
        "Process each batch in sub-batches of this size: gradient accumulation, and m-sharpness for rules "
        "that perturb.",
        unset="whole batches",
        least=1,
    )
    optimizer: str = setting(
        "sgd", OPTIMIZER, "Optimizer that takes the rule's gradient.", choices=("sgd", "adamw")
    )
    lr: float = setting(0.05, MAIN, "Learning rate.", least=0)
    momentum: float = setting(0.9, OPTIMIZER, "Momentum of sgd.", least=0)
    nesterov: bool = setting(False, OPTIMIZER, "Use Nesterov's momentum.")
    weight_decay: float = setting(0.0, MAIN, "Weight decay.", least=0)
    epochs: int = setting(30, MAIN, "Number of epochs.", least=1)
    batch_size: int = setting(128, MAIN, "Examples per batch.", least=1)
    schedule: str = setting(
        "constant",
        OPTIMIZER,
        "Schedule of the learning rate after the warm-up.",
        choices=("constant", "cosine", "linear", "multi-step"),
    )
    milestones: tuple[int, ...] = setting(
        (),
        OPTIMIZER,
        "Epochs at which multi-step lowers the rate, such as 60,120,160.",
        unset="none",
        least=0,
        most=MOST,
    )
    gamma: float = setting(0.2, OPTIMIZER, "Factor of multi-step at each milestone.", least=0)
    warmup_epochs: float = setting(0.0, OPTIMIZER, "Epochs of linear warm-up.", least=0)
    min_lr: float = setting(0.0, OPTIMIZER, "Learning rate at the end of cosine and linear.", least=0)
    clip_norm: float | None = setting(
        None, OPTIMIZER, "Scale gradients down to this norm.", unset="never", above=0
    )
    ema_decay: float | None = setting(
        None,
        OPTIMIZER,
        "Evaluate and save an exponential moving average of the weights with this decay.",
        unset="none",
        least=0,
        below=1,
    )
    label_smoothing: float = setting(
        0.0, OPTIMIZER, "Smooth the labels by this much in the training loss.", least=0, below=1
    )
    augment: bool = setting(False, DATA, "Augment training images: zero-pad by 4, crop, flip.")
    stop_ce: float | None = setting(
        None,
        EVALUATION,
        "Stop once the training cross-entropy is at most this, in eval mode without augmentation.",
        unset="never",
        above=0,
    )
    eval_every: int = setting(
        0,
        EVALUATION,
        "Epochs between evaluations; 0 evaluates only at the end. The weights of the lowest test error are "
        "kept, too.",
        least=0,
    )
    track_every: int = setting(
        0, EVALUATION, "Epochs between measurements of S_ρ on the unlabeled part; 0 takes none.", least=0
    )
    track_rho: float = setting(0.1, EVALUATION, "Radius of that S_ρ.", above=0)
    amp: str = setting(
        "none",
        MACHINE,
        "Mixed precision: autocast forward and backward passes.",
        choices=("none", "bf16", "fp16"),
    )
    tf32: bool = setting(
        False,
        MACHINE,
        "Let an NVIDIA GPU round float32 products to TF32. It is faster, but keeps three digits, also in IAM's ascent.",
    )
    noise_device: str = setting(
        "device",
        MACHINE,
        "Draw the noise of iam-* on the training device, or on the CPU for the noise of a run on the CPU.",
        choices=("device", "cpu"),
    )
    deterministic: bool = setting(
        False, MACHINE, "Use only algorithms that give the same bits in every run. They may be slower."
    )
    checkpoint_every: int | None = setting(
        None, MACHINE, "Save the state every so many steps.", unset="once an epoch", least=1
    )
    seed: int = setting(0, MAIN, "Seed of weights, batches and perturbations.", least=0, most=MOST_SEED)
    device: str = setting(
        "auto", MAIN, "Device to train on: auto, cpu, cuda, cuda:1, or another device of torch."
    )
    threads: int | None = setting(
        None, MACHINE, "CPU threads.", unset="torch's choice", least=1, most=MOST_THREADS
    )

    def __post_init__(self) -> None:
        validate(self)
        for each in fields(self):
            if type(value := getattr(self, each.name)) is int and "most" not in each.metadata["rule"]:
                whole(each.name, value, 0, MOST)
        for name in METHODS[self.method].positive:
            optional(real, name, getattr(self, name), above=0)
        if self.min_lr and (self.schedule not in {"cosine", "linear"} or self.min_lr > self.lr):
            raise UsageError(
                f"min_lr = {self.min_lr} must be at most lr = {self.lr}; a cosine or linear schedule ends "
                "there"
            )
        ImageReading(None, self.image_size, self.resize, self.crop)  # which checks them
        self._check_objective()
        if self.nesterov and self.momentum == 0:
            raise UsageError("nesterov needs a momentum above 0")
        if self.schedule == "multi-step" and not self.milestones:
            raise UsageError(
                "schedule = 'multi-step' needs milestones (epochs at which lr is multiplied by gamma)"
            )

    def _check_objective(self) -> None:
        choice, default = OBJECTIVES[self.objective], _defaults()
        if choice.needs_labels and self.labels is None:
            raise UsageError(
                f"objective = {self.objective!r} needs labels, the number of training examples that keep "
                "their labels"
            )
        if self.batch_size < choice.least_batch:
            raise UsageError(
                f"{self.objective} compares images: batch_size must be at least {choice.least_batch}"
            )
        for name, reason in choice.refused.items():
            if getattr(self, name) != default[name]:
                raise UsageError(f"{self.objective} takes no {name}: {reason}")

    @property
    def trains_encoder(self) -> bool:
        """True where the run trains a SimCLR encoder, which has no head for classes and gets linear probes."""
        return trains_encoder(self.objective)

    def idle(self) -> dict[str, str]:
        """Return the settings that this run does not use, each with the setting that decides about it."""
        users = {
            "momentum": ("optimizer", ("sgd",)),
            "nesterov": ("optimizer", ("sgd",)),
            "milestones": ("schedule", ("multi-step",)),
            "gamma": ("schedule", ("multi-step",)),
            "min_lr": ("schedule", ("cosine", "linear")),
        }
        for by, choices in (("method", METHODS), ("objective", OBJECTIVES)):
            for name in dict.fromkeys(name for choice in choices.values() for name in choice.settings):
                users[name] = by, tuple(key for key, choice in choices.items() if name in choice.settings)
        idle = {name: by for name, (by, values) in users.items() if getattr(self, by) not in values}
        return idle | ({} if self.track_every else {"track_rho": "track_every"})

    def unreached(self) -> dict[str, str]:
        """Return the settings whose epoch is not within this run, each with what does not happen because of it."""
        late = [epoch for epoch in self.milestones if epoch >= self.epochs]
        found = {}
        if self.warmup_epochs > self.epochs:
            found["warmup_epochs"] = f"lr never rises to {self.lr:g}"
        if self.schedule == "multi-step" and late:
            found["milestones"] = f"lr is never lowered at {', '.join(map(str, late))}"
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of a dict, after checks of names and types.

        Raises:
            UsageError: a setting is unknown or has another type.
        """
        found: dict[str, Any] = {}
        for name, value in values.items():
            if name not in SETTINGS:
                raise UsageError(f"no setting {name!r}; {did_you_mean(name, SETTINGS)}")
            found[name] = tuple(value) if isinstance(value, list) else value
            if name in {"data", "data_root", "init"} and isinstance(value, str):
                found[name] = as_named(value)
        for name in ("data", "init"):  # a run must find them from every folder
            path = found.get(name)
            if isinstance(path, str) and path not in NAMES and (name == "init" or Path(path).exists()):
                found[name] = str(Path(path).resolve())
        return cls(**found)

    @classmethod
    def from_record(cls, config: Mapping[str, Any]) -> TrainConfig:
        """Return the settings in a run's config.toml."""
        return cls.from_dict({key: value for key, value in config.items() if key != "environment"})

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {**asdict(self), "milestones": list(self.milestones)}

    def identity(self) -> dict[str, Any]:
        """Return what identifies the run: every setting that differs from its default and is not in ``PLACE``.

        Without defaults, a setting that is added later does not change the identity of existing runs.
        """
        default = {**_defaults(), "milestones": []}
        return {
            key: value for key, value in self.as_dict().items() if key not in PLACE and value != default[key]
        }

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with ``changes``, which is checked again."""
        return TrainConfig.from_dict({**self.as_dict(), **changes})


SETTINGS = tuple(each.name for each in fields(TrainConfig))


@cache
def _defaults() -> dict[str, Any]:
    return {each.name: each.default for each in fields(TrainConfig)}
