"""What tests try already, counted: numbers that are not finite, a model's wholeness, memory that runs out."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from trust_run import Row

ROOT = Path(__file__).parents[1]
NUMBERS = {
    "NaN put into weights, buffers, optimizer, average, data, gradient, loss, perturbation: the run ends as diverged, "
    "the place is named, nothing of it is saved": (
        "test_faults.py::test_what_is_not_finite_is_named_ends_the_run_as_diverged_and_is_never_saved",
    ),
    "exceptions at six depths of each measure: parameters, buffers, modes, hooks and random states are as they were": (
        "test_faults.py::test_a_model_is_left_whole_after_an_exception_anywhere",
    ),
    "properties of the KL divergence (≥ 0, 0 for equal logits, right at the extremes), each over many generated rows": (
        "test_kl.py::test_never_negative_and_right_anywhere",
        "test_kl.py::test_equal_logits_give_exactly_zero",
        "test_kl.py::test_shift_of_logits_changes_nothing",
        "test_kl.py::test_extreme_logits",
    ),
}
MEMORY = {
    "memory runs out in a measure, at several depths: the batch is halved, and the result is the same to 1e-6": (
        "test_faults.py::test_batches_are_halved_where_memory_runs_out",
    ),
    "memory runs out in training, at several depths: exit 6 with advice, the batch size never changed": (
        "test_faults.py::test_training_never_changes_its_batch_size",
    ),
}


def _counted(tests: dict[str, tuple[str, ...]], small: bool) -> tuple[list[Row], list[str]]:
    rows = []
    for what, names in tests.items():
        row = Row(what)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
            chosen = names[:1] if small else names
            subprocess.run(
                [*command, *(f"tests/{name}" for name in chosen)], cwd=ROOT, capture_output=True, check=False
            )
            for case in ElementTree.parse(report).iter("testcase"):
                wrong = [child.tag for child in case if child.tag in {"failure", "error", "skipped"}]
                row.add(case.get("name", ""), wrong[0] if wrong else None)
        assert row.tried, f"no test of {names}"
        rows.append(row)
    return rows, []


def numbers(small: bool) -> tuple[list[Row], list[str]]:
    return _counted(NUMBERS, small)


def memory(small: bool) -> tuple[list[Row], list[str]]:
    return _counted(MEMORY, small)
