"""Models of one's own for the command line's ``path/file.py:callable``."""

from typing import Any

import torch
from torch import Tensor, nn


def dropout_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))


class BagOfWords(nn.Module):
    """Of token ids (n, words)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1).tanh())


class Recomputes(torch.autograd.Function):
    """Runs a part of the network in its backward pass, as hand-written checkpointing does."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.block, ctx.inputs = block, (x, *weights)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        x, *weights = ctx.inputs
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.block(x)
        return None, *torch.autograd.grad(output, (x, *weights), slopes, allow_unused=True)
