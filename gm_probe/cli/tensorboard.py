"""A run's metrics as TensorBoard events (an extra: ``pip install 'gm_probe[tensorboard]'``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gm_probe.errors import StorageError, UsageError


class Events:
    """Writes every epoch's row below ``out``/tensorboard.

    Raises:
        UsageError: TensorBoard is not installed.
        StorageError: that folder is a link.
    """

    def __init__(self, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("--tensorboard needs: pip install 'gm_probe[tensorboard]'") from error
        folder = out / "tensorboard"
        if folder.is_symlink():  # a link may lead anywhere
            raise StorageError(f"{folder} is a link, and links are not followed here. Remove it")
        self._open, self._folder = SummaryWriter, str(folder)
        self._writer: Any = None

    def write(self, row: dict[str, Any]) -> None:
        epoch = row["epoch"]
        if self._writer is None:  # a resumed run repeats its last epochs: earlier events of these are purged
            self._writer = self._open(self._folder, purge_step=epoch)
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
