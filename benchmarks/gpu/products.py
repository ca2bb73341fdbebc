"""Seconds of a gradient and of each product and measure, and kernels a second, beside the peers' products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from kernel_counts import counted
from torch import Tensor, nn
from torch.nn import functional

from gm_probe import Batches, Parameters, measure
from gm_probe.curvature.operators import fisher, hessian
from gm_probe.errors import first_line
from gm_probe.inconsistency.ascent import Divergence
from gm_probe.linalg.work import Work
from gm_probe.models.parameters import as_measured
from gm_probe.runtime.devices import synchronize
from gpu.agreement import images, network
from gpu.plan import Cells, Size

Runs = Iterator[tuple[str, Callable[[], Any]]]


def products(size: Size, device: torch.device, references: Mapping[str, Any]) -> Cells:
    for name, (pixels, count) in size.timed.items():
        yield f"{name}, {count} × {pixels}²", partial(_timed, name, pixels, count, device, size.rounds)


def seconds_of(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds of ``rounds`` runs, each until the device has done its work."""
    taken = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _timed(name: str, pixels: int, count: int, device: torch.device, rounds: int) -> dict[str, Any]:
    model = network(name, pixels).eval().to(device)
    x, y = (tensor.to(device) for tensor in images(count, pixels))
    rows: list[dict[str, Any]] = []
    with as_measured(model):
        for what, run in _ours(model, x, y):
            kernels = counted(run).kernels  # which warms up, too
            seconds = seconds_of(run, device, rounds)
            rows.append({"of": what, "ms": 1000 * seconds, "kernels a second": kernels / seconds})
    for what in ("fisher_trace", "local_inconsistency"):
        run = partial(measure, model, Batches.from_tensors(x, y, batch_size=count), [what])
        rows.append({"of": what, "ms": 1000 * seconds_of(run, device, 1)})
    for tool in (_pyhessian, _curvlinops, _eigenthings):
        peer = tool.__name__.strip("_")
        with as_measured(model):
            rows += (
                {"of": f"{peer}: {what}"} | row for what, row in _of_peer(tool(model, x, y), device, rounds)
            )
    return {
        "rows": [row | {"in gradients": row["ms"] / rows[0]["ms"]} if "ms" in row else row for row in rows]
    }


def _of_peer(runs: Runs, device: torch.device, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Its products, up to where it fails: its own trouble is a row as well."""
    what = "all"
    try:
        for what, run in runs:
            run()  # which compiles, too
            yield what, {"ms": 1000 * seconds_of(run, device, rounds)}
    except ImportError:
        yield what, {"failed": "not installed"}
    except Exception as error:  # noqa: BLE001
        yield what, {"failed": first_line(error)[:100]}


def _ours(model: nn.Module, x: Tensor, y: Tensor) -> Runs:
    parameters, work = Parameters(model), Work(len(x))
    batches = Batches.from_tensors(x, batch_size=len(x)).on(x.device)
    with torch.no_grad():
        logits = torch.cat([parameters.logits(batch.x) for batch in batches])
    v = parameters.random(1.0, torch.Generator().manual_seed(0))
    f, h = fisher(parameters, batches, logits, work), hessian(parameters, batches, y, work)
    weights = list(model.parameters())
    yield "gradient", lambda: torch.autograd.grad(functional.cross_entropy(model(x), y), weights)
    yield "KL gradient", partial(Divergence(parameters, batches, logits, work).value_and_gradient, 0.1 * v)
    yield "F v", partial(f.matvec, v)
    yield "H v", partial(h.matvec, v)


def _pyhessian(model: nn.Module, x: Tensor, y: Tensor) -> Runs:
    from pyhessian import hessian as peer
    from pyhessian.utils import hessian_vector_product

    built = peer(model, nn.CrossEntropyLoss(), data=(x, y), cuda=x.is_cuda)
    v = [torch.randn_like(p) for p in built.params]
    yield "H v", lambda: hessian_vector_product(built.gradsH, built.params, v)
    model.zero_grad()  # it leaves a graph in the gradients


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Runs:
    import curvlinops

    weights = list(model.parameters())
    v = torch.randn(sum(p.numel() for p in weights), device=x.device)
    kinds = {"H v": curvlinops.HessianLinearOperator, "F v": curvlinops.GGNLinearOperator}
    built = {
        what: kind(model, nn.CrossEntropyLoss(), weights, [(x, y)], check_deterministic=False)
        for what, kind in kinds.items()
    }
    for what, operator in built.items():
        yield what, partial(operator.__matmul__, v)
    for what, operator in built.items():
        yield f"{what}, compiled", torch.compile(partial(operator.__matmul__, v))


def _eigenthings(model: nn.Module, x: Tensor, y: Tensor) -> Runs:
    import hessian_eigenthings as he

    entropy = functional.cross_entropy
    h = he.HessianOperator(model, [(x, y)], he.supervised_loss(entropy))
    f = he.GGNOperator(model, [(x, y)], he.supervised_forward, he.supervised_loss_of_output(entropy))
    v = torch.randn(sum(p.numel() for p in model.parameters()), device=x.device)
    yield "H v", partial(h.matvec, v)
    yield "F v", partial(f.matvec, v)
