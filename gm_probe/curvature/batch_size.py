"""How many examples a batch may have within a memory budget, found by a pass over a few of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.data.batches import BATCH_SIZE, Batches
from gm_probe.data.fields import Inputs
from gm_probe.errors import on_two_devices, out_of_memory
from gm_probe.models.door import Outputs
from gm_probe.models.parameters import Parameters, differentiable_attention, evaluating
from gm_probe.runtime.devices import budget

PRODUCT = 7
"""Memory of a product, relative to what a gradient pass keeps: 3.4 to 5.6 by forward over reverse, nested jvps 6.5."""


def bytes_an_example(model: nn.Module, x: Inputs, outputs: Outputs | None = None) -> float:
    """Return the bytes per example that a gradient pass keeps for its backward pass, from a few examples ``x``."""
    parameters = Parameters(model, outputs=outputs)
    values = {
        name: p.detach().clone().requires_grad_(p.requires_grad)
        for name, p in parameters.model.named_parameters()
    }
    weights = {value.untyped_storage().data_ptr() for value in values.values()}
    saved: dict[int, int] = {}  # bytes by address

    def save(value: Tensor) -> Tensor:
        if value.layout != torch.strided:  # a functional embedding's sparse gradient, which has no storage
            return value
        try:
            storage = value.untyped_storage()
            address = storage.data_ptr()
        except RuntimeError:  # torch.func in a forward pass saves wrappers around tensors
            return value
        if address not in weights:  # a view may be smaller than its storage, and an expanded one larger
            saved[address] = max(saved.get(address, 0), min(value.nbytes, storage.nbytes()))
        return value

    with evaluating(model), torch.enable_grad(), differentiable_attention():
        with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
            loss = functional.log_softmax(parameters.logits(x, values), dim=-1).sum()
        del loss  # until here the graph keeps what was saved, so that no address is used twice
    return sum(saved.values()) / len(x)


def batches_within(
    memory: float | None, model: nn.Module, batches: Batches, outputs: Outputs | None = None
) -> Batches:
    """Return ``batches`` of the size whose products take about ``memory`` bytes (None = ``devices.budget``).

    The size is at least 1 and, on a CPU, at most ``BATCH_SIZE``. Batches stay as they are where the model has no
    gradients; the code that needs them will say so.
    """
    few = next(iter(batches.of_size(4))).x
    try:
        taken = PRODUCT * bytes_an_example(model, few, outputs)
    except Exception as error:  # layers may raise anything
        if on_two_devices(error):
            raise
        return batches.of_size(1) if out_of_memory(error) else batches
    most = BATCH_SIZE if batches.device.type == "cpu" else max(BATCH_SIZE, batches.num_examples)
    memory = budget(batches.device) if memory is None else memory
    return batches.of_size(int(max(1, min(most, memory // taken))) if taken else most)
