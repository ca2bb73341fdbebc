"""gm_probe's curvature figures and converged S_ρ against PyHessian, hessian-eigenthings, curvlinops and Algorithm 1.

    python -m venv peers && peers/bin/pip install torch torchvision pyhessian==0.1 curvlinops-for-pytorch==3.0.1
    peers/bin/pip install --pre hessian-eigenthings==1.0.0a5 && peers/bin/pip install -e .
    peers/bin/python benchmarks/measure_peers.py --data CIFAR10/test --cnn6 RUN --wrn RUN --checkpoints FOLDER
    peers/bin/python benchmarks/measure_peers.py --table > table.md

Every cell runs in a fresh process and is appended to the results file; the next run leaves out what is there. Cells
of ``ours`` are taken again when gm_probe's code has changed, cells cut short by ``--max-seconds`` when it is raised.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from peers.plan import METHOD_NAMES, MODELS, TASKS, TOOLS, Cell, Setting, cells
from peers.table import render

PACKAGES = ("torch", "numpy", "scipy", "PyHessian", "hessian-eigenthings", "curvlinops-for-pytorch")
CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def read_lines(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    lines = []
    for line in results.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut off by a kill: that cell is taken again
            continue
    return lines


def append(results: Path, line: dict[str, Any]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line) + "\n"
    if results.exists() and not results.read_bytes().endswith(b"\n") and results.stat().st_size:
        text = "\n" + text  # after a line that a kill cut off
    with results.open("a") as file:
        file.write(text)


def package() -> Path:
    """Where the children will import gm_probe from."""
    spec = importlib.util.find_spec("gm_probe")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


ROOMS = ("runtime", "data", "models", "linalg", "inconsistency", "curvature", "measures")


def code_version() -> str:
    """Of the code that ``ours`` runs, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (package() / room).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def environment(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=package(), capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "gm_probe": commit.stdout.strip() or f"code {code_version()}",
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
    }


def run(request: dict[str, Any], threads: int, timeout: float | None) -> dict[str, Any]:
    """The result of a request in a fresh process; a failure is a result as well."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--cell", json.dumps(request)],
            env={**os.environ, **dict.fromkeys(names, str(threads))},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "note": f"killed after {timeout:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"status": "failed", "note": errors[-1][:300]}
    return json.loads(lines[-1])


def is_done(line: dict[str, Any], max_seconds: float, code: str) -> bool:
    if line["cell"][1] == "ours" and line.get("code") != code:
        return False
    cut_short = line["status"] in ("projected", "not reached") and line["max_seconds"] < max_seconds
    return line["status"] != "failed" and not cut_short


def _split(choices: tuple[str, ...]) -> Any:
    def parse(context: click.Context, option: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise click.BadParameter(f"{', '.join(unknown)}; there are {', '.join(choices)}")
        return tuple(name for name in choices if name in names)

    return parse


def listing(name: str, choices: tuple[str, ...]) -> Any:
    return click.option(
        f"--{name}",
        default=",".join(choices),
        callback=_split(choices),
        show_default=True,
        help="comma-separated",
    )


@click.command()
@listing("models", MODELS)
@listing("tasks", TASKS)
@listing("tools", TOOLS)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(METHOD_NAMES),
    metavar="NAME",
    help="only this; repeatable",
)
@click.option("--examples", default=1000, show_default=True, help="images, a seeded subset")
@click.option("--batch-size", default=250, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--max-seconds", default=300.0, show_default=True, help="a peer's run beyond it is projected")
@click.option("--data", default="/work/data/cifar10/test", show_default=True, help="folder of class folders")
@click.option("--cnn6", default="/work/runs/cifar10-6cnn/s0-bs128-wd0-lr0.005-840fac71", show_default=True)
@click.option("--wrn", default="/work/runs/wrn/wrn-28-2", show_default=True, help="a WRN-28-2's run folder")
@click.option(
    "--checkpoints", default="/work/shared/data/checkpoints", show_default=True, help="of the ResNets"
)
@click.option("--results", default="runs/peers.jsonl", show_default=True, type=click.Path(path_type=Path))
@click.option("--table", is_flag=True, help="print the results file as Markdown and do nothing else")
@click.option("--cell", hidden=True)
def main(
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    tools: tuple[str, ...],
    methods: tuple[str, ...],
    examples: int,
    batch_size: int,
    threads: int,
    seed: int,
    max_seconds: float,
    data: str,
    cnn6: str,
    wrn: str,
    checkpoints: str,
    results: Path,
    table: bool,
    cell: str | None,
) -> None:
    """Measure gm_probe and its peers on the same checkpoints, images and threads."""
    if cell is not None:
        # torch only in here: a child starts with its parent's peak memory as its own
        from peers.cell import run_cell

        run_cell(cell)
        return
    if table:
        click.echo(render(read_lines(results)))
        return
    if examples > batch_size and examples % batch_size:
        raise click.UsageError(
            "--examples must be a multiple of --batch-size: hessian-eigenthings averages batches"
        )
    setting = Setting(examples, min(batch_size, examples), threads, seed)
    paths = {name: str(Path(checkpoints) / file) for name, file in CHECKPOINTS.items()}
    paths |= {"6cnn": cnn6, "wrn-28-2": wrn}
    base = {
        "setting": setting,
        "data": data,
        "cache": str(results.with_suffix(f".images-{examples}-{seed}.pt")),
    }
    here, code = environment(threads), code_version()
    lines = read_lines(results)
    if not any(line["kind"] == "environment" and line["environment"] == here for line in lines):
        append(results, {"kind": "environment", "environment": here, "date": now()})
    for model in models:
        asked = {**base, "model": model, "checkpoint": paths[model]}
        truth = _reference(asked, results, lines)
        if truth is None:
            continue
        wanted = tuple(one for one in cells((model,), tools, tasks) if not methods or one.method in methods)
        for one in pending(lines, asked, wanted, max_seconds, code):
            click.echo(f"{now()} {' · '.join(one)}", err=True, nl=False)
            load = os.getloadavg()[0]
            request = {**asked, "cell": one, "truth": truth, "max_seconds": max_seconds}
            result = run(request, threads, None if one.tool == "ours" else 600 + 12 * max_seconds)
            record = {
                "kind": "cell",
                **asked,
                "cell": one,
                **result,
                "max_seconds": max_seconds,
                "code": code,
            }
            append(results, record | {"date": now(), "load_before": load})
            click.echo(
                f": {result['status']} {result.get('seconds') or ''} {result.get('note', '')}", err=True
            )


def _reference(asked: dict[str, Any], results: Path, lines: list[dict[str, Any]]) -> dict[str, float] | None:
    for line in lines:
        if line["kind"] == "reference" and _same(line, asked):
            return line["truth"]
    click.echo(f"{now()} {asked['model']}: float64 reference", err=True)
    found = run({**asked, "cell": None}, asked["setting"].threads, None)
    if "truth" not in found:
        click.echo(f"no reference for {asked['model']}: {found['note']}", err=True)
        return None
    append(results, {"kind": "reference", **asked, **found, "date": now()})
    return found["truth"]


def _same(line: dict[str, Any], asked: dict[str, Any]) -> bool:
    return all(
        line[key] == (list(asked[key]) if key == "setting" else asked[key])
        for key in ("model", "checkpoint", "setting", "data")
    )


def pending(
    lines: list[dict[str, Any]],
    asked: dict[str, Any],
    wanted: tuple[Cell, ...],
    max_seconds: float,
    code: str,
) -> Iterator[Cell]:
    latest = {tuple(line["cell"]): line for line in lines if line["kind"] == "cell" and _same(line, asked)}
    for cell in wanted:
        if cell not in latest or not is_done(latest[cell], max_seconds, code):
            yield cell


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    main()
