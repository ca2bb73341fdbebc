"""What is passed over in a folder of images is counted and named."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from gm_probe.data.datasets import open_source
from gm_probe.data.folders import KINDS, PassedOver


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        Image.new("RGB", (4, 4)).save(path)
    else:
        path.touch()


def test_a_labeled_folder_counts_what_is_not_read(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("a/1.png", "b/2.png", "b/deep/3.PNG"):
        put(root / name)
    for name in ("a/x.txt", "b/y.TXT", "b/deep/z.eps", "loose.png", "README", ".DS_Store", "a/._1.png"):
        put(root / name)
    pool = open_source(str(root), labeled=True).pool
    counted = {".txt": 2, "hidden": 2, ".eps": 1, "no suffix": 1, "image outside the class folders": 1}
    assert (len(pool), pool.passed_over) == (3, counted)
    (said,) = pool.notes
    assert said.startswith(f"{root}: these entries were skipped: 2 × ")
    for kind, count in counted.items():
        assert f"{count} × {kind}" in said


def test_an_unlabeled_folder_reads_loose_images_and_counts_links_that_lead_back(tmp_path: Path) -> None:
    put(tmp_path / "data" / "loose.png")
    put(tmp_path / "data" / "a" / "1.png")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    pool = open_source(str(tmp_path / "data"), labeled=False).pool
    assert (len(pool), pool.passed_over) == (2, {"folder linked again": 1})


def test_what_lies_beside_the_parts_is_counted(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "test/a/1.png", "val/a/1.png", "extra/1.png", "cover.png"):
        put(tmp_path / "data" / name)
    put(tmp_path / "data" / "train" / "labels.csv")
    source = open_source(str(tmp_path / "data"), labeled=True)
    beside = {"image beside the parts": 1, "folder val": 1, "folder extra": 1}
    assert source.test.passed_over == beside
    assert source.pool.passed_over == {**beside, ".csv": 1}


def test_nothing_passed_over_is_not_mentioned(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png")
    pool = open_source(str(tmp_path), labeled=True).pool
    assert (pool.passed_over, pool.notes) == ({}, ())


def test_a_million_suffixes_are_not_kept_apart() -> None:
    passed = PassedOver()
    for index in range(1000):
        passed.note(f".{index}")
    passed.note(".0")
    assert (len(passed), passed.total(), passed[".0"]) == (KINDS + 1, 1001, 2)
