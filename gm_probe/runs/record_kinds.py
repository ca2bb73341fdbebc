"""The schema of each file of a run or sweep: its keys and the kinds of their values. Imports no torch.

Keys that no schema names may be there, for files of other versions and other people's settings. Their values are
bounded (``schema.bounded``) and of the kind that every reader of the file takes.
"""

from pathlib import PurePosixPath
from typing import Any

from gm_probe.files.schema import (
    Check,
    Unfit,
    anything,
    count,
    either,
    finite,
    flag,
    listed,
    mapping,
    number,
    one_of,
    optional,
    scalar,
    table,
    text,
)

MOST_MEASURES = 60
"""The most measures of one run."""
MOST_RUNS = 10**6
"""The most runs of one sweep."""
STATUSES = ("finished", "diverged", "failed")
"""What a summary says of a run that has ended."""
ERRORS = ("train_error", "test_error", "train_ce", "test_ce")
"""The errors and cross-entropies of a finished run; a SimCLR encoder's are those of its linear probe."""
RESULTS = ("error_gap", "ce_gap", *ERRORS)
"""What a summary says of a finished classifier."""
_IDENTITY = frozenset({"run", "status", "reason"})
"""Columns of the table of all runs that no file names."""

# ---- config.toml

# fmt: off
_TEXTS = (
    "data", "data_root", "model", "init", "objective", "unlabeled_mean", "method", "kl_grad", "sign", "optimizer",
    "schedule", "amp", "noise_device", "device",
)
_FLAGS = ("download", "skip_bad", "nesterov", "augment", "tf32", "deterministic")
_COUNTS = (
    "image_size", "resize", "crop", "num_train", "labels", "num_unlabeled", "num_test", "split_seed", "mu",
    "probe_every", "k_steps", "every", "m", "epochs", "batch_size", "eval_every", "track_every", "checkpoint_every",
    "seed", "threads",
)
_NUMBERS = (
    "validation", "threshold", "lambda_u", "temperature", "rho", "beta", "noise_scale", "eta", "tail", "lr", "momentum",
    "weight_decay", "gamma", "warmup_epochs", "min_lr", "clip_norm", "ema_decay", "label_smoothing", "stop_ce",
    "track_rho",
)
# fmt: on
SETTING_KINDS: dict[str, Check] = {
    **dict.fromkeys(_TEXTS, optional(text)),
    **dict.fromkeys(_FLAGS, flag),
    **dict.fromkeys(_COUNTS, optional(count)),
    **dict.fromkeys(_NUMBERS, optional(number)),
    "milestones": listed(count),
}
"""The kind of every setting of a training run; None (in a sweep.json) is a setting that is not set."""
_PLAIN = either("a number, a text, true or false, or a list of these", scalar, listed(scalar))
_OTHERS = either(
    "a number, a text, true or false, or a list or table of these", optional(_PLAIN), mapping(anything)
)
_NO_SETTINGS = _IDENTITY | set(RESULTS)
CONFIG_KIND = table({**SETTING_KINDS, "environment": mapping(_PLAIN)}, others=_OTHERS, refused=_NO_SETTINGS)

# ---- summary.json

SUMMARY_KIND = table(
    {
        "status": one_of(*STATUSES),
        "reason": optional(text),
        "met_stop_ce": optional(flag),
        "epochs": count,
        "num_train": count,
        "num_test": count,
        **dict.fromkeys((*RESULTS, *(f"probe_{name}" for name in RESULTS), "nt_xent"), optional(number)),
    },
    others=optional(_PLAIN),
    refused={"run"},
)

# ---- measures.json

_NUMBERS_BY_START = either("a list or table of numbers", listed(optional(number)), mapping(optional(number)))
_CELL = table(
    {
        "rho": number,
        "value": optional(number),
        "k_steps": count,
        "converged": flag,
        "starts": listed(optional(number)),
    },
    required=("rho", "value"),
)
_EIGENVALUE = table(
    {"value": optional(number), "residual": optional(number), "converged": flag},
    required=("value", "residual", "converged"),
)
_ALWAYS = ("value", "stderr", "stderr_examples", "converged", "num_evals")
_ROW_KINDS: dict[str, Check] = {
    **dict.fromkeys(("value", "stderr", "stderr_examples"), optional(number)),
    **dict.fromkeys(
        ("sd_starts", "runner_up", "quadratic_ratio", "estimator_above_target"), optional(number)
    ),
    **dict.fromkeys(("num_starts", "num_probes", "iterations", "examples_needed"), count),
    **dict.fromkeys(("reason", "reason_stderr", "reason_stderr_examples", "labels", "protocol"), text),
    "num_evals": number,
    "converged": flag,
    "starts": _NUMBERS_BY_START,
    "grid": listed(_CELL),
    "eigenvalues": listed(_EIGENVALUE),
}
_ROW = table(_ROW_KINDS)
_WHOLE_ROW = table(_ROW_KINDS, required=_ALWAYS)
_NO_MEASURES = _IDENTITY | {*RESULTS, "num_train", "num_test"}
MEASURED_SETTING_KINDS: dict[str, Check] = {
    "temperature": optional(finite),
    **dict.fromkeys(("rho", "noise_scale", "eta", "target_error"), finite),
    **dict.fromkeys(("ascent_tolerance", "eigen_tolerance", "trace_tolerance"), finite),
    **dict.fromkeys(("k_steps", "num_starts", "min_probes", "max_probes", "max_iterations", "seed"), count),
    **dict.fromkeys(("sub_batch", "top_eigenvalues"), count),
    **dict.fromkeys(("max_examples", "num_examples", "num_images", "batch_images"), optional(count)),
    **dict.fromkeys(("protocol", "params", "data", "part", "dtype"), text),
    "head": optional(text),
    "tf32": flag,
    "noise_device": text,
    "rho_grid": listed(finite),
    "k_grid": listed(count),
    "mean": listed(finite),
    "std": listed(finite),
}
_MEASURED_SETTINGS = table(MEASURED_SETTING_KINDS, others=_OTHERS)
MEASURES_KIND = table(
    {
        "measures": mapping(_ROW, refused=_NO_MEASURES, most=MOST_MEASURES),
        "settings": _MEASURED_SETTINGS,
        "density": optional(mapping(mapping(anything))),
    }
)
RESULT_KIND = table(
    {
        "checkpoint": text,
        "model": text,
        "measures": mapping(_WHOLE_ROW, refused=_NO_MEASURES, most=MOST_MEASURES),
        "settings": table(
            MEASURED_SETTING_KINDS, required=("rho", "k_steps", "seed", "target_error"), others=_OTHERS
        ),
        **dict.fromkeys(("num_parameters", "num_examples", "num_classes"), count),
        **dict.fromkeys(("batch_size", "out_of_memory_at"), optional(count)),
        "density": optional(mapping(mapping(anything))),
    },
    required=("checkpoint", "model", "num_parameters", "num_examples", "num_classes", "settings", "measures"),
)
"""A measures.json that is shown as it stands has every key that is shown."""

# ---- the others

METRICS_KIND = table(
    {
        "epoch": count,
        "seconds": finite,
        **dict.fromkeys(("test_error", "probe_test_error", "gradient_evaluations"), optional(number)),
    },
    required=("epoch",),
    others=optional(_PLAIN),
)
SPLIT_KIND = table(
    {"sha256": text, "skipped": listed(text), "unlabeled_marks": listed(text)},
    required=("train", "unlabeled", "sha256"),
    others=listed(count),
)


def _run_name(name: str) -> None:
    """Refuse a name that leads out of the sweep's folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or name.startswith(("/", "\\")) or ".." in parts or "\0" in name or ":" in parts[0]:
        raise Unfit(f"runs has the name {name!r}, which is not a folder inside the sweep's folder")


def _runs(value: Any, place: str) -> None:
    mapping(table(SETTING_KINDS, others=_OTHERS), most=MOST_RUNS)(value, place)
    for name in value:
        _run_name(name)


GROUPS_KIND = table({"group_by": listed(text)})
"""What is read of a sweep.json where its runs are not."""
SWEEP_KIND = table(
    {
        "runs": _runs,
        "measures": listed(text),
        "settings": _MEASURED_SETTINGS,
        "coupled": mapping(_OTHERS),
        "batch_size": optional(count),
        "group_by": listed(text),
    },
    required=("runs", "measures", "settings"),
)
