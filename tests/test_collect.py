"""The table of all runs, whatever became of them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from gm_probe.files.atomic import write_json, write_toml
from gm_probe.files.locks import exclusive
from gm_probe.tables.collect import collect, write_table

ROOT = Path(__file__).parents[1]


def write_run(run: Path, number: int, *, trace: float = 1.0) -> None:
    write_toml(run / "config.toml", {"lr": 0.1, "seed": number, "milestones": [1, 2], "augment": True})
    write_json(run / "summary.json", {"status": "finished", "error_gap": number / 7, "ce_gap": 1.0})
    row = {"value": trace, "stderr": number / 3, "converged": True}
    write_json(run / "measures.json", {"measures": {"fisher_trace": row}, "settings": {"rho": 0.1}})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five runs."""
    for number in range(5):
        write_run(tmp_path / "runs" / f"r{number}", number)
    return tmp_path / "runs"


def test_a_run_that_is_torn_is_a_row_that_says_so(root: Path) -> None:
    whole = collect(root)
    good = (root / "r1" / "summary.json").read_bytes()
    (root / "r1" / "summary.json").write_text("[")
    assert "not valid JSON" in collect(root).reason[1]
    (root / "r1" / "summary.json").write_bytes(good)
    assert_frame_equal(collect(root), whole)


def test_who_is_at_work_is_asked_each_time(root: Path) -> None:
    assert set(collect(root).status) == {"finished"}
    with exclusive(root / "r3"):
        assert list(collect(root).status == "running") == [False, False, False, True, False]
    assert set(collect(root).status) == {"finished"}


# ---- files


def test_parquet_holds_the_same(root: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = write_table(root, root.parent / "t.parquet")
    assert frame.seed.tolist() == [0, 1, 2, 3, 4]
    assert_frame_equal(pd.read_parquet(root.parent / "t.parquet"), frame)


def test_parquet_of_runs_whose_settings_have_several_types(root: Path) -> None:
    pytest.importorskip("pyarrow")
    write_json(root / "r1" / "summary.json", {"status": "finished", "width": "wide", "done": True})
    write_json(root / "r2" / "summary.json", {"status": "finished", "width": 0.5, "done": 3})
    write_table(root, root.parent / "t.parquet")
    found = pd.read_parquet(root.parent / "t.parquet")
    assert found.width.tolist()[1:3] == ["wide", "0.5"]
    assert found.done.tolist()[1:3] == ["True", "3"]


WRITER = """
import sys
from pathlib import Path
from gm_probe.tables.collect import write_table
from gm_probe.files.atomic import write_json, write_toml

root, table, writer, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
for number in range(count):
    run = root / f"w{writer}-{number}"
    write_toml(run / "config.toml", {"lr": 0.1 * writer, "seed": number})
    write_json(run / "summary.json", {"status": "finished", "error_gap": number / 7, "ce_gap": 1.0})
    write_json(run / "measures.json", {"measures": {"fisher_trace": {"value": 1.0, "stderr": writer}}})
    write_table(root, table)
"""


def test_eight_writers_lose_and_tear_no_row(tmp_path: Path) -> None:
    root, table, count = tmp_path / "runs", tmp_path / "t.csv", 5
    paths = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(root), str(table)]
    writers = [subprocess.Popen([*command, str(k), str(count)], env=paths) for k in range(8)]
    sizes = [0]
    while any(writer.poll() is None for writer in writers):
        if table.exists():
            text = table.read_text()
            assert text.endswith("\n")
            sizes.append(len(pd.read_csv(io.StringIO(text))))
        time.sleep(0.01)
    assert [writer.wait() for writer in writers] == [0] * 8
    assert sizes == sorted(sizes)  # no table was replaced by an older one
    frame = pd.read_csv(table, converters={"lr": float, "error_gap": float})
    assert sorted(frame.run) == sorted(f"w{k}-{n}" for k in range(8) for n in range(count))
    assert (frame.status == "finished").all()
    for row in frame.itertuples():
        k, n = map(int, str(row.run)[1:].split("-"))
        assert (row.lr, row.seed, row.error_gap, row.fisher_trace_stderr) == (0.1 * k, n, n / 7, k)
