"""What a newcomer trips over: start-up, terminals that show little, odd paths, missing arguments, a machine's gaps."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pytest
from command_line import exit_code
from PIL import Image

from gm_probe.cli import COMMANDS, cli, main
from gm_probe.cli import health as doctor
from gm_probe.cli.health import Diagnosis, diagnose
from gm_probe.cli.output import results_console, table
from gm_probe.data.names import DATASETS
from gm_probe.errors import StorageError
from gm_probe.files import locks

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "numpy", "pandas", "scipy", "sklearn", "matplotlib", "jinja2", "timm"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def gmprobe(*words: str, encoding: str = "utf-8", **env: str) -> Done:
    """`gmprobe WORDS` in this process, piped, with streams of ``encoding``."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            main(list(words))
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    return Done(code, out, err)


def python(code: str, *words: str, **env: str) -> Done:
    """``code`` in a process of its own, with the arguments ``words``."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
    )
    return Done(done.returncode, done.stdout, done.stderr)


# ---- start-up


def test_no_help_waits_for_a_heavy_library() -> None:
    """One process asks every command; what any of them imports stays in sys.modules."""
    code = (
        "import contextlib, io, sys\n"
        "from gm_probe.cli import COMMANDS, main\n"
        "for words in ([], ['--help'], ['--version'], *([name, '--help'] for name in COMMANDS)):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(words)\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    assert not heavy, f'{words} imports {heavy}'\n"
    )
    done = python(code)
    assert done.code == 0, done.err


def test_correlate_and_report_never_import_torch(tmp_path: Path) -> None:
    rows = "error_gap,fisher_trace,lr\n" + "".join(f"0.{i},{i},{i % 2}\n" for i in range(1, 9))
    (tmp_path / "t.csv").write_text(rows)
    code = (
        "import sys\n"
        "from gm_probe.cli import main\n"
        "main(['report', 't.csv', '-q'])\n"
        "main(['correlate', 't.csv', '--json', '--figure', 'plot.svg'])\n"
        "heavy = {'torch', 'torchvision', 'sklearn', 'timm', 'matplotlib.pyplot'}\n"
        "assert 'matplotlib.figure' in sys.modules and not heavy & set(sys.modules)\n"
    )
    done = python(code)
    assert done.code == 0, done.err
    assert json.loads(done.out)["measures"]["fisher_trace"]["error_gap"]["tau"] == pytest.approx(1.0)


# ---- terminals


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_old_encoding_shows_the_codes_of_what_it_lacks(encoding: str) -> None:
    done = gmprobe("measures", encoding=encoding)
    assert done.code == 0, done.err
    assert "S_\\u03c1" in done.out
    done = gmprobe("train", "--data", "ρ漢", encoding=encoding)
    assert (done.code, r"no folder or file '\u03c1\u6f22'" in done.err) == (2, True), done.err


def test_a_posix_locale_is_no_crash() -> None:
    code = (
        "import contextlib\n"
        "from gm_probe.cli import main\n"
        "for words in (['--help'], ['tune', '--help'], ['measures'], ['doctor']):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(words)\n"
    )
    done = python(code, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (done.code, done.err) == (0, "")
    assert "S_\\u03c1" in done.out


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("measures >&-", 0),
        ("measures 2>&-", 0),
        ("measure nope.pt 2>/dev/full", 3),
        ("measure nope.pt >&- 2>&-", 3),
        ("--debug measure nope.pt 2>/dev/full", 3),
        ("measures >/dev/full", 7),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = subprocess.run(
        f"{sys.executable} -m gm_probe {command}",
        shell=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == code, done.stderr


def test_closed_streams_keep_their_numbers(tmp_path: Path) -> None:
    """Or a file opened later would take one, and what a library writes to stdout would end in it."""
    script = tmp_path / "closed.py"
    script.write_text(
        "import contextlib, sys\nfrom gm_probe.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['measures'])\n"
        "sys.exit([stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)] != [0, 1, 2])"
    )
    command = f"{sys.executable} {script} <&- >&-"
    assert (
        subprocess.run(command, shell=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
        == 0
    )


@pytest.mark.parametrize("name", [None, *COMMANDS])
@pytest.mark.parametrize("width", [60, 100])
def test_help_fits_the_terminal(name: str | None, width: int) -> None:
    context = click.Context(cli, info_name="gmprobe", terminal_width=width)
    command: click.Command = cli
    if name is not None:
        found = cli.get_command(context, name)
        assert found is not None
        command = found
    text = command.get_help(click.Context(command, info_name=name, parent=context, terminal_width=width))
    wide = [line for line in text.splitlines() if len(line) > width and "  " not in line.strip()]
    assert not wide
    assert re.search(r"Example:  gmprobe|gmprobe quickstart|eval", text)


def test_what_is_piped_is_never_folded() -> None:
    piped = gmprobe("measures").out
    assert re.search(r"│ local_inconsistency_converged +│", piped)
    narrow = gmprobe("measures", COLUMNS="60").out
    assert max(map(len, narrow.splitlines()[:-1])) <= 60


@pytest.mark.parametrize("env", [{"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_no_colour_reaches_a_pipe(env: dict[str, str]) -> None:
    done = gmprobe("recipes", **env)
    assert done.code == 0
    assert not re.search(r"\x1b\[[\d;]*3\dm", done.out)  # bold may stay where colour is forced


# ---- paths


def test_spaces_and_letters_of_any_alphabet_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "mes données 数据 ρ"
    for label in ("chat noir", "собака"):
        (here / "images" / label).mkdir(parents=True)
        for index in range(12):
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(here / "images" / label / f"été {index}.png")
    monkeypatch.chdir(here)
    run = "résultats 1"
    words = ["--data", "images", "--model", "mlp-4", "--epochs", "1", "--out", run, "-q"]
    done = gmprobe("train", *words)
    assert done.code == 0, done.err
    done = gmprobe("measure", run, "--measures", "fisher_trace", "--save", "-q")
    assert done.code == 0, done.err
    done = gmprobe("collect", ".", "--out", "tableau ρ.csv")
    assert done.code == 0, done.err
    assert (here / "tableau ρ.csv").exists()


def image_folder(folder: Path) -> None:
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for index in range(12):
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")


TINY_RECIPE = (
    "[base]\nmodel = 'mlp-4'\nepochs = 1\n[grid]\nseed = [0, 1]\n"
    "[measure]\nmeasures = ['mean_entropy']\nmax_examples = 5\n"
)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    here = tmp_path / os.fsdecode(b"d\xff")
    try:
        image_folder(here / "images")
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / "r.toml").write_text(TINY_RECIPE)
    data, runs, run = f"{here}/images", f"{here}/runs", f"{here}/run"
    for words in (
        [*f"train --data {data} --model mlp-4 --epochs 1 --out {run} --save {here}/a.pt".split(" ")],
        ["measure", run, "--measures", "mean_entropy", "--save"],
        ["measure", f"{run}/checkpoint.safetensors", "--unlabeled", data, "--measures", "mean_entropy"],
        ["measure", f"{here}/a.pt", "--unlabeled", data, "--measures", "mean_entropy"],
        ["sweep", "r.toml", "--data", data, "--out", runs],
        ["status", runs],
        ["collect", runs],
        ["correlate", f"{runs}/table.csv"],
        ["report", runs, "--markdown", f"{here}/page.md"],
    ):
        done = gmprobe(*words, "-q")
        assert done.code == 0, (words, done.err)
    assert b"d\xff/images" in (here / "run" / "config.toml").read_bytes()
    done = gmprobe("train", "--data", f"{here}/image", "-q")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "d\\udcff/image" in done.err
    done = gmprobe("sweep", "r.toml", "--data", data, "--out", f"{here}/array", "--executor", "slurm")
    assert (done.code, "cannot write" in done.err) == (2, True), done.err


def test_a_name_that_a_library_refuses_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        "a\udcff".encode()

    from gm_probe.cli import listings

    monkeypatch.setattr(listings.measures, "callback", refuse)
    done = gmprobe("measures")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "a\\udcff" in done.err


def test_a_run_made_in_one_locale_is_measured_in_another(tmp_path: Path) -> None:
    image_folder(tmp_path / "données é")
    train = ["train", "--data", "données é", "--model", "mlp-4", "--epochs", "1", "-q", "--out"]
    measure = ["measure", "--measures", "mean_entropy", "-q"]
    assert exit_code([*train, "à"]) == 0
    code = "import sys; from gm_probe.cli import main; main(sys.argv[1:6]); main(sys.argv[6:])"
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = python(code, *measure, "à", *train, "ü", **ascii_only)
    assert done.code == 0, done.err
    assert exit_code([*measure, "ü"]) == 0


SMALL = ["--model", "mlp-4", "--num-train", "60", "--epochs", "1"]
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]|[ .]$')
RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def written(folder: Path) -> Iterator[str]:
    return (part for path in folder.rglob("*") for part in path.relative_to(folder).parts)


def test_every_name_that_is_written_suits_windows(tmp_path: Path) -> None:
    """A sweep over values that tempt: a model with a colon and a path, a regex, floats; and all that reads it."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    recipe = (
        "[base]\nepochs = 1\nnum_train = 60\n[grid]\nmodel = ['mlp-4', 'net.py:build']\nlr = [0.1, 1e-07]\n"
        "[measure]\nmeasures = ['fisher_trace']\nmax_examples = 20\nparams = 'weight|bias?'\n"
    )
    (tmp_path / "what.toml").write_text(recipe)
    for words in (
        ["sweep", "what.toml"],
        ["correlate", "runs/what"],
        ["report", "runs/what", "--figures", "runs/figures"],
        ["collect", "runs/what"],
        ["tune", "--method", "sam", "--rho", "0.1,0.2", "--seeds", "1", *SMALL],
    ):
        done = gmprobe(*words, "-q")
        assert done.code == 0, done.err
    names = [*written(tmp_path / "runs"), *written(tmp_path / "tune")]
    assert len(names) > 30
    assert not [name for name in names if FORBIDDEN.search(name) or RESERVED.search(name)]
    lower = [str(path).lower() for path in tmp_path.rglob("*")]
    assert len(set(lower)) == len(lower)  # Windows and macOS do not tell A from a


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home folder, as in a container: what needs one names the option instead."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    done = gmprobe("train", "--data", "cifar10")
    assert (done.code, "--data-root" in done.err) == (2, True), done.err
    done = gmprobe("doctor", "--json")
    assert done.code == 0, done.err
    findings = json.loads(done.out)["findings"]
    [others] = [f for f in findings if f["section"] == "data" and f["name"] != "digits"]
    assert others["state"] == "absent"


# ---- what need not be said


def test_runs_is_where_everything_looks(tmp_path: Path) -> None:
    done = gmprobe("measure")
    assert (done.code, "runs/" in done.err) == (2, True)
    for seed in ("0", "1"):
        assert gmprobe("train", *SMALL, "--seed", seed, "-q").code == 0
    done = gmprobe("measure", "--measures", "fisher_trace", "--save", "--json")
    assert done.code == 0, done.err
    assert "-s1-" in json.loads(done.out)[0]["checkpoint"]
    assert "the last run that finished" in done.err
    assert gmprobe("measure", "runs", "--measures", "fisher_trace", "--save", "-q").code == 0
    for command in ("status", "pairs", "collect", "correlate"):
        done = gmprobe(command, "-q")
        assert done.code == 0, done.err
    assert (tmp_path / "runs" / "table.csv").exists()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["corelate"], "'correlate'"),
        (["correlate", "--grp-by", "x"], "--group-by"),
        (["measure", "x.pt", "--unlabelled", "d"], "--unlabeled"),
        (["train", "--method", "iamd"], "'iam-d'"),
        (["train", "--model", "resnet18-cifr"], "'resnet18-cifar'"),
        (["train", "--schedule", "cosin"], "'cosine'"),
        (["train", "--data", "cifar-10"], "'cifar10'"),
        (["sweep", "quikstart"], "'quickstart'"),
        (["sweep", "r.toml"], "'fisher_trace'"),
        (["measure", "x.pt", "--protocol", "convergd"], "'converged'"),
        (["sweep", "quickstart", "--executor", "locl"], "'local'"),
        (["train", "--device", "cdua", "--out", "new"], "'cuda'"),
        (["sweep", "quickstart", "--device", "cdua"], "'cuda'"),
        (["sweep", "quickstart", "--device", "cdua", "--dry-run"], "'cuda'"),
        (["sweep", "quickstart", "--data", "digit"], "'digits'"),
        (["sweep", "model.toml"], "'mlp'"),
        (["sweep", "model.toml", "--dry-run"], "'mlp'"),
        (["sweep", "code.toml"], "net.py"),
        (["sweep", "method.toml"], "'iam-d'"),
        (["tune", "--method", "sam", "--model", "mpl"], "'mlp'"),
    ],
)
def test_did_you_mean(words: list[str], meant: str) -> None:
    Path("r.toml").write_text("[measure]\nmeasures = ['fisher_trase']\n")
    for name, setting in {"model": "mpl", "code": "net.py:build", "method": "iamd"}.items():
        Path(f"{name}.toml").write_text(f"[grid]\n{name.replace('code', 'model')} = ['{setting}']\n")
    done = gmprobe(*words)
    assert done.code == 2
    assert meant in done.err.splitlines()[-1]
    assert not any(Path(name).exists() for name in ("runs", "tune", "new"))


# ---- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_click_prints_the_shells_script(shell: str) -> None:
    done = gmprobe(_GMPROBE_COMPLETE=f"{shell}_source")
    assert done.code == 0, done.err
    assert f"_GMPROBE_COMPLETE={shell}_complete" in done.out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("gmprobe doc", {"doctor"}),
        ("gmprobe correlate --ga", {"--gap"}),
        ("gmprobe correlate --gap e", {"error_gap"}),
    ],
)
def test_bash_completes(typed: str, expected: set[str]) -> None:
    env = {"_GMPROBE_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = gmprobe(**env)
    assert {line.split(",")[1] for line in done.out.splitlines()} == expected


# ---- doctor


def found(folder: Path, **options: object) -> dict[tuple[str, str], Diagnosis]:
    return {(f.section.split()[0], f.name): f for f in diagnose(folder, **options)}  # type: ignore[arg-type]


def test_doctor_tells_what_is_here(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    findings = found(tmp_path / "runs" / "new", data_root=tmp_path)
    assert all(finding.exit_code == 0 for finding in findings.values())
    assert findings["versions", "torch"].found == version("torch")
    assert findings["folder", "writing"].found == "works"
    assert findings["folder", "locks"].state == "ok"
    assert findings["data", "cifar10"].state == "ok"
    assert findings["data", "svhn"].state == "absent"
    assert "--download" in findings["data", "svhn"].remedy
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]  # left as it was


def test_doctor_knows_every_extra_and_data_set() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"test", "dev", "docs"}
    assert set(doctor.DATA) == set(DATASETS)


def test_doctor_names_the_command_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = ["click>=8.2", "scipy>=9999", "nothing-of-the-kind>=1", 'no-such-timm>=1; extra == "timm"']
    monkeypatch.setattr(doctor, "requires", lambda _: listed)
    findings = found(tmp_path, data_root=tmp_path)
    assert findings["versions", "click"].state == "ok"
    old, gone, extra = (
        findings[key]
        for key in (("versions", "scipy"), ("versions", "nothing-of-the-kind"), ("extras", "timm"))
    )
    assert (old.state, old.exit_code, old.remedy) == ("broken", 6, "pip install 'scipy>=9999'")
    assert version("scipy") in old.found
    assert (gone.state, gone.remedy) == ("broken", "pip install 'nothing-of-the-kind>=1'")
    assert (extra.state, extra.exit_code, extra.remedy) == ("absent", 0, "pip install 'gm_probe[timm]'")


def test_doctor_survives_a_broken_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = found(tmp_path, data_root=tmp_path)["machine", "torch"]
    assert (finding.state, finding.exit_code) == ("broken", 6)


def test_doctor_finds_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    finding = found(tmp_path / "file" / "runs")["folder", "writing"]
    assert (finding.state, finding.exit_code) == ("broken", 7)

    def full(*_: object) -> None:
        raise StorageError("cannot write x: No space left on device; free space")

    monkeypatch.setattr(doctor, "write_atomic", full)
    finding = found(tmp_path)["folder", "writing"]
    assert (finding.exit_code, "No space left" in finding.found) == (7, True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_doctor_raises_nothing_where_it_may_not_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.exists

    def exists(path: Path) -> bool:
        if path.is_relative_to(tmp_path / "closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "exists", exists)
    findings = found(tmp_path / "closed" / "runs", data_root=tmp_path / "closed")
    writing = findings["folder", "writing"]
    assert (writing.state, writing.found, writing.exit_code) == ("broken", "Permission denied", 7)
    assert findings["data", "cifar10"].state == "absent"


def test_doctor_notices_locks_that_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)  # as on a file system that grants every lock
    assert found(tmp_path)["folder", "locks"].state == "absent"


def test_doctor_as_a_command() -> None:
    done = gmprobe("doctor", "--data-root", "nowhere", COLUMNS="60")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 60
    done = gmprobe("doctor", "--device", "cuda:99", "--out", str(Path(__file__) / "x"), "--json")
    report = json.loads(done.out)
    assert done.code == report["exit_code"] == 6
    broken = [f for f in report["findings"] if f["state"] == "broken"]
    assert {f["exit_code"] for f in broken} == {6, 7}
    assert all(f["remedy"] for f in broken)
    assert done.err == ""


def test_a_long_title_is_not_folded_to_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    title = "a/long/path/of a checkpoint.th  and/a/model.py:name  P = 269,722  N = 100"
    results_console().print(table(title, ["a", "b"], [["1", "2"]]))
    assert title in capsys.readouterr().out.splitlines()[0]


def test_a_home_that_cannot_be_written_is_no_noise(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("error_gap,m,lr\n" + "".join(f"{i},{i % 3},{i}\n" for i in range(6)))
    unset = {
        key: value for key, value in os.environ.items() if key not in {"MPLCONFIGDIR", "XDG_CONFIG_HOME"}
    }
    done = subprocess.run(
        [sys.executable, "-m", "gm_probe", "correlate", "t.csv", "-q"],
        cwd=tmp_path,
        env={**unset, "HOME": "/proc", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
