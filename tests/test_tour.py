"""The notebook's cells run, one after the other, and come to the results that its text speaks of."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def test_the_tour_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 10
    script = tmp_path / "tour.py"
    script.write_text("\n".join(code), encoding="utf-8")
    plt.switch_backend("agg")
    names = runpy.run_path(str(script))
    plt.close("all")
    assert "leads with" in capsys.readouterr().out
    assert names["estimated"]["covered"].all()
    assert len(names["frame"]) == 18
