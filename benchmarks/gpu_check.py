"""Check gm_probe on a GPU within eight minutes: does it give the CPU's numbers there, and how fast is it?

    python benchmarks/gpu_check.py --device cpu --only reference   # beforehand, on any machine; else it is done here
    python benchmarks/gpu_check.py                                 # again to go on, where time ran out

It writes gpu-check.json after every cell, and gpu-check.md at the end. What is in the JSON is not done again; remove it
to begin anew. PyHessian, curvlinops and hessian-eigenthings are timed where they are installed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from gpu import agreement, memory, products, throughput
from gpu.page import page
from gpu.plan import SIZES, Size

from gm_probe.errors import first_line
from gm_probe.files.atomic import write_json
from gm_probe.runtime.devices import pick_device
from gm_probe.runtime.machine import environment

REFERENCE = "reference"
PARTS = {
    "values": agreement.values,
    "rules": agreement.rules,
    "memory": memory.memory,
    "products": products.products,
    "throughput": throughput.throughput,
}
FATAL = "CUDA error"
"""What a GPU says that can do no more for this process."""


def carried_out(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a cell gives; a failure is a result as well."""
    began = time.perf_counter()
    try:
        result = run()
    except Exception as error:  # noqa: BLE001  the next cell may do better
        result = {"rows": [{"failed": f"{type(error).__name__}: {first_line(error)}"}]}
    return {**result, "took": round(time.perf_counter() - began, 2)}


def cells(
    size: Size, device: torch.device, only: tuple[str, ...], done: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]], dict[str, Any]]]:
    """Name, work and place in ``done`` of every cell that is asked for; the reference comes before what needs it."""
    references = done.setdefault(REFERENCE, {})
    if {REFERENCE, "values"} & set(only):
        for name, run in agreement.reference(size):
            yield name, run, references
    for part in PARTS:
        place = done.setdefault(device.type, {}).setdefault(part, {}) if part in only else {}
        for name, run in PARTS[part](size, device, references) if part in only else ():
            yield name, run, place


@click.command()
@click.option("--device", default="auto", show_default=True)
@click.option("--size", type=click.Choice(list(SIZES)), default="full", show_default=True)
@click.option("--only", multiple=True, type=click.Choice([REFERENCE, *PARTS]), help="This part; repeatable.")
@click.option("--seconds", default=440.0, show_default=True, help="No cell begins after so many.")
@click.option("--out", default=Path(), type=click.Path(path_type=Path), help="Folder.  [default: here]")
def main(device: str, size: str, only: tuple[str, ...], seconds: float, out: Path) -> None:
    end = time.perf_counter() + seconds
    place, file = pick_device(device), out / "gpu-check.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"size": size}
    if record["size"] != size:
        raise click.UsageError(f"{file} is of size {record['size']}; remove it, or give that size")
    record.setdefault("environment", {})[place.type] = environment(place)
    left: list[str] = []
    for name, run, done in cells(SIZES[size], place, only or tuple(PARTS), record.setdefault("cells", {})):
        if name in done:
            continue
        if left or time.perf_counter() > end:
            left.append(name)
            continue
        result = carried_out(run)
        click.echo(f"{name}: {result['took']} s", err=True)
        if FATAL in str(result["rows"]):
            left.append(name)
            continue
        done[name] = result
        write_json(file, record)
    (out / "gpu-check.md").write_text(page(record, place.type, left), encoding="utf-8")
    if left:
        sys.exit(f"{len(left)} cells are left, {left[0]} first. Run the same command again")


if __name__ == "__main__":
    main()
