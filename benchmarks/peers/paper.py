"""The paper's Algorithm 1 as anybody would write it: K steps from each of several random starts, all with autograd."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from peers.subject import Subject

STARTS, STEPS, NOISE = 10, 15, 0.1


def _divergence(
    subject: Subject, clean: list[Tensor], delta: list[Tensor], gradient: bool
) -> tuple[float, list[Tensor]]:
    """Mean KL(f_θ ‖ f_{θ+δ}) and its gradient with respect to δ."""
    names = [name for name, _ in subject.model.named_parameters()]
    total, slopes = 0.0, [torch.zeros_like(d) for d in delta]
    with torch.set_grad_enabled(gradient):
        for (x, _), log_p in zip(subject.batches, clean, strict=True):
            leaves = [d.clone().requires_grad_(gradient) for d in delta]
            moved = [p.detach() + d for p, d in zip(subject.parameters, leaves, strict=True)]
            logits = functional_call(subject.model, dict(zip(names, moved, strict=True)), (x,))
            log_q = functional.log_softmax(logits, dim=1)
            kl = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
            total += float(kl)
            if gradient:
                for slope, g in zip(slopes, torch.autograd.grad(kl, leaves), strict=True):
                    slope += g
    return total / subject.num_examples, slopes


def run_paper(subject: Subject, rho: float, limit: float, seed: int) -> dict[str, Any]:
    """As many of the 10 starts as fit into ``limit`` seconds (2 at least); the time is projected to 10."""
    subject = subject.laid_out(torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    size = sum(p.numel() for p in subject.parameters)
    begin = time.perf_counter()
    with torch.no_grad():
        clean = [functional.log_softmax(subject.model(x), dim=1) for x, _ in subject.batches]
    ends, highest = [], -math.inf
    for start in range(STARTS):
        if start >= 2 and time.perf_counter() - begin > limit:
            break
        delta = [
            torch.randn(p.shape, generator=generator) * (NOISE / math.sqrt(size)) for p in subject.parameters
        ]
        for _ in range(STEPS):
            value, slopes = _divergence(subject, clean, delta, gradient=True)
            highest = max(highest, value)
            norm = math.sqrt(sum(float(g.square().sum()) for g in slopes))
            delta = [g * (rho / norm) for g in slopes]
        ends.append(_divergence(subject, clean, delta, gradient=False)[0])
    seconds = time.perf_counter() - begin
    return {
        "status": "ran" if len(ends) == STARTS else "projected",
        "seconds": seconds * STARTS / len(ends),
        "evaluations": STARTS * STEPS,  # the 10 last values' forward passes left out, in its favour
        "figures": {"S": {"value": max(ends)}},
        "ends": ends,
        "highest_on_the_way": max(highest, *ends),
        "note": f"mean {sum(ends) / len(ends):.4g}"
        + ("" if len(ends) == STARTS else f"; {len(ends)} starts ran"),
    }
