"""What bf16 autocast does to one step of Algorithm 1: the same noise, ascended under autocast and in float32.

    python benchmarks/bf16_ascent.py RUN --data CIFAR10/test

RUN is a run folder of `gmprobe train`. For the trained network and for a fresh one, in train mode as IAM sees them, on
one batch: cosine of the two KL gradients, and the KL that the two δ of length 0.1 reach (judged in float32).
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch.nn import functional

from gm_probe import ModelSpec, Parameters, kl_divergence, open_source, read_checkpoint
from gm_probe.data.images import decoded_ahead
from gm_probe.inconsistency.ascent import kl_gradient, to_sphere
from gm_probe.models.loading import choose_normalization, load_model
from gm_probe.models.zoo import initial_model

SCALES = (0.01, 0.1, 0.5, 1.0, 3.0, 10.0)
RHO = 0.1


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--seeds", default=5, show_default=True, help="Noise starts; medians are printed.")
def main(run: Path, data: str, batch_size: int, seeds: int) -> None:
    checkpoint = read_checkpoint(run)
    assert checkpoint.model is not None
    pool = open_source(data, labeled=False).pool
    chosen = torch.randperm(len(pool.x), generator=torch.Generator().manual_seed(0))[:batch_size]
    x = choose_normalization(checkpoint, pool, None).apply(next(iter(decoded_ahead(pool.x, [chosen]))))
    x = x.contiguous(memory_format=torch.channels_last)
    print(
        "| network | noise length | cosine of the gradients | KL reached, bf16 : float32 |\n|---|---|---|---|"
    )
    for state, model in (("trained", load_model(checkpoint)), ("fresh", fresh(checkpoint.model))):
        for scale in SCALES:
            pairs = torch.tensor([compare(model.train(), x, scale, seed) for seed in range(seeds)])
            cosine, reached = pairs.median(0).values.tolist()
            low, high = pairs[:, 1].min(), pairs[:, 1].max()
            cells = f"{scale:g} | {cosine:.3f} | {reached:.2f} ({low:.2f} to {high:.2f})"
            print(f"| {checkpoint.model.name}, {state} | {cells} |")


def fresh(spec: ModelSpec) -> torch.nn.Module:
    return initial_model(spec, 0).to(memory_format=torch.channels_last)


def compare(model: torch.nn.Module, x: torch.Tensor, scale: float, seed: int) -> tuple[float, float]:
    """Cosine of the bf16 and the float32 gradient from one start, and the ratio of the KL that they reach."""
    parameters = Parameters(model)
    start = parameters.random(scale, torch.Generator().manual_seed(seed))
    gradients = []
    for half in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
            logits = parameters.logits(x)
            gradients.append(kl_gradient(parameters, x, logits, start)[1].float())
    reached = []
    with torch.no_grad():
        for gradient in gradients:
            moved = parameters.logits(x, parameters.moved(to_sphere(gradient, RHO)))
            reached.append(float(kl_divergence(logits, moved).mean()))
    return float(functional.cosine_similarity(*gradients, dim=0)), reached[0] / reached[1]


if __name__ == "__main__":
    main()
