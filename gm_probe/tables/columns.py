"""What a column of anybody's table is by its name: a gap, a measure, a setting, an outcome, a status, or none of these.

Trackers and people write one name in many ways (``LR``, ``Learning Rate``, ``params.lr``, ``config/learningRate``):
``key`` reads them all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from gm_probe.tables.table import BOOKKEEPING, GAPS, KNOWN_MEASURES, OUTCOMES, SEED

# Usual names of training choices: never taken for a measure unless asked for.
# fmt: off
SETTINGS = frozenset((
    "method", "model", "arch", "architecture", "data", "dataset", "optimizer", "lr", "learning_rate", "batch_size",
    "bs", "weight_decay", "wd", "momentum", "nesterov", "schedule", "scheduler", "lr_schedule", "lr_scheduler",
    "warmup", "warmup_epochs", "warmup_steps", "min_lr", "gamma", "augment", "augmentation", "label_smoothing",
    "dropout", "mixup", "cutmix", "clip_norm", "grad_clip", "ema_decay", "rho", "beta", "eta", "ascent_steps",
    "k_steps", "noise_scale", "depth", "width", "num_layers", "hidden_size", "width_multiplier", "num_parameters",
    "num_params", "num_examples", "train_size", "labels", "stop_ce",
))
# fmt: on
MET_STOP = "met_stop_ce"
HELD_OUT = ("test", "val", "valid", "validation", "eval", "dev")
"""Names of examples that were not trained on; those of the test come first."""
RATES = tuple(f"{part}_{rate}" for part in ("train", *HELD_OUT) for rate in ("error", "accuracy"))
ALIASES = {"random_state": SEED, "seed_everything": SEED, "run_name": "name", "mlflow_run_name": "name"}
PARTS = {"train", *HELD_OUT, "id", "ood"}
LARGER_IS_WORSE = {"err", "error", "err5", "loss", "ce", "nll", "ppl", "perplexity", "gap"}
LARGER_IS_BETTER = {"acc", "accuracy", "acc5", "f1", "auc", "auroc", "precision", "recall"}
"""Words for what a run achieved. One that is worse makes the whole name worse, as in ``accuracy_gap``."""
QUALIFIERS = {"best", "final", "last", "gen", "generalization", "rate", "diff"}
SUMMED = {"max", "min", "mean", "avg"}
RENAMED = frozenset((*GAPS, *KNOWN_MEASURES, *SETTINGS, *OUTCOMES, *RATES, SEED, MET_STOP))
"""Names that the rest of the code knows: a column is called so however its file writes it."""
NAMES = ("run", "name", "display_name", "model_name", "run_id", "trial_id", "id", "model")
"""Which columns may name a run, the best first."""
_GIVEN = re.compile(r"(?:params?|config|hparams|hyperparameters)[./]|params_", re.IGNORECASE)
_FOUND = re.compile(r"(?:metrics?|summary)[./]|user_attrs_", re.IGNORECASE)
_SAID = re.compile(r"(?:tags|system|sys|probe)[./]|system_attrs_", re.IGNORECASE)
"""Prefixes by which MLflow, W&B, Ray and Optuna tell settings, results and remarks apart."""
_STATUS = re.compile(r"(?:.*_)?(?:status|state)")
_NO_MEASURE = re.compile(
    r"_.*|unnamed:.*|\d+|index|level_\d+|number|row|row_?names?"  # row numbers, and what a tracker keeps for itself
    r"|(?:.*_)?(?:id|uuid|guid|pid|status|state)"
    r"|(?:.*_)?(?:time|date|datetime|timestamp|runtime|duration|seconds|epochs?|steps?|iterations?)"
    r"|(?:time|date|datetime|created|started|updated|finished|ended|relative)(?:_.*)?|.*_at"
    r"|(?:.*_)?(?:seed|fold|trial|repeat|replicate)|values?(?:_\d+)?|objective"
    r"|(?:iterations|timesteps|episodes)_.*"  # of Ray
    r"|.*_per_(?:second|sec|s|step|epoch)|total_flos"
    r"|.*_(?:stderr|stderr_examples|has_converged)"  # what `gmprobe collect` writes beside a measure
    r"|(?:gpu|cpu|git|mlflow|slurm)_.*|host|hostname|node_ip|user|tags|notes|sweep|commit"
)
# fmt: off
FINISHED = frozenset((
    "finished", "finish", "completed", "complete", "succeeded", "successful", "success", "done", "ok",
))
UNFINISHED = frozenset((
    "crashed", "crash", "failed", "fail", "failure", "error", "errored", "killed", "running", "preempting", "preempted",
    "pending", "scheduled", "queued", "waiting", "created", "starting", "initializing", "paused", "stopped", "stopping",
    "suspended", "requeued", "aborted", "canceled", "cancelled", "interrupted", "timeout", "timed_out", "out_of_memory",
    "oom", "node_fail", "pruned", "unfinished", "incomplete", "diverged", "stale", "deleted", "unreadable",
))
SUMMARIES = frozenset((
    "mean", "average", "avg", "median", "min", "minimum", "max", "maximum", "range", "sum", "total",
    "std", "std_dev", "stdev", "sd", "standard_deviation", "variance", "stderr", "standard_error",
))
"""Names of rows that sum up the runs above them."""
# fmt: on


_UNIT = re.compile(
    r"\s*(?:[(\[]\s*(%|percent|pct|nats?|bits?)\s*[)\]]|(%)|[ _](percent|pct))\s*$", re.IGNORECASE
)
"""A unit behind a name, as in ``Test accuracy (%)``."""
_SAME = {
    "training": "train",
    "cross_entropy|xent": "ce",
    "(?:top|acc|accuracy|prec)_?1": "acc",
    "(?:top|acc|accuracy|prec)_?5": "acc5",
    "(?:err|error)_?1": "err",
    "(?:err|error)_?5": "err5",
}


def key(name: str) -> str:
    """Return ``name`` without a tracker's prefix and a unit, in lower case with underscores, or its usual name."""
    found = _plain(_UNIT.sub("", bare(name)))
    if found.endswith("_seed"):  # train.seed, init_seed
        return SEED
    words = _words(found)
    rate = words & {"acc", "accuracy", "err", "error"}
    if rate and len(words) == 2 and (part := words & {"train", *HELD_OUT}):  # val_acc, acc_test, eval_top1
        return f"{part.pop()}_{'accuracy' if rate <= LARGER_IS_BETTER else 'error'}"
    return ALIASES.get(found, found)


def _words(plain: str) -> set[str]:
    """Return the words of a plain name, with one word for each of the ways to write them."""
    for pattern, word in _SAME.items():
        plain = re.sub(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", word, plain)
    return set(plain.split("_"))


def in_percent(name: str) -> bool:
    """Whether a header says that its column is in percent."""
    unit = _UNIT.search(name)
    return unit is not None and (unit[1] or "%")[0] in "%pP"


def direction(name: str) -> str | None:
    """Return what a larger value of an outcome called ``name`` is: ``worse`` or ``better``; None if that is unknown."""
    words = _words(key(name))
    return "worse" if words & LARGER_IS_WORSE else "better" if words & LARGER_IS_BETTER else None


def is_of_training(name: str) -> bool:
    """Whether ``name`` says that the number is of the training data."""
    return "train" in _words(key(name))


def is_outcome(name: str) -> bool:
    """Whether every word of ``name`` belongs to the result of a training, as in ``best_val_acc`` or ``gen_gap``."""
    words = _words(key(name))
    others = words - LARGER_IS_WORSE - LARGER_IS_BETTER - QUALIFIERS - PARTS
    return bool(words & (LARGER_IS_WORSE | LARGER_IS_BETTER)) and others <= (
        SUMMED if words & PARTS else set()
    )


def bare(name: str) -> str:
    """Return ``name`` without a tracker's prefix."""
    for prefix in (_GIVEN, _FOUND, _SAID):
        if match := prefix.match(name):
            return name[match.end() :]
    return name


def _plain(text: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text.strip(" \t./-"))
    return re.sub(r"[\s./-]+|(?<=\w)@(?=\d)", "_", words).lower()


def called(names: Sequence[str]) -> dict[str, str]:
    """Return what each of ``names`` is called here: its ``key`` where that is known, else without its prefix.

    Where two would be called the same, each keeps its own name.
    """
    wanted = {name: found if (found := key(name)) in RENAMED else bare(name) or name for name in names}
    num = Counter(wanted.values())
    return {
        name: new if num[new] == 1 and (new == name or new not in names) else name
        for name, new in wanted.items()
    }


def is_setting(name: str) -> bool:
    """Whether a column ``name`` is a usual choice about training."""
    return key(name) in SETTINGS and not _FOUND.match(name)


def is_given(name: str) -> bool:
    """Whether a tracker says of the column ``name`` that it was set and not measured."""
    return bool(_GIVEN.match(name)) and key(name) not in BOOKKEEPING


def may_be_measure(name: str) -> bool:
    """Whether a column ``name`` of numbers is taken for a measure unasked."""
    if _GIVEN.match(name) or _SAID.match(name):
        return False
    found = key(name)
    known = {*BOOKKEEPING, *SETTINGS, *GAPS, *OUTCOMES, MET_STOP, ""}
    return found in KNOWN_MEASURES or not (found in known or _NO_MEASURE.fullmatch(found) or is_outcome(name))


def is_status(name: str) -> bool:
    """Whether a column ``name`` may say how runs ended."""
    return bool(_STATUS.fullmatch(key(name)))


def unfinished(cells: Sequence[object]) -> dict[int, str]:
    """Return the rows of a status column whose run did not finish, with what it says.

    Only a column that says of some run that it is finished says by an unknown word that another is not.
    """
    said = [str(cell).strip() for cell in cells]
    words = [_plain(text.rpartition(".")[2]) for text in said]  # TrialState.COMPLETE
    some_finished = any(word in FINISHED for word in words)
    return {
        row: said[row] or "no status"
        for row, word in enumerate(words)
        if word in UNFINISHED or (some_finished and word not in FINISHED)
    }
