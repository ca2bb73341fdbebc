"""What happens when strangers point gm_probe at anything: hostile files, faults, and a count of what held.

    python benchmarks/trust.py                      # all parts that are not yet counted
    python benchmarks/trust.py checkpoints images   # these parts, anew
    python benchmarks/trust.py --report             # only write the table again

Parts are checkpoints, mutations, images, kills, faults, sharing, files, numbers, memory and records; they live in
files beside this one. A row counts what was tried and what held, and names every exception. Rows are kept in
benchmarks/results/trust.json as they are counted; the table is benchmarks/results/trust.md. Commands go through the
command line's own ``main`` in forks of one process that has torch loaded.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
RESULTS = HERE / "results"
PARTS = {
    "checkpoints": "trust_checkpoints",
    "mutations": "trust_mutations",
    "images": "trust_images",
    "kills": "trust_faults:kills",
    "faults": "trust_faults:faults",
    "sharing": "trust_sharing",
    "files": "trust_files",
    "numbers": "trust_tests:numbers",
    "memory": "trust_tests:memory",
    "records": "trust_records",
}
"""Module of each, and its function where that is not ``run``."""
Kept = dict[str, dict[str, object]]


def report(kept: Kept) -> str:
    """The table as Markdown."""
    import torch

    lines = [
        "# Trust\n",
        f"`python benchmarks/trust.py`, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}. What was tried, what held, and every exception by name.\n",
        "| part | tried | held | what holds |",
        "|---|---|---|---|",
    ]
    exceptions = []
    for part in PARTS:
        for row in kept.get(part, {}).get("rows", []):  # type: ignore[attr-defined]
            lines.append(f"| {part} | {row['tried']:,} | {row['held']:,} | {row['what']} |")
            exceptions += [f"- {part}: {text}" for text in row["exceptions"]]
    lines += ["\nExceptions:\n", *(exceptions or ["- none"])]
    notes = [f"- {part}: {note}" for part in PARTS for note in kept.get(part, {}).get("notes", [])]  # type: ignore[attr-defined]
    if notes:
        lines += ["\nSeen along the way:\n", *notes]
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--report", "only_report", is_flag=True, help="Only write the table again.")
@click.option("--small", is_flag=True, help="A few of each kind, for the tests; nothing is written.")
def main(parts: tuple[str, ...], only_report: bool, small: bool) -> None:
    store = RESULTS / "trust.json"
    kept: Kept = json.loads(store.read_text()) if store.exists() and not small else {}
    chosen = parts or tuple(part for part in PARTS if part not in kept)
    failed = False
    for part in () if only_report else chosen:
        began = time.perf_counter()
        module, _, function = PARTS[part].partition(":")
        rows, notes = getattr(importlib.import_module(module), function or "run")(small)
        for row in rows:
            print(f"{part}: {row.what}: {row.held} of {row.tried}", file=sys.stderr)
            for text in row.exceptions:
                print(f"    {text}", file=sys.stderr)
            failed = failed or row.held < row.tried
        kept[part] = {
            "rows": [asdict(row) for row in rows],
            "notes": notes,
            "seconds": round(time.perf_counter() - began),
        }
        if not small:
            kept = {**(json.loads(store.read_text()) if store.exists() else {}), part: kept[part]}
            store.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    if not small:
        (RESULTS / "trust.md").write_text(report(kept))
    sys.exit(failed)


if __name__ == "__main__":
    main()
