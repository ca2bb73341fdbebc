"""S_ρ of a run's model during its training, over the run's unlabeled part."""

from __future__ import annotations

from typing import Any

from torch import nn

from gm_probe.data.batches import Batches
from gm_probe.errors import UsageError
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.runtime import processes
from gm_probe.training.config import TrainConfig
from gm_probe.training.contrastive_batches import contrastive_batches

PROBE_BATCH = "local_inconsistency_batch_size"
"""A row's key for the batch size of S_ρ, where memory ran out on larger batches."""


class Tracking:
    """Measures S_ρ in each process over its share; SimCLR's batches have as many images as in training.

    Args:
        unlabeled: the whole part, without labels.

    Raises:
        UsageError: there are fewer SimCLR batches than processes.
    """

    def __init__(self, config: TrainConfig, unlabeled: Batches) -> None:
        self.config, self.unlabeled = config, unlabeled
        self.images = min(config.batch_size, unlabeled.num_examples)  # of a batch of SimCLR's
        batches = unlabeled.num_examples // self.images
        if config.trains_encoder and config.track_every > 0 and batches < processes.count():
            raise UsageError(
                f"S_ρ cannot be tracked: {unlabeled.num_examples} unlabeled images are {batches} batches of "
                f"{self.images}, fewer than {processes.count()} processes; raise --num-unlabeled, or leave out "
                "--track-every"
            )

    def of_epoch(self, epoch: int, model: nn.Module) -> dict[str, Any]:
        """Return the entries of the metrics row after ``epoch``; none where no measurement is due."""
        config = self.config
        if config.track_every <= 0 or epoch % config.track_every:
            return {}
        settings = Settings(rho=config.track_rho, noise_scale=config.track_rho, seed=config.seed)
        name = "local_inconsistency"
        probe_set = self._probe_set()
        report = measure(model, probe_set, [name], settings)
        estimate = report.rows[name]
        row = {name: estimate.value, f"{name}_stderr": estimate.stderr, f"{name}_rho": config.track_rho}
        if report.batch_size < probe_set.batch_size:
            row[PROBE_BATCH] = report.batch_size
        return row

    def _probe_set(self) -> Batches:
        whole = self.unlabeled
        if self.config.trains_encoder:
            whole = contrastive_batches(
                whole.examples,
                whole.normalization,
                images=self.images,
                seed=self.config.seed,
                device=whole.device,
            )
        return whole.shard(processes.rank(), processes.count())
