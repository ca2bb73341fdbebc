"""Whether `gmprobe estimate` orders the quickstart's 48 networks by their accuracy, beside S_ρ and the curvature.

    gmprobe quickstart --out RUNS && python benchmarks/estimate_ranking.py RUNS

The runs' own test digits, which no run was trained on, are cut into a validation and a target set. The target is taken
as it is and under shifts that the calibration does not use. Printed is Kendall's τ with the order of true accuracies.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from held_out_shifts import held_out_shifts
from scipy.stats import kendalltau

import gm_probe
from gm_probe.accuracy.shifts import shifted
from gm_probe.models.loading import load_model

CURVATURE = ("local_inconsistency", "fisher_trace", "fisher_lambda_max")
GREY = ("impulse", "cutout", "elastic")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    folders = sorted(path.parent for path in runs.glob("*/checkpoint.safetensors"))
    pool = gm_probe.open_source("digits", labeled=True).pool
    test = torch.tensor(json.loads((folders[0] / "split.json").read_text())["test"])
    test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]
    validation, target = pool.select(test[:300]), pool.select(test[300:])
    models, sizes = {}, []
    for folder in folders:
        checkpoint = gm_probe.read_checkpoint(folder)
        models[folder.name] = load_model(checkpoint)
        sizes.append(json.loads((folder / "split.json").read_text())["train"])
    counts = np.array([len(one) for one in sizes])
    normalizations = {folder.name: gm_probe.read_checkpoint(folder).normalization for folder in folders}
    assert len(set(normalizations.values())) == len(set(counts))  # one a training size
    names = ["estimate", "average_confidence", "agreement", "cot", *CURVATURE]
    print("| target | models | accuracy | error | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 4))
    settings = gm_probe.Settings(rho=0.3, noise_scale=0.3)
    wanted = [one for one in held_out_shifts() if one.family in GREY and one.strength == 2]
    for shift in (None, *wanted):
        examples = target
        if shift is not None:
            examples = replace(target, x=shifted(target.x, shift, 0, torch.device("cpu")))
        for count in np.unique(counts):
            own = {name: model for (name, model), n in zip(models.items(), counts, strict=True) if n == count}
            normalization = normalizations[next(iter(own))]
            unlabeled = gm_probe.Batches(examples.unlabeled(), normalization)
            report = gm_probe.estimate(
                own,
                unlabeled,
                validation=gm_probe.Batches(validation, normalization),
                measures=CURVATURE,
                settings=settings,
            )
            x = torch.cat([batch.x for batch in unlabeled])
            truth, found = [], []
            for row in report.models:
                with torch.no_grad():
                    truth.append(float((own[row.name](x).argmax(1) == examples.y).double().mean()))
                scores = [row.accuracy.value, row.estimators["average_confidence"]["score"]]
                scores += [row.agreement, row.estimators["cot"]["score"]]
                found.append(scores + [-row.measures[name]["value"] for name in CURVATURE])
            columns = np.array(found).T
            taus = [kendalltau(column, truth).statistic for column in columns]
            name = "as it is" if shift is None else f"{shift.family} {shift.strength}"
            error = 100 * np.abs(columns[0] - truth).mean()
            head = f"| {name} | {len(own)} of {count} images | {np.mean(truth):.2f} | {error:.1f} |"
            print(head, " | ".join(f"{tau:+.2f}" for tau in taus), "|", flush=True)


if __name__ == "__main__":
    main()
