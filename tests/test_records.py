"""Run folders read back: whole, torn and ill-typed."""

from pathlib import Path

import pytest

from gm_probe.errors import StorageError, UsageError
from gm_probe.files.atomic import write_json, write_toml
from gm_probe.runs.records import find_runs, read_metrics, read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "lr0.1-a b"
    write_toml(path / "config.toml", {"lr": 0.1})
    write_json(path / "summary.json", {"status": "finished", "error_gap": 0.25})
    row = {"value": 1.5, "stderr": None}
    write_json(path / "measures.json", {"settings": {"rho": 0.1}, "measures": {"fisher_trace": row}})
    (path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    return path


def test_a_whole_run(run: Path) -> None:
    record = read_run(run)
    assert record.path == run
    assert record.status == "finished"
    assert record.config == {"lr": 0.1}
    assert record.summary["error_gap"] == 0.25
    assert record.measures == {"fisher_trace": {"value": 1.5, "stderr": None}}
    assert record.settings == {"rho": 0.1}


def test_a_run_under_way(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "measures.json").unlink()
    record = read_run(run)
    assert record.status == "unfinished"
    assert (record.summary, record.measures, record.settings) == ({}, {}, {})


def test_a_run_without_its_configuration(run: Path) -> None:
    (run / "config.toml").unlink()
    with pytest.raises(StorageError, match=r"cannot read .*config\.toml"):
        read_run(run)


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "measures.json"])
@pytest.mark.parametrize("content", [b'{"measures": {"fish', b"\x00\xff"])
def test_torn_files_are_named(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(StorageError, match=name.replace(".", r"\.")):
        read_run(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "[1]"),
        ("summary.json", "null"),
        ("summary.json", '"finished"'),
        ("measures.json", "[1]"),
        ("measures.json", "3"),
        ("measures.json", '{"measures": [1]}'),
        ("measures.json", '{"measures": null}'),
        ("measures.json", '{"measures": {}, "settings": [1]}'),
    ],
)
def test_ill_typed_files_are_named(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(StorageError, match=name.replace(".", r"\.")):
        read_run(run)


def test_find_runs_sorts_and_descends(run: Path) -> None:
    root = run.parent
    for name in ("b", "a/deep"):
        write_toml(root / name / "config.toml", {})
    assert find_runs(root) == [root / "a" / "deep", root / "b", run]
    assert find_runs(run) == [run]


def test_find_runs_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone is not a folder"):
        find_runs(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file is not a folder"):
        find_runs(tmp_path / "file")
    with pytest.raises(UsageError, match=r"holds no run"):
        find_runs(tmp_path)


@pytest.mark.parametrize("torn", [b"", b'{"epo', b'{"epoch": 3, "x": "\xc3'])
def test_metrics_end_at_a_torn_last_line(run: Path, torn: bytes) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2]


@pytest.mark.parametrize("line", [b'{"epo\n', b"\xff\xfe\n", b"[3]\n", b"3\n"])
def test_metrics_broken_within_are_refused(run: Path, line: bytes) -> None:
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(line + content)
    with pytest.raises(StorageError, match=r"metrics\.jsonl line 1"):
        list(read_metrics(run))


def test_metrics_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*metrics\.jsonl"):
        list(read_metrics(tmp_path))
