"""The options that say on what data and how a checkpoint is run; `measure` and `pairs` share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.kinds import AT_ONCE, PATH, Choice, floats
from gm_probe.core.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from gm_probe.core.batches import Normalization
    from gm_probe.core.datasets import Examples

_OPTIONS = (
    click.option(
        "--part",
        type=Choice(["test", "train"]),
        help="Of data that has both.  [default: test where the data has one]",
    ),
    click.option(
        "--model", "model_name", metavar="NAME", help="Network of a foreign checkpoint; see `gmprobe models`."
    ),
    click.option("--max-examples", type=click.IntRange(1), help="Use a seeded random subset of this size."),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        help="Examples a pass; memory and speed only.  [default: 250, or what memory holds]",
    ),
    click.option(
        "--mean", metavar="R,G,B", help="Normalisation of a foreign checkpoint, for pixels in [0, 1]."
    ),
    click.option("--std", metavar="R,G,B", help="Likewise."),
    click.option("--no-normalize", is_flag=True, help="Pixels in [0, 1] as they are."),
    click.option(
        "--image-size", type=click.IntRange(1), help="Resize a folder's images to this many pixels."
    ),
    click.option("--channels", type=Choice(["1", "3"]), help="Read a folder's images as grey or RGB."),
    click.option(
        "--skip-bad",
        is_flag=True,
        help="Leave out images that cannot be decoded; they are counted and listed.",
    ),
    click.option(
        "--num-classes",
        type=click.IntRange(2),
        help="Classes of a foreign checkpoint.  [default: its head's]",
    ),
    click.option("--data-root", metavar="DIR", type=PATH, help="Where torchvision keeps data."),
    click.option("--download", is_flag=True, help="Let torchvision download what is missing."),
    click.option("--dtype", type=Choice(["float32", "float64"]), default="float32", show_default=True),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps."),
    click.option("--threads", type=AT_ONCE, help="CPU threads."),
)


def data_options(command: Any) -> Any:
    """Add the options; the command takes them as ``**options`` and makes ``DataOptions`` of them."""
    return reduce(lambda inner, option: option(inner), reversed(_OPTIONS), command)


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What ``data_options`` read."""

    part: str | None
    model_name: str | None
    max_examples: int | None
    batch_size: int | None
    mean: str | None
    std: str | None
    no_normalize: bool
    image_size: int | None
    channels: str | None
    skip_bad: bool
    num_classes: int | None
    data_root: Path | None
    download: bool
    dtype: str
    device: str
    threads: int | None

    def require_source(self) -> None:
        """Raise UsageError where an option is given that says how to read data which is not named."""
        if self.part or self.image_size or self.channels or self.skip_bad:
            raise UsageError(
                "--part, --image-size, --channels and --skip-bad go with --unlabeled or --labeled DATA"
            )

    def open(self, source: str, *, labeled: bool) -> tuple[Examples, str, str | None]:
        """The examples of ``source``, the name of their part, and a note where a part was chosen unasked."""
        from gm_probe.core.datasets import open_source

        opened = open_source(
            source,
            labeled=labeled,
            root=self.data_root,
            download=self.download,
            channels=int(self.channels) if self.channels else None,
            image_size=self.image_size,
            skip_bad=self.skip_bad,
        )
        if labeled and any(part.y is None for part in (opened.pool, opened.test or opened.pool)):
            raise DataError(
                f"{opened.pool.source} has no labels; add 'y' (N,) to it, or give it by --unlabeled"
            )
        if opened.test is None:
            if self.part == "test":
                raise UsageError(f"{opened.pool.source} has no test part; leave --part out")
            return opened.pool, "all", None
        if self.part == "train":
            return opened.pool, "train", None
        note = f"{source} has two parts; its test part is used (see --part)"
        return opened.test, "test", note if self.part is None else None

    def loading(self) -> dict[str, Any]:
        """How to load a checkpoint: the keywords of ``open_subject``. Sets threads and allocator of this process."""
        import torch

        from gm_probe.core.devices import keep_freed_memory, pick_device

        keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        size = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return size | {
            "model_name": self.model_name,
            "normalization": self._normalization(),
            "num_classes": self.num_classes,
            "dtype": self._dtype(),
            "device": pick_device(self.device),
        }

    def _dtype(self) -> torch.dtype:
        import torch

        return {"float32": torch.float32, "float64": torch.float64}[self.dtype]

    def _normalization(self) -> Normalization | None:
        from gm_probe.core.batches import Normalization

        if self.no_normalize:
            if self.mean or self.std:
                raise UsageError("--no-normalize and --mean/--std exclude each other; give one")
            return Normalization()
        if self.mean is None and self.std is None:
            return None
        if self.mean is None or self.std is None:
            raise UsageError("--mean and --std go together; give both")
        return Normalization(floats("--mean", self.mean), floats("--std", self.std))
