"""A trained network and a seeded subset of CIFAR-10's JPEG test folder: what every cell measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.data.batches import Batches
from gm_probe.data.datasets import open_source
from gm_probe.data.examples import Examples
from gm_probe.data.normalization import Normalization
from gm_probe.models.checkpoints import read_checkpoint
from gm_probe.models.loading import load_model
from peers.plan import Setting

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NETWORKS = Path(__file__).parent.parent / "cifar_resnet.py"


def subset(data: str, setting: Setting, cache: Path) -> Examples:
    """The seeded subset, decoded once and kept in ``cache`` (.pt)."""
    if not cache.exists():
        examples = open_source(data, labeled=True).pool.subset(setting.examples, setting.seed)
        if len(examples) != setting.examples:
            raise SystemExit(f"{data} holds {len(examples)} images, not {setting.examples}")
        part = cache.with_suffix(".part")
        torch.save({"x": examples.x, "y": examples.y}, part)
        part.replace(cache)
    return open_source(str(cache), labeled=True).pool


def network(name: str, checkpoint: Path) -> tuple[nn.Module, Normalization]:
    """In eval mode, float32; ``name`` builds a foreign checkpoint's network (``cifar_resnet.py``)."""
    read = read_checkpoint(checkpoint)
    if read.normalization is not None:
        return load_model(read).eval(), read.normalization
    return load_model(read, f"{NETWORKS}:{name}", num_classes=10).eval(), IMAGENET


@dataclass(frozen=True)
class Subject:
    """A network over its images.

    Attributes:
        batches: (x, y) as the model takes them: normalised float32 or float64.
    """

    model: nn.Module
    examples: Examples
    normalization: Normalization
    batch_size: int
    batches: list[tuple[Tensor, Tensor]]

    @classmethod
    def load(
        cls, model: nn.Module, examples: Examples, normalization: Normalization, batch_size: int
    ) -> Subject:
        dtype = next(model.parameters()).dtype
        source = Batches(examples, normalization, batch_size=batch_size, dtype=dtype)
        batches = [(batch.x, batch.y) for batch in source if batch.y is not None]
        return cls(model, examples, normalization, batch_size, batches)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    def laid_out(self, layout: torch.memory_format) -> Subject:
        """The same with weights and images in another memory layout (the model is changed in place)."""
        self.model.to(memory_format=layout)
        batches = [(x.contiguous(memory_format=layout), y) for x, y in self.batches]
        return Subject(self.model, self.examples, self.normalization, self.batch_size, batches)

    def double(self) -> Subject:
        """The same in float64 (the model is changed in place)."""
        return self.load(self.model.double(), self.examples, self.normalization, self.batch_size)

    def first(self, count: int) -> Subject:
        """Its first ``count`` images, as one batch."""
        few = self.examples.select(torch.arange(min(count, self.num_examples)))
        return self.load(self.model, few, self.normalization, len(few))

    def gradient(self, batch: int = 0) -> None:
        """One ordinary gradient pass over a batch: the unit of cost."""
        x, y = self.batches[batch]
        torch.autograd.grad(functional.cross_entropy(self.model(x), y), self.parameters)
