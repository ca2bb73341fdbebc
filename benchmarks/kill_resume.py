"""Does a run that is killed at any moment and resumed end in the same bits as an undisturbed one?

    python benchmarks/kill_resume.py > benchmarks/results/kill-resume.md

For each rule one undisturbed `gmprobe train`, then others that are killed by SIGKILL after a random part of its time,
resumed, killed again with probability one half, and so on to the end, until ``--kills`` have struck. Compared: the
bytes of final and best weights, every row of the metrics and the summary, without what was timed. Runs are forked from
one process that has torch loaded, one thread each, so that a kill costs seconds; each goes through the command line's
own `main`.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

RULES = {
    "sgd": "--method sgd",
    "sam": "--method sam",
    "asam": "--method asam",
    "iam-d": "--method iam-d",
    "iam-d K=3": "--method iam-d --k-steps 3",
    "iam-d one pass": "--method iam-d-onepass",
    "iam-s": "--method iam-s",
    "sgd, dropout": "--method sgd --model DROPOUT --optimizer adamw --lr 0.01",
    "iam-s, BatchNorm": "--method iam-s --model wrn-10-1 --num-train 60",
    "simclr, iam-d one pass": "--objective simclr --method iam-d-onepass --probe-every 2",
    "iam-d one pass, fp16, average, clipping": "--method iam-d-onepass --amp fp16 --ema-decay 0.9 --clip-norm 1",
}
COMMON = (
    "--data digits --model mlp-32 --num-train 300 --num-unlabeled 60 --num-test 100 --epochs 6 --batch-size 20 "
    "--schedule cosine --track-every 3 --checkpoint-every 4 --device cpu --quiet"
)
SUPERVISED = "--augment --eval-every 2"
DROPOUT = """
from torch import nn
def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))
"""
DONE = "after its summary"
"""Kills here are not counted among those asked for: nothing is left to resume but a file to remove."""
TIMED = {"seconds", "examples_per_second", "train_seconds"}


def begin(arguments: list[str]) -> int:
    """`gmprobe train ARGUMENTS` in a fork of this process; its process id."""
    child = os.fork()
    if child:
        return child
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        from gm_probe.cli import main

        main(["train", *arguments])
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    os._exit(0)


def ended(child: int, within: float | None = None) -> bool:
    """Wait for ``child``; kill it after ``within`` seconds. Whether it came to its end."""
    began = time.perf_counter()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, f"exit code {os.waitstatus_to_exitcode(status)}"
            return True
        if within is not None and time.perf_counter() - began > within:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return not os.WIFSIGNALED(status)
        time.sleep(0.0005)


def outcome(run: Path) -> dict[str, Any]:
    """All that a run has come to."""

    def untimed(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key not in TIMED}

    best = run / "best.safetensors"
    return {
        "final": (run / "checkpoint.safetensors").read_bytes(),
        "best": best.read_bytes() if best.exists() else None,  # SimCLR has none
        "metrics": [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "summary": untimed(json.loads((run / "summary.json").read_text())),
        "files": sorted(file.name for file in run.iterdir()),
    }


def moment(run: Path) -> str:
    """In what a run was killed, by what it left."""
    if list(run.glob(".*.tmp")):
        return "inside a write"
    if not (run / "config.toml").exists():
        return "before it had begun"
    if (run / "summary.json").exists():
        return DONE
    if (run / "checkpoint.safetensors").exists():
        return "between final weights and summary"
    return "in training" if (run / "state.pt").exists() else "before the first state"


def check(rule: str, kills: int, folder: Path, chance: random.Random) -> dict[str, Any]:
    """Kill and resume runs of a rule until ``kills`` have struck before its end; what was seen."""
    (folder / "dropout.py").write_text(DROPOUT)
    options = RULES[rule].replace("DROPOUT", f"{folder / 'dropout.py'}:model")
    supervised = [] if "simclr" in options else SUPERVISED.split()
    arguments = [*COMMON.split(), *supervised, *options.split()]

    def start(run: Path) -> int:
        return begin([*arguments, "--out", str(run), "--resume"])

    began = time.perf_counter()
    assert ended(start(folder / "undisturbed"))
    seconds = time.perf_counter() - began
    expected = outcome(folder / "undisturbed")
    moments: Counter[str] = Counter()
    runs = equal = 0
    while sum(moments.values()) - moments[DONE] < kills:
        run = folder / f"{runs}"
        runs += 1
        within, began = chance.random() * seconds, time.perf_counter()
        killed = False
        while not ended(start(run), within):
            killed = True
            moments[moment(run)] += 1
            # the kills of one run end, for every second resumed run is left alone
            within = chance.random() * seconds if chance.random() < 0.5 else None
        if (
            not killed
        ):  # on a shared machine the first run may have taken many times as long as those after it
            seconds = min(seconds, time.perf_counter() - began)
        found = outcome(run)
        equal += found == expected
        for name in (name for name in expected if found[name] != expected[name]):
            print(f"{rule}, run {runs}: its {name} differs", file=sys.stderr)
        shutil.rmtree(run)
    return {
        "rule": rule,
        "seconds": round(seconds, 2),
        "runs": runs,
        "kills": sum(moments.values()) - moments[DONE],
        "equal": equal,
        "moments": dict(moments),
    }


@click.command()
@click.option(
    "--kills", type=int, default=25, show_default=True, help="At least so many a rule, before its summary."
)
@click.option("--rules", help="Some of the rules, separated by semicolons.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(kills: int, rules: str | None, seed: int, as_json: bool) -> None:
    import torch

    from gm_probe.cli import main as gmprobe

    torch.set_num_threads(1)
    warm = [*COMMON.split(), *["--epochs", "1", "--ema-decay", "0.5", "--amp", "fp16", "--out"]]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        gmprobe(["train", *warm, f"{folder}/run"])  # so that all is loaded before the forks
    chance, results = random.Random(seed), []
    for rule in rules.split(";") if rules else RULES:
        with tempfile.TemporaryDirectory() as folder:
            results.append(check(rule, kills, Path(folder), chance))
        print(results[-1], file=sys.stderr)
    if as_json:
        print(json.dumps(results))
    else:
        report(results, kills, seed)
    if any(result["equal"] != result["runs"] for result in results):
        sys.exit(1)


def report(results: list[dict[str, Any]], kills: int, seed: int) -> None:
    import platform

    import torch

    print("# Killed and resumed\n")
    print(
        f"`python benchmarks/kill_resume.py --kills {kills} --seed {seed}`, "
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread of {os.cpu_count()} cores.\n"
    )
    print(
        f"Every run: `gmprobe train {COMMON}`, all but SimCLR's with `{SUPERVISED}`, and what the file adds.\n"
    )
    print("| rule | undisturbed, s | runs | kills before the summary | bit-identical |")
    print("|---|---|---|---|---|")
    for r in results:
        print(f"| {r['rule']} | {r['seconds']} | {r['runs']} | {r['kills']} | {r['equal']} |")
    total: Counter[str] = Counter()
    for r in results:
        total.update(r["moments"])
    print("\nWhere the kills struck:", ", ".join(f"{k} {v}" for k, v in total.most_common()) + ".")


if __name__ == "__main__":
    main()
