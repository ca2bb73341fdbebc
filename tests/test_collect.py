"""The table of all runs: read anew only where something changed, whatever became of the run or of what is kept."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from gm_probe.analysis import collect as module
from gm_probe.analysis import row_cache
from gm_probe.analysis.collect import collect, write_table
from gm_probe.analysis.row_cache import CACHE
from gm_probe.core.files import write_json, write_toml
from gm_probe.core.locks import exclusive

ROOT = Path(__file__).parents[1]


def write_run(run: Path, number: int, *, trace: float = 1.0) -> None:
    write_toml(run / "config.toml", {"lr": 0.1, "seed": number, "milestones": [1, 2], "augment": True})
    write_json(run / "summary.json", {"status": "finished", "error_gap": number / 7, "ce_gap": 1.0})
    row = {"value": trace, "stderr": number / 3, "converged": True}
    write_json(run / "measures.json", {"measures": {"fisher_trace": row}, "settings": {"rho": 0.1}})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five runs; what was written a moment ago may be kept."""
    monkeypatch.setattr(row_cache, "SETTLED", -1.0)
    for number in range(5):
        write_run(tmp_path / "runs" / f"r{number}", number)
    return tmp_path / "runs"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were read."""
    seen: list[str] = []
    real = module.read_run

    def read(path: Path) -> Any:
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(module, "read_run", read)
    return seen


def anew(root: Path) -> pd.DataFrame:
    """The table where nothing is kept."""
    (root / CACHE).unlink()
    return collect(root)


def replace(root: Path) -> None:
    """By another whose files have the same sizes and times of change."""
    write_run(root.parent / "other", 7)
    for file in (root.parent / "other").iterdir():
        old = (root / "r2" / file.name).stat()
        os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    shutil.rmtree(root / "r2")
    (root.parent / "other").rename(root / "r2")


CHANGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "measured again": (lambda root: write_run(root / "r2", 2, trace=2.0), ["r2"]),
    "replaced": (replace, ["r2"]),
    "deleted": (lambda root: shutil.rmtree(root / "r2"), []),
    "renamed": (lambda root: (root / "r2").rename(root / "r9"), ["r9"]),
    "new": (lambda root: write_run(root / "r9", 9), ["r9"]),
    "failed": (lambda root: (root / "r2" / "error.txt").write_text("no\n"), ["r2"]),
    "unmeasured": (lambda root: (root / "r2" / "measures.json").unlink(), ["r2"]),
    "begun again": (lambda root: (root / "r2" / "summary.json").unlink(), ["r2"]),
    "torn": (lambda root: (root / "r2" / "measures.json").write_text("{"), ["r2"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_changed_is_read_again(change: str, root: Path, reads: list[str]) -> None:
    first = collect(root)
    assert sorted(reads) == ["r0", "r1", "r2", "r3", "r4"]
    reads.clear()
    assert_frame_equal(collect(root), first)
    assert reads == []
    do, wanted = CHANGES[change]
    do(root)
    found = collect(root)
    assert reads == wanted
    assert_frame_equal(found, anew(root))
    assert not found.equals(first)


def test_what_is_torn_is_read_each_time_until_it_is_whole(root: Path, reads: list[str]) -> None:
    whole = collect(root)
    good = (root / "r1" / "summary.json").read_bytes()
    (root / "r1" / "summary.json").write_text("[")
    assert "not valid JSON" in collect(root).reason[1]
    reads.clear()
    assert "not valid JSON" in collect(root).reason[1]
    assert reads == ["r1"]
    (root / "r1" / "summary.json").write_bytes(good)
    assert_frame_equal(collect(root), whole)


def test_who_is_at_work_is_asked_each_time(root: Path, reads: list[str]) -> None:
    assert set(collect(root).status) == {"finished"}
    with exclusive(root / "r3"):
        assert list(collect(root).status == "running") == [False, False, False, True, False]
    assert set(collect(root).status) == {"finished"}
    assert len(reads) == 5


def test_what_changed_a_moment_ago_is_not_kept(
    root: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within the grain of the disk's clock would have the same time."""
    monkeypatch.setattr(row_cache, "SETTLED", 1000.0)
    collect(root)
    reads.clear()
    collect(root)
    assert len(reads) == 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"code": "x", "rows": {}}',
        b'{"rows": {"r0": [[], 3]}}',
        b'{"rows": {"r0": 3}}',
        b'{"rows": []}',
    ],
)
def test_a_broken_cache_counts_as_none(content: bytes, root: Path, reads: list[str]) -> None:
    first = collect(root)
    (root / CACHE).write_bytes(content)
    assert_frame_equal(collect(root), first)
    assert len(reads) == 10
    assert_frame_equal(collect(root), first)  # and is mended
    assert len(reads) == 10


def test_what_other_code_read_is_read_again(
    root: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collect(root)
    (tmp_path / "other.py").write_text("other")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "other.py"))
    assert_frame_equal(collect(root), first)
    assert len(reads) == 10


def test_a_folder_that_cannot_be_written_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "CACHE", "r0/config.toml/in a file")
    assert len(collect(root)) == 5


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
from gm_probe.analysis.collect import write_table
from gm_probe.core.files import write_json, write_toml

root, table, writer, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
for number in range(count):
    run = root / f"w{writer}-{number}"
    write_toml(run / "config.toml", {"lr": 0.1 * writer, "seed": number})
    write_json(run / "summary.json", {"status": "finished", "error_gap": number / 7, "ce_gap": 1.0})
    write_json(run / "measures.json", {"measures": {"fisher_trace": {"value": 1.0, "stderr": writer}}})
    write_table(root, table)
"""


def test_sixteen_writers_lose_and_tear_no_row(tmp_path: Path) -> None:
    root, table, count = tmp_path / "runs", tmp_path / "t.csv", 5
    paths = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(root), str(table)]
    writers = [subprocess.Popen([*command, str(k), str(count)], env=paths) for k in range(16)]
    sizes = [0]
    while any(writer.poll() is None for writer in writers):
        if table.exists():
            text = table.read_text()
            assert text.endswith("\n")
            sizes.append(len(pd.read_csv(io.StringIO(text))))
        time.sleep(0.01)
    assert [writer.wait() for writer in writers] == [0] * 16
    assert sizes == sorted(sizes)  # no table was replaced by an older one
    frame = pd.read_csv(table, converters={"lr": float, "error_gap": float})
    assert sorted(frame.run) == sorted(f"w{k}-{n}" for k in range(16) for n in range(count))
    assert (frame.status == "finished").all()
    for row in frame.itertuples():
        k, n = map(int, str(row.run)[1:].split("-"))
        assert (row.lr, row.seed, row.error_gap, row.fisher_trace_stderr) == (0.1 * k, n, n / 7, k)
