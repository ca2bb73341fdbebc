"""SimCLR's linear probe: how well a linear classifier does on a frozen encoder's features (paper App. F.4).

Features are computed once and standardised by the training part's. The classifier starts at zero, and its batches come
from a separate generator, so that a probe during a run does not change the run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from gm_probe.data.batches import Batches
from gm_probe.errors import DivergedError
from gm_probe.models.contrastive import Contrastive
from gm_probe.models.parameters import evaluating
from gm_probe.runtime import processes
from gm_probe.runtime.devices import upload

EPOCHS, BATCH = 20, 1024
"""The paper's values. It does not state AdamW's learning rate; ours comes near the optimum on standardised features."""
LR = 0.02


def features(model: Contrastive, batches: Batches) -> Tensor:
    """Return (N, D) features of the encoder, in eval mode and without the projector; the mode is restored.

    Each process computes its share, and all return the whole.

    Raises:
        DivergedError: some are not finite.
    """
    part = batches.shard(processes.rank(), processes.count())
    with evaluating(model), torch.no_grad():
        found = processes.gather_examples(torch.cat([model.features(batch.x).float() for batch in part]))
    if not bool(torch.isfinite(found).all()):
        raise DivergedError(f"the encoder's features of {batches.examples.source} are not finite")
    return found


def fit(x: Tensor, y: Tensor, classes: int, seed: int) -> nn.Linear:
    """Return the classifier after ``EPOCHS`` of AdamW on standardised features x (N, D) and labels y (N,)."""
    generator = torch.Generator().manual_seed(seed)
    classifier = skip_init(nn.Linear, x.shape[1], classes, device=x.device)  # draws nothing
    assert isinstance(classifier, nn.Linear)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR)
    for _ in range(EPOCHS):
        for chosen in upload(torch.randperm(len(x), generator=generator), x.device).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(classifier(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return classifier


def linear_probe(
    model: Contrastive, train: Batches, test: Batches, *, classes: int, seed: int
) -> dict[str, float]:
    """Return mean cross-entropy and error of the classifier on the part that it was fitted to, and on the test part."""
    x = features(model, train)
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)  # a constant feature becomes 0
    parts = {"train": (train, x), "test": (test, features(model, test))}
    assert train.examples.y is not None
    classifier = fit((x - mean) / spread, train.examples.y.to(x.device), classes, seed)
    results = {}
    for name, (batches, found) in parts.items():
        y = batches.examples.y
        assert y is not None
        with torch.no_grad():
            logits = classifier((found - mean) / spread)
        y = y.to(logits.device)
        results[f"probe_{name}_ce"] = float(functional.cross_entropy(logits, y))
        results[f"probe_{name}_error"] = float((logits.argmax(1) != y).double().mean())
    return results
