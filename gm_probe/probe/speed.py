"""What runs a model fast within a memory budget: found by trying on a few of its examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.core.batches import BATCH_SIZE, Batches
from gm_probe.core.devices import synchronize
from gm_probe.core.door import Outputs
from gm_probe.core.errors import of_machine, on_two_devices, out_of_memory
from gm_probe.core.fields import Inputs
from gm_probe.core.parameters import Parameters, as_measured, differentiable_attention, evaluating
from gm_probe.probe.ascent import kl_gradient

T = TypeVar("T")
MEMORY = 4 * 10**9
"""Bytes that a product may take, by default."""
TAPES = 7  # times what a gradient pass keeps: forward over reverse took 3.4 to 5.6, nested jvps up to 6.5
CLEARLY = 0.9  # of the usual way's time: what is nearer is noise
LONG = 0.03  # seconds; shorter ways tell little apart, and there is little to gain
TRIAL = 16
"""Examples that ways are tried on."""


def clearly_faster(other: Callable[[], object], usual: Callable[[], object], device: torch.device) -> bool:
    """Whether ``other`` takes clearly less time than ``usual``; each runs twice, the first time to warm up."""
    usual()
    before, _ = timed(usual, device)
    if before < LONG:
        return False
    other()
    return clearly_less(timed(other, device)[0], before)


def clearly_less(other: float, usual: float) -> bool:
    """Whether ``other`` seconds are so much less than ``usual`` ones that it is no noise, and of any use."""
    return usual >= LONG and other < CLEARLY * usual


def timed(way: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """The seconds that ``way`` takes, and what it returns."""
    if device.type == "cpu":  # the processor's own time: others on this machine must not decide
        start = time.process_time()
        result = way()
        return time.process_time() - start, result
    synchronize(device)
    start = time.perf_counter()
    result = way()
    synchronize(device)
    return time.perf_counter() - start, result


def fastest_layout(model: nn.Module, x: Tensor, outputs: Outputs | None = None) -> torch.memory_format:
    """The memory format of weights and images (B, C, H, W) in which a gradient pass is fastest; sets the model's.

    Channels last where there is no clear difference: it saves 7 to 18 % on CIFAR-sized networks, and costs 20 % on
    ResNet-18 at 64×64 (both on a CPU). The weights' values stay as they are.
    """
    layouts = {True: torch.channels_last, False: torch.contiguous_format}
    parameters = Parameters(model, outputs=outputs)
    inputs = {last: x.contiguous(memory_format=layout) for last, layout in layouts.items()}

    def gradient(last: bool) -> None:
        model.to(memory_format=layouts[last])
        kl_gradient(parameters, inputs[last], clean, still)

    with as_measured(model):
        with torch.no_grad():
            clean = parameters.logits(x)
        still = torch.zeros(parameters.size, dtype=parameters.dtype, device=parameters.device)
        try:
            last = not clearly_faster(lambda: gradient(False), lambda: gradient(True), x.device)
        except Exception as error:  # of a stranger's layer; what needs the gradient will tell
            if of_machine(error):
                raise
            last = True
    model.to(memory_format=layouts[last])
    return layouts[last]


def bytes_an_example(model: nn.Module, x: Inputs, outputs: Outputs | None = None) -> float:
    """Bytes that a gradient pass keeps for its backward pass, by example; ``x`` (B, ...) is a few of them."""
    parameters = Parameters(model, outputs=outputs)
    values = {
        name: p.detach().clone().requires_grad_(p.requires_grad)
        for name, p in parameters.model.named_parameters()
    }
    weights = frozenset(value.untyped_storage().data_ptr() for value in values.values())
    with evaluating(model), torch.enable_grad(), differentiable_attention():
        with saved_bytes(weights) as saved:
            loss = functional.log_softmax(parameters.logits(x, values), dim=-1).sum()
        del loss  # until here the graph holds what was saved, so that no address is used twice
    return sum(saved.values()) / len(x)


@contextmanager
def saved_bytes(ignored: frozenset[int] = frozenset()) -> Iterator[dict[int, int]]:
    """Fills a dict of address ↦ bytes with what autograd saves meanwhile, but for storages at ``ignored`` addresses.

    Each storage counts once, as long as its graph lives: an address that is used anew would count as the old one.
    """
    found: dict[int, int] = {}

    def save(value: Tensor) -> Tensor:
        if value.layout != torch.strided:  # a functional embedding's sparse gradient, which has no storage
            return value
        try:
            storage = value.untyped_storage()
            address = storage.data_ptr()
        except RuntimeError:  # torch.func, within forward, saves wrappers around tensors
            return value
        if address not in ignored:  # a view may be less than its storage, an expanded one more
            found[address] = max(found.get(address, 0), min(value.nbytes, storage.nbytes()))
        return value

    with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
        yield found


def within(memory: float, model: nn.Module, batches: Batches, outputs: Outputs | None = None) -> Batches:
    """``batches`` of the size, up to ``BATCH_SIZE``, whose products take about ``memory`` bytes; 1 at least.

    As they are where a model has no gradients, which whatever needs them will tell.
    """
    few = next(iter(batches.of_size(4))).x
    try:
        taken = TAPES * bytes_an_example(model, few, outputs)
    except Exception as error:  # of a stranger's layer
        if on_two_devices(error):
            raise
        return batches.of_size(1) if out_of_memory(error) else batches
    return batches.of_size(int(max(1, min(BATCH_SIZE, memory // taken))) if taken else BATCH_SIZE)
