"""`gmprobe correlate` as a user meets it: output, notes, files and exit codes."""

import csv
import io
import json
import os
import re
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
    assert list(rows[0]) == [
        "measure",
        "target",
        "statistic",
        "group",
        "value",
        "low",
        "high",
        "p",
        "n",
        "note",
    ]
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


def test_gap_chooses_one(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    _, out, _ = run(capsys, str(table), "--json", "--no-figure", "--gap", "ce_gap")
    assert "error_gap" not in json.loads(out)["measures"]["fisher_trace"]


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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--measures", "fisher_trase"], "did you mean 'fisher_trace'"),
        (["--group-by", "lrr"], "did you mean 'lr'"),
        (["--figure", "plot.jpg"], "no format '.jpg'"),
        (["--figure", "plot.png", "--no-figure"], "exclude each other"),
        (["--gap", "ce_gapp"], "did you mean 'ce_gap'?"),
        (["--target", "test_eror"], "no column 'test_eror'; did you mean 'error_gap'?"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], table: Path, args: list[str], message: str) -> None:
    code, out, err = run(capsys, str(table), *args)
    assert (code, out) == (2, "")
    assert message in err
    assert list(table.parent.iterdir()) == [table]


def test_a_missing_source_or_gap_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, str(tmp_path / "nowhere"))[0] == 2
    path = tmp_path / "t.csv"
    path.write_text("error_gap,m\n1,2\n2,3\n")
    code, _, err = run(capsys, str(path), "--gap", "ce_gap")
    assert code == 2
    assert "no target 'ce_gap'" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "It has: a, b"),
        ("error_gap,m\n1,2\n", "1 usable run; a rank correlation needs at least 2"),
        ("error_gap,m\n1,x\n2,3\n", "no numeric column"),
        ("error_gap,fisher_trace\n1,x\n2,3\n", "row 1 holds 'x', which is not a number"),
    ],
)
def test_data_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    code, out, err = run(capsys, str(path))
    assert (code, out) == (4, "")
    assert message in err
    assert err.count("\n") == 1


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


def test_help_ends_with_an_example_that_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    code, out, _ = run(capsys, "--help")
    example = out.split("Example:")[-1].split()
    assert code == 0
    monkeypatch.chdir(runs.parent)
    assert run(capsys, *example[2:])[0] == 0
    assert (runs / "correlate.png").stat().st_size > 2000


def test_json_never_imports_torch_nor_pyplot(table: Path) -> None:
    code = (
        "import sys\n"
        "from gm_probe.cli import main\n"
        "try:\n"
        "    main(['correlate', 'table.csv', '--json', '--figure', 'plot.svg'])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=table.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_runs"] == 6


def test_no_color_is_honoured_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, table: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, err = run(capsys, str(table), "--no-figure")
    assert not re.search(r"\x1b\[[0-9;]*[349][0-7]", out + err)


@pytest.mark.parametrize("options", [(), ("--csv",)])
def test_a_reader_that_leaves_early_is_no_error(table: Path, options: tuple[str, ...]) -> None:
    command = [
        sys.executable,
        "-m",
        "gm_probe",
        "correlate",
        str(table),
        "--no-figure",
        *options,
    ]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, "Broken" in done.stderr) == (0, False), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(table: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "gm_probe",
                "correlate",
                str(table),
                "--no-figure",
                "-q",
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (7, "gmprobe: No space left on device: the output\n")
