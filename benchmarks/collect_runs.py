"""One CSV row a run of a sweep folder: settings, gaps, measures with their errors, status.

    python benchmarks/collect_runs.py RUNS > table.csv

``gmprobe correlate table.csv`` reads it back.
"""

import sys
from pathlib import Path

import pandas as pd

from gm_probe.core.records import find_runs, read_run

SETTINGS = ("model", "method", "lr", "batch_size", "weight_decay", "num_train", "seed")
SUMMARY = (
    "status",
    "met_stop_ce",
    "epochs",
    "train_ce",
    "train_error",
    "test_ce",
    "test_error",
    "error_gap",
    "ce_gap",
)


def main(root: Path) -> None:
    rows = []
    for path in find_runs(root):
        run = read_run(path)
        row = {"run": path.name}
        row |= {name: run.config.get(name) for name in SETTINGS}
        row |= {name: run.summary.get(name) for name in SUMMARY}
        for name, measure in run.measures.items():
            row[name] = measure["value"]
            row[f"{name}_stderr"] = measure["stderr"]
            row[f"{name}_stderr_examples"] = measure["stderr_examples"]
        rows.append(row)
    pd.DataFrame(rows).to_csv(sys.stdout, index=False, float_format="%.6g")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
