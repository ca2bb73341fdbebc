"""Files: the old content or the new, never a part, and errors that name the path."""

from __future__ import annotations

import errno
import math
import os
import socket
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from gm_probe.errors import StorageError
from gm_probe.files import atomic, regular
from gm_probe.files.atomic import (
    append_line,
    read_json,
    read_toml,
    remove_temporary,
    write_atomic,
    write_json,
    write_toml,
)


def _full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b c" / "ü.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["ü.bin"]


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (Path, "open")])
def test_failed_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    path = tmp_path / "state.pt"
    write_atomic(path, b"old")
    monkeypatch.setattr(owner, name, _full)
    with pytest.raises(StorageError) as caught:
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]
    assert str(path) in str(caught.value)
    assert "No space left" in str(caught.value)
    assert caught.value.exit_code == 7
    assert "\n" not in str(caught.value)


def test_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def interrupt(_: int) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_an_interrupt_right_after_the_file_is_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.open

    def interrupted(path: Path, mode: str) -> NoReturn:
        original(path, mode).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.json", b"new")
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(StorageError, match=r"cannot write .*config\.toml"):
        write_toml(tmp_path / "runs" / "config.toml", {"a": 1})


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
    finally:
        assert os.umask(before) == 0o027  # reading the mask did not change it
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_is_strict(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"value": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": value})
    assert read_json(path) == {"value": 1.0}


def test_json_keeps_floats_exactly(tmp_path: Path) -> None:
    value = {"a": [0.1 + 0.2, 5e-324, 1e300], "name": "λ_max", "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_toml_round_trip_drops_none_only(tmp_path: Path) -> None:
    value = {"lr": 0.1, "rho": None, "seed": 0, "augment": False, "model": 'a "b"\\ü.py:f', "list": [1, 2]}
    write_toml(tmp_path / "a.toml", {**value, "inner": {"x": 1e-8, "y": None}})
    del value["rho"]
    read = read_toml(tmp_path / "a.toml")
    assert read == {**value, "inner": {"x": 1e-8}}
    assert type(read["lr"]) is float
    assert read["augment"] is False


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b"nonsense"])
def test_broken_json_names_the_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"a\.json is not valid JSON"):
        read_json(path)


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"a = 1\na = 2\n", b"a = " + b"[" * 50_000])
def test_broken_toml_names_the_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"a\.toml is not valid TOML"):
        read_toml(path)


def test_missing_files_name_the_path(tmp_path: Path) -> None:
    for read in (read_json, read_toml):
        with pytest.raises(StorageError, match=r"cannot read .*gone: No such file"):
            read(tmp_path / "gone")


def test_folder_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(atomic, "_sync_folder", synced.append)
    write_atomic(tmp_path / "a", b"x")
    assert synced == [tmp_path]


def test_lines_are_appended(tmp_path: Path) -> None:
    for line in ("one", "zwei ü"):
        append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\nzwei ü\n"
    with pytest.raises(StorageError, match="cannot write"):
        append_line(tmp_path / "missing" / "log", "line")


def test_only_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    write_atomic(tmp_path / "state.pt", b"whole")
    (tmp_path / ".state.pt.gmprobe-node.7.0123abcd.tmp").touch()
    remove_temporary(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


OTHERS = (
    ".notes.tmp",
    ".draft.docx.tmp",
    ".state.pt.node.7.0123abcd.tmp",
    ".state.pt.gmprobe-node.7.0123abc.tmp",
    ".state.pt.gmprobe-node.x.0123abcd.tmp",
    "state.pt.gmprobe-node.7.0123abcd.tmp",
    ".gmprobe-node.7.0123abcd.tmp",
    ".state.pt.gmprobe-node.7.0123abcd.tmp.bak",
)


def test_nobody_elses_files_are_removed(tmp_path: Path) -> None:
    for name in OTHERS:
        (tmp_path / name).write_text("mine")
    target = tmp_path / "target"
    target.write_text("mine")
    dead = f".a.gmprobe-{socket.gethostname()}"
    (tmp_path / f"{dead}.4194304.0123abcd.tmp").symlink_to(target)  # beyond all numbers of processes
    (tmp_path / f"{dead}.4194305.0123abcd.tmp").mkdir()
    before = sorted(entry.name for entry in tmp_path.iterdir())
    remove_temporary(tmp_path)
    write_atomic(tmp_path / "a", b"")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*before, "a"])
    assert target.read_text() == "mine"


# ---- what is opened


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/{path.name}")  # the path itself may be too long for a socket
        os.close(here)


KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": bound,
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "a link to itself": lambda path: path.symlink_to(path),
}
"""Ways to put at a path what is not a regular file of its folder."""


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read_and_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "record.json"
    (tmp_path / "elsewhere").write_text("{}")
    KINDS[kind](path)
    for use in (read_json, read_toml, partial(append_line, line="line")):
        with pytest.raises(
            StorageError, match=r"record\.json: (it is a link|it is not a regular|Is a directory)"
        ):
            use(path)
    assert (tmp_path / "elsewhere").read_text() == "{}"
    assert not (tmp_path / "nothing").exists()


def test_what_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("a = 1")
    (tmp_path / "link.toml").symlink_to("recipe.toml")
    assert read_toml(tmp_path / "link.toml", follow=True) == {"a": 1}
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "device.toml").symlink_to("/dev/zero")
    for name in ("pipe.toml", "device.toml"):
        with pytest.raises(StorageError, match="not a regular file"):
            read_toml(tmp_path / name, follow=True)


def test_a_file_of_two_names_is_not_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "log").hardlink_to(tmp_path / "mine")
    with pytest.raises(StorageError, match="second name"):
        append_line(tmp_path / "log", "line")
    write_atomic(tmp_path / "log", b"new")  # puts another file in its place
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_record_has_a_size(tmp_path: Path) -> None:
    for name, size in (("summary.json", regular.RECORD), ("split.json", regular.LARGER["split.json"])):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size + 1)  # of holes alone
        with pytest.raises(StorageError, match=f"larger than {size:,} bytes"):
            read_json(tmp_path / name)


def test_an_output_that_is_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out.csv").symlink_to(tmp_path / "mine")
    write_atomic(tmp_path / "out.csv", b"new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "out.csv").is_symlink()
