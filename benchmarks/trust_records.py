"""Records that lie: one run of a sweep says what it may not, and every command still gives the others' results."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trust_run import Ran, Row, gmprobe, warm
from trust_tests import _counted

SETTINGS = ("lr", "seed", "epochs", "milestones", "model", "augment", "environment", "rho", "data")
RESULTS = ("status", "error_gap", "test_error", "met_stop_ce", "num_train", "reason")
MEASURED = (
    "value",
    "stderr",
    "converged",
    "num_evals",
    "starts",
    "grid",
    "eigenvalues",
    "reason",
    "protocol",
)
TESTS = {
    "a .pt of which two readers could see two contents; bombs as .npz, .npy, CSV and Parquet: refused, not unpacked": (
        "test_torch_zip.py::test_what_readers_could_take_for_two_files_is_refused",
        "test_torch_zip.py::test_a_tar_file_that_begins_as_a_pickle_is_refused",
        "test_trust.py::test_arrays_that_are_none",
        "test_spreadsheets.py::test_thousands_of_columns_are_refused_at_once_unless_some_are_chosen",
        "test_spreadsheets.py::test_a_csv_of_too_many_cells_is_refused_before_it_is_read",
        "test_spreadsheets.py::test_parquet_bombs_are_refused",
    ),
    "a state.pt that lies or is broken: exit 3, one line with the file; nothing is trained": (
        "test_training_loop.py::test_a_state_that_lies_is_named",
        "test_training_loop.py::test_broken_state_is_named",
    ),
    "names and reasons that steer a terminal or a spreadsheet: every way of printing shows them as text": (
        "test_output.py",
    ),
    "WORLD_SIZE and its like, limits of memory, integers beyond bounds: one line, the right exit code": (
        "test_environment.py",
    ),
}
"""Kinds that tests try already."""
ODD: dict[str, Any] = {
    "text": "many",
    "a list": [1, [2]],
    "a table": {"a": {"b": 1}},
    "true": True,
    "a huge integer": 10**30,
    "a negative": -5,
    "a long text": "A" * 100_000,
    "escapes": "\x1b[2J\x1b]0;owned\x07\u202e\u009b31m\nline",
}
"""Values of kinds that few keys take."""
NAMES = (
    "run",
    "status",
    "error_gap",
    "test_error",
    "num_test",
    "seed",
    "lr",
    "A" * 100_000,
    "\ud800",
    "\x1b[2J",
)
"""Names that mean something else, or nothing that can be shown."""
LAWFUL = frozenset(
    ("summary.json error_gap a negative", "measures.json value a negative", "a result 'error_gap'")
)
"""Cases whose value is one that a run may have: its τ is another, and right."""


def deep(levels: int = 3000) -> str:
    """A JSON list of lists."""
    return "[" * levels + "]" * levels


def put(path: Path, key: str, value: Any) -> None:
    """Set the ``key`` of a JSON file, whose parts dots separate."""
    content = json.loads(path.read_text())
    table = content
    *above, last = key.split(".")
    for part in above:
        table = table[part]
    table[last] = value
    path.write_text(json.dumps(content))


def toml(path: Path, key: str, text: str) -> None:
    """Set the ``key`` of a TOML file to the ``text`` of a value."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key} = ")]
    path.write_text("\n".join([f"{key} = {text}", *lines]) + "\n")


def spoilt() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """What is done to one run folder, by name: the file, the key and the value."""
    for kind, value in ODD.items():
        text = json.dumps(value) if not isinstance(value, dict) else "{ a = { b = 1 } }"
        for key in SETTINGS:
            yield f"config.toml {key} {kind}", lambda run, k=key, v=text: toml(run / "config.toml", k, v)
        for key in RESULTS:
            yield f"summary.json {key} {kind}", lambda run, k=key, v=value: put(run / "summary.json", k, v)
        for key in MEASURED:
            place = f"measures.fisher_trace.{key}"
            yield (
                f"measures.json {key} {kind}",
                lambda run, k=place, v=value: put(run / "measures.json", k, v),
            )
        for key in (
            "measures",
            "settings",
            "density",
            "settings.rho",
            "settings.mean",
            "measures.fisher_trace",
        ):
            yield f"measures.json {key} {kind}", lambda run, k=key, v=value: put(run / "measures.json", k, v)
        for key in ("epoch", "running_loss", "test_error", "x"):
            row = json.dumps({"epoch": 1, key: value}) + "\n"
            yield f"metrics.jsonl {key} {kind}", lambda run, r=row: (run / "metrics.jsonl").write_text(2 * r)
    for name in NAMES:
        row = {"value": 1.0}
        yield f"a measure {name[:20]!r}", lambda run, n=name, r=row: _measure(run, n, r)
        yield f"a result {name[:20]!r}", lambda run, n=name: _key(run / "summary.json", n, 1.0)
        key = json.dumps(name) if "\ud800" not in name else '"odd"'
        yield f"a setting {name[:20]!r}", lambda run, k=key: toml(run / "config.toml", k, "1.5")
    for file in ("summary.json", "measures.json", "metrics.jsonl"):
        for text in (
            deep(),
            "[]",
            "3",
            "null",
            '"x"',
            '{"a": ' + deep() + "}",
            "{" * 3000,
            "",
            "\0",
            "\ufeff{}",
        ):
            yield f"{file} is {text[:12]!r}", lambda run, f=file, t=text: (run / f).write_text(t)
    for text in (
        f"a = {deep()}",
        "a" + ".b" * 3000 + " = 1",
        "a = 1979-05-27",
        f"a = 0x{'f' * 9000}",
        "a = nan",
        "[[a]]",
    ):
        yield f"config.toml is {text[:12]!r}", lambda run, t=text: (run / "config.toml").write_text(t)
    many = "\n".join(f"s{i} = {i}" for i in range(20_000))
    yield "config.toml has 20,000 settings", lambda run: (run / "config.toml").write_text(many)
    for number in (70, 20_000):
        rows = {f"m{i}": {"value": 1.0} for i in range(number)}
        yield f"{number} measures", lambda run, r=rows: put(run / "measures.json", "measures", r)
    yield "error.txt of a megabyte", lambda run: (run / "error.txt").write_text("\x1b[2J" * 250_000)


def _measure(run: Path, name: str, row: Any) -> None:
    content = json.loads((run / "measures.json").read_text())
    content["measures"][name] = row
    (run / "measures.json").write_text(json.dumps(content))


def _key(path: Path, name: str, value: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


SEEN = re.compile(r"internal error|Traceback|\x1b|[\x80-\x9f\u202a-\u202e\u2066-\u2069]")
"""What no output may have."""


def _problem(ran: Ran, codes: set[int], said: str | None = None) -> str | None:
    if ran.code not in codes:
        lines = ran.err.splitlines()
        return f"exit {ran.code}: {lines[-1][:200] if lines else ''}"
    found = SEEN.search(ran.out + ran.err)
    if found is not None:
        return f"printed {found[0]!r}"
    longest = max(map(len, [*ran.out.splitlines(), *ran.err.splitlines()]), default=0)
    if longest > 20_000:
        return f"a line of {longest:,} characters"
    return f"does not say {said}" if said is not None and said not in ran.out + ran.err else None


class Bench:
    """A folder of four runs, of which the last is spoilt."""

    def __init__(self, folder: Path) -> None:
        self.sound, self.runs = folder / "sound", folder / "runs"
        train = "--data digits --model mlp-8 --num-train 60 --num-unlabeled 20 --num-test 20 --epochs 2 --eval-every 1"
        for seed in range(4):
            out = self.sound / f"run{seed}"
            ran = gmprobe("train", *train.split(), "--seed", seed, "--out", out, "-q")
            assert ran.code == 0, ran.err
        ran = gmprobe("measure", self.sound, "--starts", "2", "--device", "cpu", "--save", "--json", "-q")
        assert ran.code == 0, ran.err
        self.fresh()
        shutil.rmtree(self.runs / "run3")
        self.others = self.taus()

    def fresh(self) -> Path:
        shutil.rmtree(self.runs, ignore_errors=True)
        shutil.copytree(self.sound, self.runs)
        return self.runs / "run3"

    def taus(self) -> Any:
        """τ and n of every measure over the folder."""
        ran = gmprobe("correlate", self.runs, "--json", "--measures", "fisher_trace")
        if ran.code != 0:
            return ran.err
        found = json.loads(ran.out)["measures"]["fisher_trace"]["error_gap"]
        return found["tau"], found["n"]

    def correlated(self, whole: Any) -> str | None:
        found = self.taus()
        return None if found in (self.others, whole) else f"correlate gives {str(found)[:200]}"


def _commands(bench: Bench) -> Iterator[tuple[str, str | None]]:
    runs, out = bench.runs, bench.runs.parent
    yield "status", _problem(gmprobe("status", runs, within=30), {0})
    yield "collect", _problem(gmprobe("collect", runs, "--out", out / "c.csv", within=30), {0})
    yield "correlate", _problem(gmprobe("correlate", runs, "--no-figure", "--details", within=60), {0})
    yield "report", _problem(gmprobe("report", runs, "--out", out / "r.html", within=120), {0})
    options = ("--starts", "2", "--device", "cpu", "--save", "--measures", "fisher_trace,parameter_norm")
    yield "measure", _problem(gmprobe("measure", runs, *options, within=60), {0, 1, 2, 3, 4, 7})


def run(small: bool) -> tuple[list[Row], list[str]]:
    row = Row(
        "one run's record lies: status, collect, correlate, report and measure end, say nothing of internal errors, "
        "print no control characters, and give the others' τ"
    )
    with tempfile.TemporaryDirectory() as name:
        warm(Path(name))
        bench = Bench(Path(name))
        bench.fresh()
        whole = bench.taus()
        cases = list(spoilt())
        for case, spoil in cases[::25] if small else cases:
            spoil(bench.fresh())
            problems = [f"{command}: {wrong}" for command, wrong in _commands(bench) if wrong is not None]
            bench.fresh()
            spoil(bench.runs / "run3")
            wrong = None if case in LAWFUL else bench.correlated(whole)
            row.add(case, "; ".join([*problems, *filter(None, [wrong])]) or None)
    counted, notes = _counted(TESTS, small)
    return [row, *counted], notes
