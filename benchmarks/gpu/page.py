"""The results of gpu_check.py as one page of Markdown: a table for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def page(record: Mapping[str, Any], place: str, left: Sequence[str]) -> str:
    """Show every cell of the device ``place``, those that failed among them."""
    here, parts = record["environment"][place], record["cells"].get(place, {})
    used = f"on {here['device_name']}" if place == "cuda" else f"on the device {place}: no GPU was used"
    lines = [
        f"# gm_probe {used}",
        f"`python benchmarks/gpu_check.py --size {record['size']} --device {place}`, gm_probe {here['gm_probe']}, "
        f"torch {here['torch']}, Python {here['python']}.",
    ]
    for part, cells in parts.items():
        rows = [{"what": name, **row} for name, cell in cells.items() for row in cell["rows"]]
        took = sum(cell["took"] for cell in cells.values())
        lines += [f"## {part[0].upper()}{part[1:]} ({took:.0f} s)", table(rows)]
    if left:
        lines += ["## Not done", "\n".join(f"- {name}" for name in left)]
    return "\n\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column for every key that a row has."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [header, ["---"] * len(header), *([shown(row.get(key, "")) for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
