"""Trained runs measured again: what an interruption left undone is done by the next call, and nothing is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_sweep_state import parse

from gm_probe.cli import main, measure_many
from gm_probe.executors import local as executors
from gm_probe.executors.local import Job, Outcome, attempt, in_turn
from gm_probe.files.atomic import write_json, write_toml
from gm_probe.files.locks import held
from gm_probe.measures.settings import Settings
from gm_probe.measuring.checkpoint import measure_checkpoint
from gm_probe.measuring.many import Request, measure_checkpoints
from gm_probe.measuring.saved import as_recorded, merge_measures
from gm_probe.measuring.setup import Setup
from gm_probe.measuring.trained_runs import last_finished, trained_runs
from gm_probe.sweep.runner import run_recipe
from gm_probe.training.run_splits import OWN_UNLABELED, own_unlabeled


def test_an_interrupted_measurement_of_many_goes_on(tmp_path: Path) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path)
    runs = trained_runs(tmp_path)
    weights = [(run / "checkpoint.safetensors").stat().st_mtime_ns for run in runs]
    setup = Setup(Settings(), {"part": OWN_UNLABELED, "max_examples": None}, {"device": "cpu"})
    what = Request(("fisher_trace",), own_unlabeled, setup, True, frozenset())
    seen: list[str] = []

    def interrupt(outcome: Outcome) -> None:
        seen.append(outcome.status)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_checkpoints(runs, what, in_turn, interrupt)
    assert [(run / "measures.json").exists() for run in runs] == [True, True, False, False]
    assert not any(map(held, runs))
    outcomes = measure_checkpoints(runs, what, in_turn, interrupt)
    assert [outcome.status for outcome in outcomes.values()] == ["skipped"] * 2 + ["finished"] * 2
    assert all(outcome.result["measures"]["fisher_trace"]["value"] > 0 for outcome in outcomes.values())
    assert [(run / "checkpoint.safetensors").stat().st_mtime_ns for run in runs] == weights


@pytest.mark.parametrize("save", [True, False])
def test_an_interrupted_command_prints_what_was_finished(
    save: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path)
    runs = trained_runs(tmp_path)

    def once(job: Job) -> Outcome:
        if job.out != runs[0]:
            raise KeyboardInterrupt
        return attempt(job)

    monkeypatch.setattr(executors, "attempt", once)
    with pytest.raises(SystemExit) as stop:
        main(
            ["measure", str(tmp_path), "--measures", "mean_entropy", "--json", "--device", "cpu"]
            + ["--save"] * save
        )
    assert stop.value.code == 130
    printed = capsys.readouterr()
    [found] = json.loads(printed.out)
    assert found["checkpoint"] == str(runs[0])
    assert found["measures"]["mean_entropy"]["value"] > 0
    assert ("run the same command to continue" in printed.err) == save == (runs[0] / "measures.json").exists()


def test_saving_keeps_what_was_taken_so_and_names_what_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_recipe(parse(measure={"measures": []}), tmp_path / "runs")
    [run, *_] = trained_runs(tmp_path / "runs")
    options = ["--max-iterations", "2", "--starts", "1", "--device", "cpu", "--save"]

    def saved(*more: str) -> tuple[dict[str, Any], str]:
        main(["measure", str(run), *options, *more])
        return json.loads((run / "measures.json").read_text()), capsys.readouterr().err

    first, _ = saved("--measures", "mean_entropy", "--density", "a.png")
    again, note = saved("--measures", "mean_confidence,local_inconsistency")
    assert again["density"] == first["density"]
    # two products, with F of two gradients each and with H of three, and what trying them took
    assert all(4 <= first["density"][matrix]["num_evals"] < 20 for matrix in ("fisher", "hessian"))
    assert set(again["measures"]) == {"mean_entropy", "mean_confidence", "local_inconsistency"}
    assert "taken with other settings" not in note
    other, note = saved("--measures", "local_inconsistency", "--rho", "0.2")
    assert "density" not in other
    assert set(other["measures"]) == {"local_inconsistency"}
    assert "held mean_entropy, mean_confidence, density taken with other settings" in " ".join(note.split())


@pytest.mark.parametrize("odd", [float("nan"), float("-inf")])
def test_what_is_not_finite_in_a_file_goes_when_more_is_saved(tmp_path: Path, odd: float) -> None:
    file, settings = tmp_path / "measures.json", {"rho": 0.1}
    write_toml(tmp_path / "config.toml", {"lr": 0.1})
    before = {"a": {"value": odd}, "b": {"value": 1.0, "starts": [odd]}, "c": {"value": 2.0}}
    written = {"measures": before, "settings": settings, "density": {"fisher": {"trace": odd}}}
    file.write_text(json.dumps(written), encoding="utf-8")
    gone = merge_measures(file, {"measures": {"a": {"value": 3.0}}, "settings": settings})
    assert gone == ["b", "density"]
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept == {"measures": {"c": {"value": 2.0}, "a": {"value": 3.0}}, "settings": settings}


def test_progress_goes_on_through_the_densities(tmp_path: Path) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path / "runs")
    [run, *_] = trained_runs(tmp_path / "runs")
    seen: list[tuple[str, float]] = []
    found = measure_checkpoint(
        run,
        own_unlabeled(run),
        ["fisher_trace"],
        Settings(),
        quadrature=(1, 2),
        notify=lambda *told: seen.append(told),
    )
    done = [evaluations for _, evaluations in seen]
    assert done == sorted(done)
    assert {"density of the fisher", "density of the hessian"} <= {name for name, _ in seen}
    costs = [row["num_evals"] for row in (*found["measures"].values(), *found["density"].values())]
    assert done[-1] == pytest.approx(sum(costs) + 2 / 3, rel=0.05)  # and the two clean passes


def test_more_is_measured_as_before_but_for_what_is_given_and_of_other_data(tmp_path: Path) -> None:
    taken = Settings(num_starts=2, rho_grid=(3.0,))
    scope = {"part": "all", "data": "A", "labeled": False, "max_examples": 7}
    write_toml(tmp_path / "config.toml", {"temperature": 0.5})
    recorded = {**taken.as_dict(), **scope, "batch_images": 128, "temperature": 3.0}
    write_json(tmp_path / "measures.json", {"settings": recorded})
    now = Setup(Settings(), {**scope, "max_examples": None}, {"head": "simclr", "device": "cpu"})
    setup, changed = as_recorded(tmp_path, now, {"device", "measures"})
    loading = {"head": "simclr", "device": "cpu", "batch_size": 128, "temperature": 3.0}
    assert setup == Setup(taken, scope, loading)
    batch_dependent = {"batch_images": 128, "temperature": 3.0}
    assert changed == {"num_starts": 2, "rho_grid": [3.0], "max_examples": 7, **batch_dependent}
    write_json(
        tmp_path / "measures.json", {"settings": {**recorded, "temperature": 0.5}}
    )  # as it was trained
    assert "temperature" not in as_recorded(tmp_path, now, {"device", "measures"})[1]
    setup, changed = as_recorded(tmp_path, now, {"num_starts", "max_examples"})
    assert (setup.settings.num_starts, setup.scope["max_examples"], setup.settings.rho_grid) == (
        10,
        None,
        (3.0,),
    )
    sized = Setup(now.settings, now.scope, {**now.loading, "batch_size": 64, "temperature": 2.0})
    assert as_recorded(tmp_path, sized, ())[0].loading == sized.loading
    for other in ({"data": "B"}, {"labeled": True}, {"part": "own unlabeled"}):
        elsewhere = Setup(now.settings, {**now.scope, **other}, now.loading)
        assert as_recorded(tmp_path, elsewhere, ()) == (elsewhere, {})


def test_the_last_that_finished_is_no_broken_one(tmp_path: Path) -> None:
    for name in ("good", "broken", "bare"):
        write_toml(tmp_path / name / "config.toml", {})
        (tmp_path / name / "checkpoint.safetensors").touch()
    write_json(tmp_path / "good" / "summary.json", {"status": "finished"})
    (tmp_path / "broken" / "summary.json").write_text("{")
    (tmp_path / "bare" / "config.toml").write_text("[")
    assert last_finished(tmp_path) == tmp_path / "good"
    assert {run.name for run in trained_runs(tmp_path)} == {"good", "broken", "bare"}


def measured(
    folder: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[list[dict[str, Any]], str]:
    main(
        [
            "measure",
            str(folder),
            "--measures",
            "mean_entropy",
            "--device",
            "cpu",
            "--save",
            "--json",
            *options,
        ]
    )
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_runs_measured_in_another_way_are_not_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path)
    first, _ = measured(tmp_path, capsys)
    again, told = measured(tmp_path, capsys)
    assert [each["measures"] for each in again] == [each["measures"] for each in first]
    assert "skipped" in told
    for option, key, value in (
        ("--tf32", "tf32", True),
        ("--dtype=float64", "dtype", "float64"),
        ("--no-normalize", "mean", []),
    ):
        found, told = measured(tmp_path, capsys, option)
        assert "skipped" not in told
        assert {json.dumps(each["settings"][key]) for each in found} == {json.dumps(value)}
    # what is not given is as it was, also of a single run
    [one], told = measured(trained_runs(tmp_path)[0], capsys)
    assert (one["settings"]["dtype"], one["settings"]["mean"]) == ("float64", [])
    assert "mean = [], std = [], dtype = float64" in " ".join(told.split())
    assert "tf32 = True" in told


def test_data_that_changed_under_its_name_are_measured_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path / "runs")
    data = tmp_path / "d.npz"
    options = ("--unlabeled", str(data))
    shape = own_unlabeled(trained_runs(tmp_path / "runs")[0]).x.shape[1:]
    for seed in (0, 1):
        images = np.random.default_rng(seed).integers(0, 256, (9, *shape), dtype=np.uint8)
        np.savez(data, x=images)
        measure_many.opened.cache_clear()  # a process reads data once
        found, told = measured(tmp_path / "runs", capsys, *options)
        assert "skipped" not in told
        again, told = measured(tmp_path / "runs", capsys, *options)
        assert "skipped" in told
        assert [each["measures"] for each in again] == [each["measures"] for each in found]


def test_a_moved_run_is_named_by_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path / "a")
    measured(tmp_path / "a", capsys)
    (tmp_path / "a").rename(tmp_path / "b")
    found, _ = measured(tmp_path / "b", capsys)
    assert [each["checkpoint"] for each in found] == [str(run) for run in trained_runs(tmp_path / "b")]


def test_a_finished_run_without_its_weights_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path)
    gone = trained_runs(tmp_path)[0]
    (gone / "checkpoint.safetensors").unlink()
    with pytest.raises(SystemExit):
        measured(tmp_path, capsys)
    assert f"{gone} failed: {gone} holds no checkpoint.safetensors" in " ".join(
        capsys.readouterr().err.split()
    )


def broken_among(folder: Path) -> list[Path]:
    """Two whole runs around one whose weights are no checkpoint, and a path where nothing is."""
    run_recipe(parse(measure={"measures": []}), folder)
    first, second, third, *_ = trained_runs(folder)
    (second / "checkpoint.safetensors").write_bytes(b"no weights")
    return [first, second, folder / "nowhere", third]


@pytest.mark.parametrize("options", [(), ("--jobs", "2"), ("--save",)])
def test_what_fails_is_an_entry_and_the_others_are_measured(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = broken_among(tmp_path)
    if "--save" in options:  # which writes into folders only
        del paths[2]
    with pytest.raises(SystemExit) as stop:
        main(
            ["measure", *map(str, paths), "--measures", "mean_entropy", "--device", "cpu", "--json", *options]
        )
    printed = capsys.readouterr()
    entries = json.loads(printed.out)
    assert [entry["checkpoint"] for entry in entries] == list(map(str, paths))
    failed = [entry for entry in entries if "error" in entry]
    assert [entry["checkpoint"] for entry in failed] == list(map(str, paths[1:-1]))
    assert {entry["exit_code"] for entry in failed} == {3}
    assert all(str(path) in entry["error"] for path, entry in zip(paths[1:-1], failed, strict=True))
    assert entries[0]["measures"]["mean_entropy"]["value"] > 0
    assert entries[-1]["measures"]["mean_entropy"]["value"] > 0
    assert stop.value.code == 3
    assert f"{len(failed)} of {len(paths)} checkpoints could not be measured" in printed.err


def test_one_that_fails_ends_with_its_own_line_and_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = broken_among(tmp_path)[1]
    with pytest.raises(SystemExit) as stop:
        main(["measure", str(broken), "--measures", "mean_entropy", "--device", "cpu", "--json"])
    printed = capsys.readouterr()
    [entry] = json.loads(printed.out)
    assert (entry["checkpoint"], entry["exit_code"], stop.value.code) == (str(broken), 3, 3)
    assert printed.err.split() == f"gmprobe: {entry['error']}".split()


def test_several_files_that_are_saved_are_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path)
    runs = trained_runs(tmp_path)[:2]
    words = ["measure", *map(str, runs), "--measures", "mean_entropy", "--device", "cpu", "--save"]
    main(words)
    capsys.readouterr()
    main(words)
    assert capsys.readouterr().err.count("skipped") == 2


@pytest.mark.parametrize(
    ("names", "columns"), [("mean_entropy,hessian_trace", "measures"), ("outputs", "runs")]
)
def test_several_checkpoints_are_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: str, columns: str
) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path)
    runs = [str(run) for run in trained_runs(tmp_path)[:3]]
    words = ["measure", *runs, "--measures", names, "--device", "cpu", "-q"]
    main([*words, "--json"])
    results = json.loads(capsys.readouterr().out)
    main(words)
    shown = capsys.readouterr().out
    assert shown.count("┏") == 1
    assert str(tmp_path) not in shown
    [head] = [line for line in shown.splitlines() if line.startswith("┃")]
    assert all((Path(run).name in head) == (columns == "runs") for run in runs)
    assert re.search(r"entropy\)? ↓", shown)
    for result in results:
        row = result["measures"]["mean_entropy"]
        assert f"{row['value']:.4g} ± {row['stderr_examples']:.2g}" in shown
        if columns == "measures":
            assert re.search(r"tr H( \(predicted labels\))? ↓", head)


def test_a_table_of_checkpoints_with_other_settings_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(parse(measure={"measures": []}), tmp_path)
    runs = [str(run) for run in trained_runs(tmp_path)[:2]]
    words = ["--measures", "local_inconsistency", "--starts", "2", "--device", "cpu", "--save", "-q"]
    for run, rho in zip(runs, ("0.1", "0.2"), strict=True):
        main(["measure", run, *words, "--rho", rho])
    capsys.readouterr()
    for some, said in ((runs[:1] * 2, "ρ = 0.1"), (runs, "Settings differ between the checkpoints")):
        main(["measure", *some, *words])
        assert said in capsys.readouterr().out


def test_pixels_for_a_checkpoint_of_floats_are_not_read_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 1, 4, 4), dtype=np.uint8)
    np.savez("floats.npz", x=(pixels / 255).astype(np.float32), y=np.arange(90) % 3)
    np.savez("pixels.npz", x=pixels)
    words = ["--model", "mlp-4", "--epochs", "1", "--device", "cpu", "--quiet"]
    main(["train", "--data", "floats.npz", *words, "--out", "run"])
    for options, count in (((), 1), (("--no-normalize",), 0), (("--mean", "0.5", "--std", "0.5"), 0)):
        capsys.readouterr()
        main(["measure", "run", "--unlabeled", "pixels.npz", "--measures", "mean_entropy", *options])
        assert capsys.readouterr().err.count("records no normalisation, so pixels are read") == count
