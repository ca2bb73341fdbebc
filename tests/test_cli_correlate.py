"""`gmprobe correlate` as a user meets it: output, notes, files and exit codes."""

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import command_line
import pytest

from gm_probe.files.atomic import write_json, write_toml

TABLE = "error_gap,ce_gap,fisher_trace,local_inconsistency,lr\n" + "".join(
    f"{0.1 * i},{1.0 * (i % 3)},{2.0 * i},{3.0 - i},{0.1 * (i % 2)}\n" for i in range(6)
)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``gmprobe correlate``."""
    return command_line.run(["correlate", *args], capsys)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(TABLE)
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for i, status in enumerate(["finished", "finished", "finished", "diverged", "diverged", "failed"]):
        folder = tmp_path / "runs" / f"run-{i}"
        write_toml(folder / "config.toml", {"weight_decay": 0.1 * (i % 2), "environment": {"host": f"h{i}"}})
        write_json(folder / "summary.json", {"status": status, "error_gap": 0.1 * i, "ce_gap": 1.0 * i})
        write_json(folder / "measures.json", {"measures": {"fisher_trace": {"value": 3.0 - i}}})
    return tmp_path / "runs"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four runs, the last of another ρ, with a Hessian of predicted labels."""
    for i in range(4):
        folder = tmp_path / "mixed" / f"run-{i}"
        write_toml(folder / "config.toml", {})
        write_json(folder / "summary.json", {"status": "finished", "error_gap": 0.1 * i})
        measures = {
            "local_inconsistency": {"value": 1.0 * i, "protocol": "paper"},
            "local_inconsistency_converged": {"value": 1.0 * i, "protocol": "converged"},
            "hessian_lambda_max": {"value": 1.0 * i, "labels": "predicted"},
        }
        settings = {"rho": 0.2 if i == 3 else 0.1}
        write_json(folder / "measures.json", {"settings": settings, "measures": measures})
    return tmp_path / "mixed"


def test_json_contract(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    code, out, _ = run(capsys, str(table), "--json", "--group-by", "lr")
    result = json.loads(out)
    assert code == 0
    assert {"num_runs", "num_settings", "excluded", "hyperparameters", "measures", "conclusion"} <= set(
        result
    )
    assert result["excluded_by_reason"] == {}
    assert (result["num_runs"], result["excluded"]) == (6, [])
    assert result["hyperparameters"] == ["lr"]
    assert list(result["measures"]) == ["local_inconsistency", "fisher_trace"]
    trace = result["measures"]["fisher_trace"]
    assert set(trace) == {"labels", "error_gap", "ce_gap", "subgroups", "selection", "warnings"}
    assert trace["labels"] is None
    expected = {
        "tau": pytest.approx(1.0),
        "low": None,
        "high": None,
        "p": None,
        "n": 6,
        "p_naive": pytest.approx(2 / 720),
        "missing": [],
        "interval_reason": "no interval: 2 settings; an interval needs 5",
    }
    assert {key: trace["error_gap"][key] for key in expected} == expected
    names = {each["statistic"] for each in trace["error_gap"]["statistics"]}
    assert {"tau_within", "spearman", "psi", "psi_mean", "tau_partial", "cmi_min", "sign_error_mean"} <= names
    assert result["measures"]["local_inconsistency"]["error_gap"]["tau"] == pytest.approx(-1.0)
    assert {label: of["error_gap"]["n"] for label, of in trace["subgroups"].items()} == {
        "lr=0": 3,
        "lr=0.1": 3,
    }


def test_a_sweeps_recipe_says_the_subgroups_unless_an_option_does(
    capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    def subgroups(*args: str) -> set[str]:
        code, out, _ = run(capsys, str(runs), "--json", *args)
        assert code == 0
        return set(json.loads(out)["measures"]["fisher_trace"]["subgroups"])

    assert subgroups() == set()
    write_json(runs / "sweep.json", {"group_by": ["weight_decay"]})
    assert subgroups() == {"weight_decay=0", "weight_decay=0.1"}
    assert subgroups("--group-by", "") == set()
    write_json(runs / "sweep.json", {"group_by": []})
    assert subgroups("--group-by", "weight_decay") == {"weight_decay=0", "weight_decay=0.1"}
    _, _, err = run(capsys, str(runs), "--json")
    assert "subgroups by" not in err
    for broken in ([1], {"group_by": "lr"}, {"group_by": [1]}):
        write_json(runs / "sweep.json", broken)
        code, _, err = run(capsys, str(runs), "--json")
        assert (code, err.count("\n")) == (7, 1), err
        assert "sweep.json: " in err
        assert "run `gmprobe sweep` into" in err


def test_run_folders_exclude_with_counted_reasons(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    code, out, err = run(capsys, str(runs), "--json")
    result = json.loads(out)
    assert code == 0
    assert result["num_runs"] + len(result["excluded"]) == 6
    assert result["excluded"] == [
        {"run": "run-3", "reason": "diverged"},
        {"run": "run-4", "reason": "diverged"},
        {"run": "run-5", "reason": "failed"},
    ]
    assert "excluded 3 of 6 runs (2 diverged; 1 failed); --json names them" in err
    assert "hyperparameters that vary: weight_decay" in err


def test_machine_output_writes_a_figure_on_request_only(
    capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    for option in ("--json", "--csv"):
        assert run(capsys, str(runs), option)[0] == 0
        assert not list(runs.glob("*.*"))
    assert run(capsys, str(runs), "--json", "--figure", str(runs / "asked.svg"))[0] == 0
    assert [path.name for path in runs.glob("*.*")] == ["asked.svg"]
    assert run(capsys, str(runs))[0] == 0
    assert {path.name for path in runs.glob("correlate.*")} == {"correlate.png"}


def test_hyper_chooses_what_json_lists(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    for i in range(3):
        write_toml(runs / f"run-{i}" / "config.toml", {"lr": 0.1, "weight_decay": 0.1 * i})
    chosen = [
        json.loads(run(capsys, str(runs), "--json", *args)[1])["hyperparameters"]
        for args in ([], ["--hyper", "lr"])
    ]
    assert chosen == [["weight_decay"], ["lr"]]


def test_differing_settings_are_loud_everywhere(capsys: pytest.CaptureFixture[str], mixed: Path) -> None:
    differs = "rho differs between runs (0.1 × 3, 0.2 × 1), so they are not comparable"
    _, out, err = run(capsys, str(mixed), "--json")
    measures = json.loads(out)["measures"]
    assert differs in measures["local_inconsistency"]["warnings"]
    assert differs not in measures["hessian_lambda_max"]["warnings"]
    line = f"local_inconsistency, local_inconsistency_converged: {differs}"
    assert f"warning: {line}\n" in err
    _, out, _ = run(capsys, str(mixed), "--quiet", "--no-figure")
    assert line in " ".join(out.split())


def test_predicted_labels_are_named_in_every_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mixed: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run(capsys, str(mixed), "--figure", str(mixed / "f.svg"))
    assert max(map(len, out.splitlines())) <= 60
    assert "hessian_lambda_max" in out
    assert "(predicted" in out
    assert "(predicted labels)" in (mixed / "f.svg").read_text(encoding="utf-8")
    _, out, _ = run(capsys, str(mixed), "--json")
    labels = {name: measure["labels"] for name, measure in json.loads(out)["measures"].items()}
    assert labels.pop("hessian_lambda_max") == "predicted"
    assert set(labels.values()) == {None}


def test_long_lists_of_excluded_runs_are_cut_on_screen_only(
    capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    for i in range(6, 12):
        write_toml(runs / f"run-{i:02d}" / "config.toml", {})
    _, out, err = run(capsys, str(runs), "--json", "--no-figure")
    assert "excluded 9 of 12 runs (6 unfinished; 2 diverged; 1 failed); --json names them" in err
    assert len(json.loads(out)["excluded"]) == 9


def test_csv_output(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    code, out, _ = run(capsys, str(table), "--csv", "--no-figure", "--group-by", "lr")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert ",".join(rows[0]) == "measure,target,statistic,group,value,low,high,p,n,note"
    assert (rows[0]["measure"], rows[0]["statistic"]) == ("local_inconsistency", "tau")
    assert float(rows[0]["value"]) == pytest.approx(-1)
    assert {row["group"] for row in rows if row["statistic"] == "tau"} == {"", "lr=0", "lr=0.1"}


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_the_table_fits_its_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, table: Path, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(capsys, str(table), "--no-figure", "--group-by", "lr")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    for text in ("S_ρ", "lr=0.1", "τ", "−1.00"):
        assert text in out
    assert "No interval: 2 settings; an interval needs 5" in " ".join(out.split())


def test_measure_names_are_not_markup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("error_gap,[red]mine,[/b]\n1,2,1\n2,3,1\n")
    code, out, _ = run(capsys, str(path), "--no-figure", "--measures=[red]mine,[/b]")
    assert code == 0
    assert "[red]mine" in out
    assert "[/b]: τ is undefined, the measure is constant over 2 runs" in " ".join(out.split())


def test_quiet_silences_stderr_and_notes_name_the_figure(
    capsys: pytest.CaptureFixture[str], table: Path
) -> None:
    _, out, err = run(capsys, str(table), "--quiet", "--json", "--no-figure")
    assert json.loads(out)["num_runs"] == 6
    assert err == ""
    _, _, err = run(capsys, str(table))
    assert str(table.with_name("table-correlate.png")) in err
    assert "measures: local_inconsistency, fisher_trace" in err


def test_figure_path_chooses_the_format(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    folder = table.parent / "new"
    assert run(capsys, str(table), "-q", "--figure", str(folder / "one.SVG"))[0] == 0
    assert [path.name for path in folder.iterdir()] == ["one.SVG"]
    assert "τ = 1.00, n = 6" in (folder / "one.SVG").read_text(encoding="utf-8")
    assert run(capsys, str(table), "-q", "--figure", str(folder / "all"))[0] == 0
    assert {path.name for path in folder.iterdir()} == {"one.SVG", "all.png", "all.pdf", "all.svg"}


def test_target_is_another_name_of_gap_and_takes_several(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("test_error,k,m\n0.1,1,3\n0.3,3,1\n0.2,2,2\n")  # no gap, and none can be made
    found = []
    for option in ("--target", "--gap"):
        _, out, _ = run(capsys, str(path), "--json", "--no-figure", option, "test_error,test_accuracy,2 * k")
        found.append(json.loads(out)["measures"]["m"])
    assert found[0] == found[1]
    taus = {"test_error": -1, "test_accuracy": 1, "2 * k": -1}
    assert {name: found[0][name]["tau"] for name in taus} == taus


def test_no_usable_run_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_toml(tmp_path / "a" / "config.toml", {})
    code, _, err = run(capsys, str(tmp_path))
    assert code == 4
    assert "1 × unfinished" in err


def test_a_constant_measure_beside_a_defined_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("error_gap,fisher_trace,hessian_trace\n1,2,7\n2,3,7\n")
    code, out, _ = run(capsys, str(path), "--json", "--no-figure")
    row = json.loads(out)["measures"]["hessian_trace"]["error_gap"]
    assert code == 0
    assert (row["tau"], row["p_naive"]) == (None, None)
    assert row["reason"] == "the measure is constant over 2 runs"


def test_nothing_defined_prints_the_result_and_exits_4(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("error_gap,m\n1,2\n1,3\n")
    code, out, err = run(capsys, str(path))
    assert code == 4
    assert "m: τ is undefined, error_gap is constant over 2 runs" in " ".join(out.split())
    assert err.splitlines()[-1].startswith("gmprobe: no measure in")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_still_prints(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    table.parent.chmod(0o500)
    code, out, _ = run(capsys, str(table), "--json", "--figure", str(table.with_name("plot.svg")))
    table.parent.chmod(0o700)
    assert code == 7
    assert json.loads(out)["num_runs"] == 6


def test_a_figure_below_a_file_is_a_storage_error(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    code, out, err = run(capsys, str(table), "--json", "--figure", str(table / "plot.png"))
    assert code == 7
    assert json.loads(out)["num_runs"] == 6
    assert "cannot write" in err


@pytest.mark.parametrize("options", [(), ("--csv",)])
def test_a_reader_that_leaves_early_is_no_error(table: Path, options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "gm_probe", "correlate", str(table), "--no-figure", *options]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, "Broken" in done.stderr) == (0, False), done.stderr


# ---- tables and options that are wrong, odd or hostile: one clear line and the right exit code

GOOD = "error_gap,m,lr\n" + "".join(f"{0.1 * i:.2f},{(7 * i) % 11},{i // 2}\n" for i in range(12))
REFUSED = {
    "an empty file": ("", (), 4, "is empty; it needs a header line"),
    "one run": ("error_gap,m\n1,2\n", (), 4, "1 usable run; a rank correlation needs at least 2"),
    "nothing but missing values": ("error_gap,m\nnan,1\nnan,2\n", (), 4, "has a defined τ"),
    "measure and gap never together": ("error_gap,m\n1,\n,2\n3,\n", (), 4, "has a defined τ"),
    "infinities": ("error_gap,m\ninf,2\n-inf,3\n1e999,4\n", (), 4, "has a defined τ"),
    "an unknown measure": (GOOD, ("--measures", "n"), 2, "no column in"),
    "a gap as a measure": (GOOD, ("--measures", "error_gap"), 2, "is a gap and cannot be a measure too"),
    "an unknown hyperparameter": (GOOD, ("--hyper", "lrr"), 2, "did you mean 'lr'"),
    "an unknown subgroup": (GOOD, ("--group-by", "lrr"), 2, "did you mean 'lr'"),
    "an unknown control": (GOOD, ("--control", "train_ce"), 2, "no column to control for named 'train_ce'"),
    "a gap that is not there": (GOOD, ("--gap", "ce_gap"), 2, "no target 'ce_gap'"),
    "a wrong target": (GOOD, ("--target", "eror_gap"), 2, "no column 'eror_gap'; did you mean 'error_gap'?"),
    "a figure of another format": (GOOD, ("--figure", "plot.jpg"), 2, "no format '.jpg'"),
    "a figure and none": (GOOD, ("--figure", "plot.png", "--no-figure"), 2, "exclude each other"),
}


@pytest.mark.parametrize(("text", "args", "code", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: str,
    args: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    found, _, err = run(capsys, str(path), "--quiet", *args)
    assert found == code
    assert message in err
    assert err.startswith("gmprobe: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_more_runs_than_fit_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("gm_probe.analysis.correlation.MOST_RUNS", 10)
    path = tmp_path / "t.csv"
    path.write_text(GOOD)
    code, _, err = run(capsys, str(path), "--quiet")
    assert code == 6
    assert "12 runs; the pairs of more than 10 take too long" in err


ODD = {
    "missing values": (GOOD + ",3,1\n0.5,,1\nNA,3,1\n", "no value"),
    "infinite values": (GOOD + "inf,3,1\n0.5,-inf,1\n", "not finite"),
    "rows listed twice": (GOOD + "0.10,7,0\n", "1 runs repeat the values of another"),
    "names used twice": (
        "run," + GOOD.replace("\n", "\nx,", 12).rstrip("x,") + "\n",
        "repeat the name of another",
    ),
    "a constant measure": (GOOD.replace("m,lr", "m,lr,k").replace(",0\n", ",0,7\n"), ""),
    "no hyperparameter": (GOOD.replace("lr", "zz"), "no hyperparameter is known"),
    "no seeds": ("error_gap,fisher_trace,lr\n1,1,1\n2,3,2\n3,2,3\n", ""),
    "one setting": ("error_gap,fisher_trace,lr\n1,1,1\n2,3,1\n3,2,1\n", "all runs have the same setting"),
    "uneven settings": ("error_gap,m,lr\n1,1,1\n2,3,2\n3,2,2\n", ""),
    "large and small values": ("error_gap,m,lr\n1e150,-1e150,1\n-1e150,1e150,2\n1e-308,5e-324,2\n", ""),
    "huge values": (GOOD + "1e308,1,1\n-1e308,2,2\n0.5,1e200,1\n", "beyond 1e150 in size"),
    "outcomes that are no numbers": (
        GOOD.replace("m,lr", "m,test_error").replace(",5\n", ",x\n"),
        "test_error is not a number in 2 of 12 runs",
    ),
    "words for hyperparameters": ("error_gap,m,optimizer\n1,1,sgd\n2,3,adam\n3,2,sgd\n4,4,adam\n", ""),
    "a byte order mark": ("\ufeff" + GOOD, ""),
    "decimal commas": (GOOD.replace(",", ";").replace(".", ","), "decimal commas in error_gap"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("text", "note"), ODD.values(), ids=ODD.keys())
def test_odd_tables_have_a_result_without_a_nan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, note: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    code, out, err = run(capsys, str(path), "--json")
    assert code == 0, err
    assert note in err

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    result = json.loads(out, parse_constant=refuse)
    for measure in result["measures"].values():
        tau = measure["error_gap"]
        assert (tau["tau"] is None) == ("reason" in tau)
        assert tau["n"] + len(tau["missing"]) == result["num_runs"]
    for option in ("--csv", "--details"):
        assert run(capsys, str(path), option, "--no-figure")[0] == 0


def test_formulas_and_html_in_names_stay_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ["=cmd|' /C calc'!A0", "+m", "-m", "@m", "<img src=x onerror=alert(1)>"]
    path = tmp_path / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["error_gap", "=lr", *names])
        writer.writerows([i, "=1+1" if i % 2 else "x", *[(i * k) % 7 for k in range(1, 6)]] for i in range(7))
    code, out, _ = run(capsys, str(path), "--csv", "--hyper", "=lr", "--group-by", "=lr")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert (
        list(dict.fromkeys(row["measure"] for row in rows)) == ["'" + name for name in names[:4]] + names[4:]
    )
    assert "'=lr==1+1" in {row["group"] for row in rows}
    assert not any(cell.startswith(("=", "@", "+")) for row in rows for cell in row.values())
    for row in rows:
        negative = [cell for cell in row.values() if cell.startswith("-")]
        assert all(math.isfinite(float(cell)) for cell in negative)  # numbers alone may start so
    code, out, _ = run(capsys, str(path), "--json", "--hyper", "=lr")
    assert code == 0
    assert list(json.loads(out)["measures"]) == names
    code, out, _ = run(capsys, str(path), "--no-figure", "--hyper", "=lr", "--details")
    assert code == 0
    assert "<img" in out


# ---- options


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Run folders: 6 settings × 2 seeds, with errors and set sizes."""
    for i in range(12):
        folder = tmp_path / "runs" / f"run-{i:02d}"
        write_toml(folder / "config.toml", {"lr": 0.1 * (i // 4), "batch_size": i // 2 % 2, "seed": i % 2})
        summary = {"error_gap": 0.03 * i, "ce_gap": 0.1 * ((5 * i) % 12), "test_error": 0.1 + 0.03 * i}
        summary |= {"train_error": 0.1, "train_ce": 0.01 * ((3 * i) % 7), "num_test": 1000, "num_train": 5000}
        write_json(folder / "summary.json", {"status": "finished", **summary})
        measures = {"fisher_trace": {"value": float((7 * i) % 12)}, "parameter_norm": {"value": float(i % 5)}}
        write_json(folder / "measures.json", {"measures": measures})
    return tmp_path / "runs"


def test_run_folders_have_every_statistic(capsys: pytest.CaptureFixture[str], sweep: Path) -> None:
    code, out, _ = run(capsys, str(sweep), "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["num_runs"], result["num_settings"]) == (12, 6)
    measure = result["measures"]["fisher_trace"]
    assert (
        measure["error_gap"]["interval_reason"]
        == "no interval: the settings share 2 seeds; an interval needs 3"
    )
    found = {(each["statistic"], each["group"]): each for each in measure["error_gap"]["statistics"]}
    given = {group for statistic, group in found if statistic == "tau_partial"}
    assert given == {"train_ce", "parameter_norm", "lr", "batch_size"}
    assert found["tau_difference", "parameter_norm"]["value"] is not None
    [picked, random] = measure["selection"]
    assert (picked["outcome"], picked["picked"], random["picked"]) == ("test_error", "smallest", None)
    assert picked["value"] == pytest.approx(0.0)


def test_controls_are_chosen(capsys: pytest.CaptureFixture[str], sweep: Path) -> None:
    out = run(capsys, str(sweep), "--json", "--control", "lr")[1]
    statistics = json.loads(out)["measures"]["fisher_trace"]["error_gap"]["statistics"]
    assert {each["group"] for each in statistics if each["statistic"] == "tau_partial"} == {"lr"}


@pytest.mark.parametrize("columns", [60, 100])
def test_details_fit_their_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sweep: Path, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(capsys, str(sweep), "--no-figure", "--details")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    for text in ("tau_within lr", "tau_partial", "spearman", "tau_difference", "cmi_min", "regret"):
        assert text in out
