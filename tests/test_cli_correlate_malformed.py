"""What `gmprobe correlate` says to tables that are wrong, odd or hostile: one clear line and the right exit code."""

import csv
import io
import json
import math
from pathlib import Path

import command_line
import numpy as np
import pytest

from gm_probe.files.atomic import write_json, write_toml

GOOD = "error_gap,m,lr\n" + "".join(f"{0.1 * i:.2f},{(7 * i) % 11},{i // 2}\n" for i in range(12))


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``gmprobe correlate``."""
    return command_line.run(["correlate", *args], capsys)


REFUSED = {
    "an empty file": ("", (), 4, "is empty; it needs a header line"),
    "blank lines only": ("\n\n", (), 4, "is empty"),
    "a header alone": ("error_gap,m\n", (), 4, "has a header but no run below it"),
    "no gap": ("a,b\n1,2\n", (), 4, "no column error_gap"),
    "a gap of another name": ("gap,m\n1,2\n2,3\n", (), 4, "It has: gap, m"),
    "colons": ("error_gap:m\n1:2\n", (), 4, "It has: error_gap:m"),
    "a column twice": ("error_gap,m,m\n1,2,3\n", (), 4, "'m' more than once"),
    "a gap twice": ("error_gap,m,error_gap\n1,2,3\n", (), 4, "'error_gap' more than once"),
    "one run": ("error_gap,m\n1,2\n", (), 4, "1 usable run; a rank correlation needs at least 2"),
    "no measure": ("error_gap\n1\n2\n", (), 4, "no numeric column"),
    "text for a measure": ("error_gap,fisher_trace\n1,high\n2,3\n", (), 4, "row 1 holds 'high'"),
    "text for a gap": ("error_gap,m\nlow,1\n2,3\n", (), 4, "'error_gap' row 1 holds 'low'"),
    "a formula for a gap": ("error_gap,m\n=1+1,1\n2,3\n", (), 4, "holds '=1+1', which is not a number"),
    "two numbers in a cell": ('error_gap,m\n"1 2",1\n2,3\n', (), 4, "holds '1 2'"),
    "a decimal comma beside a point": ('error_gap,m\n"0,5",1\n0.2,3\n', (), 4, "holds '0,5'"),
    "a comma that may be either": ('error_gap,m\n"1,500",1\n2,3\n', (), 4, "comma may mark decimals"),
    "a longer row": ("error_gap,m\n1,2\n3,4,5\n", (), 4, "not a readable CSV"),
    "a torn quote": ('error_gap,m\n1,"2\n3,4\n', (), 4, "not a readable CSV"),
    "an escape sequence in a name": (
        "error_gap,m\x1b[2J\n1,2\n2,3\n",
        (),
        4,
        "unprintable characters",
    ),
    "nothing but missing values": ("error_gap,m\nnan,1\nnan,2\n", (), 4, "has a defined τ"),
    "measure and gap never together": ("error_gap,m\n1,\n,2\n3,\n", (), 4, "has a defined τ"),
    "a constant gap": ("error_gap,m\n1,2\n1,3\n", (), 4, "has a defined τ"),
    "infinities": ("error_gap,m\ninf,2\n-inf,3\n1e999,4\n", (), 4, "has a defined τ"),
    "an unknown measure": (GOOD, ("--measures", "n"), 2, "no column in"),
    "a gap as a measure": (GOOD, ("--measures", "error_gap"), 2, "is a gap and cannot be a measure too"),
    "an unknown hyperparameter": (GOOD, ("--hyper", "lrr"), 2, "did you mean 'lr'"),
    "an unknown control": (GOOD, ("--control", "train_ce"), 2, "no column to control for named 'train_ce'"),
    "a gap that is not there": (GOOD, ("--gap", "ce_gap"), 2, "no target 'ce_gap'"),
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
    found, _, err = run(capsys, str(path), "--no-figure", "--quiet", *args)
    assert found == code
    assert message in err
    assert err.startswith("gmprobe: ")
    assert err.count("\n") == 1


def test_bytes_that_are_no_text_and_files_that_are_no_tables(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "photo.csv").write_bytes(b"\x89PNG\xff\xfe\x00,\n")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, code in (("photo.csv", 4), ("notes.txt", 2), ("empty", 2), ("nowhere.csv", 2)):
        found, _, err = run(capsys, str(tmp_path / name))
        assert (found, err.count("\n")) == (code, 1), err


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


def test_simpsons_paradox_is_loud(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(5, 8))
    rows = [
        f"{9 * g + noise[g, i]},{9 * g - noise[g, i] + 0.1 * (i % 3)},{g},{i}"
        for g in range(5)
        for i in range(8)
    ]
    path = tmp_path / "t.csv"
    path.write_text("m,error_gap,weight_decay,lr\n" + "\n".join(rows))
    code, out, _ = run(capsys, str(path), "--no-figure")
    assert code == 0
    said = " ".join(out.split())
    assert "Within runs of the same weight_decay, m has the opposite sign (Simpson's paradox)." in said
