"""Batches for measuring NT-Xent: all of the same size, with two seeded views of each image."""

from __future__ import annotations

import torch

from gm_probe.data.batches import Batches
from gm_probe.data.examples import Examples
from gm_probe.data.images import decoded_ahead
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError
from gm_probe.models.contrastive import partners
from gm_probe.training.augment import require_images
from gm_probe.training.views import draw_views, see


def contrastive_batches(
    examples: Examples,
    normalization: Normalization,
    *,
    images: int,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batches:
    """Return batches of 2 · ``images`` views, first views before second ones, labeled by their partners' columns.

    Images are dealt at random, as in training, because a folder's own order would compare images of one class only.
    Images that do not fill a batch are left out. Views and order are drawn by ``seed`` on the CPU. The views stay in
    memory, at 8 bytes per pixel and channel.

    Raises:
        DataError: no batch is full.
        UsageError: the examples are not images that can be augmented.
    """
    require_images(examples.x, "SimCLR")
    count = len(examples) // images
    if not count:
        raise DataError(
            f"{examples.source} has {len(examples)} images, too few for a batch of {images}. Lower the "
            "batch size"
        )
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(len(examples), generator=generator)[: count * images].split(images)
    views = []
    for x in decoded_ahead(examples.x, keys):
        views += [see(x, draw_views(x.shape, generator)) for _ in range(2)]
    y = partners(images, before=0).repeat(count)  # processes do not share batches
    return Batches(
        Examples(torch.cat(views), y, (), examples.source),
        normalization,
        batch_size=2 * images,
        device=device,
        dtype=dtype,
        batch_dependent=True,
    )
