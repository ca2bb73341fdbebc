"""Examples as NT-Xent is measured on: batches of the same size, of two seeded views of each image."""

from __future__ import annotations

import torch

from gm_probe.data.batches import Batches, Normalization
from gm_probe.data.datasets import Examples
from gm_probe.data.images import taken
from gm_probe.errors import DataError
from gm_probe.models.contrastive import partners
from gm_probe.training.views import draw_views, require_images, see


def contrastive_batches(
    examples: Examples,
    normalization: Normalization,
    *,
    images: int,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batches:
    """Batches of 2 · ``images`` views, first views before second ones, each with its partner's column as its label.

    The images are dealt at random, as in training: a folder's own order would compare those of one class alone. Those
    that fill no batch are left out. The views, drawn like the order by ``seed`` on the CPU, are kept in memory: 8 bytes
    a pixel and channel.

    Raises:
        DataError: no batch is full.
        UsageError: the examples are no images that can be augmented.
    """
    require_images(examples.x)
    count = len(examples) // images
    if not count:
        raise DataError(
            f"{examples.source} has {len(examples)} images, too few for a batch of {images}. Lower the "
            "batch size"
        )
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(len(examples), generator=generator)[: count * images].split(images)
    views = []
    for x in taken(examples.x, keys):
        views += [see(x, draw_views(x.shape, generator)) for _ in range(2)]
    y = partners(images, before=0).repeat(count)  # no process shares another's
    return Batches(
        Examples(torch.cat(views), y, (), examples.source),
        normalization,
        batch_size=2 * images,
        device=device,
        dtype=dtype,
        batch_dependent=True,
    )
