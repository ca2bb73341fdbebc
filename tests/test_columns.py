"""What columns are by their names, as trackers and people write them."""

from __future__ import annotations

import pytest

from gm_probe.tables.columns import called, direction, in_percent, is_setting, key, may_be_measure, unfinished


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ("LR", "lr"),
        ("Learning Rate", "learning_rate"),
        ("learningRate", "learning_rate"),
        ("config/lr", "lr"),
        ("params.weight_decay", "weight_decay"),
        ("params_batch_size", "batch_size"),
        ("Seed", "seed"),
        ("random_state", "seed"),
        ("Error_Gap", "error_gap"),
        ("error-gap", "error_gap"),
        ("metrics.error_gap", "error_gap"),
        ("Fisher_Trace", "fisher_trace"),
        ("Test Accuracy", "test_accuracy"),
        ("Test Accuracy (%)", "test_accuracy"),
        ("acc/test", "test_accuracy"),
        ("val/acc@1", "val_accuracy"),
        ("eval_top1", "eval_accuracy"),
        ("test_prec1", "test_accuracy"),
        ("Training Error [%]", "train_error"),
        ("params.trainer.seed", "seed"),
        ("init_seed", "seed"),
        ("seed_everything", "seed"),
    ],
)
def test_known_names_in_every_writing(written: str, known: str) -> None:
    assert key(written) == known
    assert called([written]) == {written: known}


def test_unknown_names_stay_but_for_a_prefix() -> None:
    assert called(["Sharpness", "metrics.flatness"]) == {
        "Sharpness": "Sharpness",
        "metrics.flatness": "flatness",
    }


def test_names_that_would_fall_together_stay_as_they_are() -> None:
    names = ["lr", "LR", "metrics.a", "params.a"]
    assert called(names) == {name: name for name in names}


@pytest.mark.parametrize(
    "name",
    ["Unnamed: 0", "Unnamed: 0.1", "_step", "_runtime", "_timestamp", "_wandb", "Runtime", "Created", "experiment_id",
     "run_id", "ID", "start_time", "end_time", "datetime_start", "updated_at", "epoch", "global_step",
     "trainer/global_step", "GPU Count", "index", "", "...1", "0", "level_0", "status", "State", "val_acc",
     "train_loss", "acc", "best_val_acc", "Loss (nats)", "gen_gap", "val_acc@5", "test_top5", "fold", "data_seed",
     "value", "values_0",
     "mean_train_loss", "iterations_since_restore", "eval_recall", "tags.x",
     "params.anything", "LR", "Seed", "Error_Gap", "test_error", "date", "duration", "pid"],
)  # fmt: skip
def test_no_measure_unasked(name: str) -> None:
    assert not may_be_measure(name)


@pytest.mark.parametrize(
    "name",
    ["sharpness", "Sharpness", "m", "-m", "metrics.flatness", "effective_rank", "stable_rank", "path_norm", "epsilon",
     "max_loss", "mean_error", "top_eigenvalue", "spectral_gap", "sharpness_top1", "statement", "identity",
     "update", "runs", "condition_number", "Fisher_Trace"],
)  # fmt: skip
def test_may_be_a_measure(name: str) -> None:
    assert may_be_measure(name)


@pytest.mark.parametrize(
    ("name", "larger"),
    [("test_error", "worse"), ("val/loss", "worse"), ("Test acc (%)", "better"), ("top1", "better"), ("f1", "better"),
     ("top5_err", "worse"), ("accuracy_gap", "worse"), ("num_train", None), ("k", None), ("top_eigenvalue", None)],
)  # fmt: skip
def test_directions(name: str, larger: str | None) -> None:
    assert direction(name) == larger


def test_headers_say_percent() -> None:
    assert all(map(in_percent, ["acc (%)", "acc [ % ]", "acc %", "acc_pct", "Test Acc (Percent)"]))
    assert not any(map(in_percent, ["acc", "loss (nats)", "(%) acc", "percentage", "pct"]))


def test_a_metric_of_a_settings_name_is_no_setting() -> None:
    assert is_setting("params.lr")
    assert is_setting("LR")
    assert not is_setting("metrics.lr")


def test_runs_that_did_not_finish() -> None:
    wandb = ["finished", "crashed", "failed", "killed", "running", "preempting", "Finished", ""]
    assert unfinished(wandb) == {
        1: "crashed", 2: "failed", 3: "killed", 4: "running", 5: "preempting", 7: "no status",
    }  # fmt: skip
    assert unfinished(["FINISHED", "FAILED", "SCHEDULED", "KILLED"]) == {
        1: "FAILED",
        2: "SCHEDULED",
        3: "KILLED",
    }
    assert unfinished(["TrialState.COMPLETE", "TrialState.PRUNED"]) == {1: "TrialState.PRUNED"}
    assert unfinished(["running", "running"]) == {0: "running", 1: "running"}
    assert unfinished(["CA", "NY"]) == {}, "a state of another kind"
    assert unfinished(["good", "failed"]) == {1: "failed"}
    assert unfinished(["ok", "odd"]) == {1: "odd"}, "a column that names the finished ones names the others"
