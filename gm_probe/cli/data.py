"""The options that say on what data and how a checkpoint is run; `measure` and `pairs` share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.output import note_reading, notes_console
from gm_probe.cli.param_types import AT_ONCE, PATH, Choice, floats
from gm_probe.data.reading import Reading
from gm_probe.data.sources import require_source
from gm_probe.errors import DataError, UsageError
from gm_probe.models.names import require_model_name
from gm_probe.runtime.device_names import require_device_name

if TYPE_CHECKING:
    import torch

    from gm_probe.data.batches import Normalization
    from gm_probe.data.datasets import Examples
    from gm_probe.training.leave import Leave

_OPTIONS = (
    click.option(
        "--part",
        type=Choice(["test", "train"]),
        help="Split to use when the data has train/ and test/.  [default: test]",
    ),
    click.option(
        "--data",
        metavar="WHERE",
        help="Where the run's own data is now, if it has moved. The data itself must be unchanged.",
    ),
    click.option(
        "--model",
        "model_names",
        metavar="NAME",
        multiple=True,
        help="Name the network of a checkpoint that gmprobe did not write; see `gmprobe models`. Give it "
        "once for all checkpoints, or once for each.",
    ),
    click.option(
        "--key",
        "keys",
        metavar="NAME",
        multiple=True,
        help="Use these weights of a file, such as state_dict_ema: a key, a dotted path of keys, or a "
        "prefix of names. Give it once for all checkpoints, or once for each.",
    ),
    click.option(
        "--strip",
        "strips",
        metavar="PREFIX",
        multiple=True,
        help="Use only tensors whose names begin with this prefix, and remove the prefix. Give it once "
        "for all checkpoints, or once for each.",
    ),
    click.option(
        "--max-examples", type=click.IntRange(1), help="Use a seeded random subset of this many examples."
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        help="Number of examples per pass; it affects memory and speed only.  [default: 250, or fewer to "
        "fit --memory]",
    ),
    click.option(
        "--mean",
        metavar="R,G,B",
        help="Mean of each channel that a checkpoint's inputs were normalised with, for pixels in [0, 1].",
    ),
    click.option("--std", metavar="R,G,B", help="Standard deviation of each channel; goes with --mean."),
    click.option(
        "--no-normalize", is_flag=True, help="Pass pixels in [0, 1] to the network without normalisation."
    ),
    click.option(
        "--image-size",
        type=click.IntRange(1),
        help="Resize a folder's images to this many pixels per side, ignoring their aspect ratio.",
    ),
    click.option(
        "--resize",
        type=click.IntRange(1),
        help="Resize the shorter side of a folder's images to this many pixels, as torchvision does.",
    ),
    click.option(
        "--crop", type=click.IntRange(1), help="Then cut the central square with this many pixels per side."
    ),
    click.option(
        "--channels", type=Choice(["1", "3"]), help="Read a folder's images as grey (1) or RGB (3)."
    ),
    click.option(
        "--skip-bad",
        is_flag=True,
        help="Leave out images that cannot be decoded; the result counts and lists them.",
    ),
    click.option(
        "--num-classes",
        type=click.IntRange(2),
        help="Number of classes of the network.  [default: the outputs of its head]",
    ),
    click.option(
        "--output",
        "model_output",
        metavar="NAME",
        help="Index or name of the logits, for a model that returns several outputs.",
    ),
    click.option(
        "--outputs-are",
        type=Choice(["logits", "probabilities", "log-probabilities"]),
        help="State what the model returns. Without this, outputs that look like probabilities are refused.",
    ),
    click.option(
        "--data-root", metavar="DIR", type=PATH, help="Folder in which torchvision keeps its data sets."
    ),
    click.option("--download", is_flag=True, help="Let torchvision download a missing data set."),
    click.option(
        "--dtype",
        type=Choice(["float32", "float64"]),
        default="float32",
        show_default=True,
        help="Compute in this floating-point type.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Compute on this device: auto, cpu, cuda, cuda:1, or another that torch knows.",
    ),
    click.option("--threads", type=AT_ONCE, help="Number of CPU threads."),
)


@lru_cache(maxsize=3)
def opened(data: DataOptions, source: str, labeled: bool) -> tuple[Examples, str, str | None]:
    """Open ``source`` as ``DataOptions.open`` does; a process reads it once."""
    return data.open(source, labeled=labeled)


def opened_aloud(data: DataOptions, source: str, labeled: bool, quiet: bool) -> tuple[Examples, str]:
    """Open ``source``, say on stderr what is to be known of it, and return the examples and their part's name."""
    examples, part, hint = opened(data, source, labeled)
    note_reading(notes_console(quiet), [*([hint] if hint else []), *examples.notes], examples.skipped)
    return examples, part


def data_options(command: Any) -> Any:
    """Add the options; the command takes them as ``**options`` and makes ``DataOptions`` of them."""
    return reduce(lambda inner, option: option(inner), reversed(_OPTIONS), command)


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What ``data_options`` read."""

    part: str | None
    data: str | None
    model_names: tuple[str, ...]
    keys: tuple[str, ...]
    strips: tuple[str, ...]
    max_examples: int | None
    batch_size: int | None
    mean: str | None
    std: str | None
    no_normalize: bool
    image_size: int | None
    resize: int | None
    crop: int | None
    channels: str | None
    skip_bad: bool
    num_classes: int | None
    model_output: str | None
    outputs_are: Any
    data_root: Path | None
    download: bool
    dtype: str
    device: str
    threads: int | None

    def require_use(self, source: str | None) -> None:
        """Raise UsageError where an option is given that does not go with the data that is measured over.

        Args:
            source: data that is named by --unlabeled or --labeled; None = the runs' own.
        """
        if source is None and (self.part or self.skip_bad or any(self.reading().values())):
            raise UsageError(
                "--part, --image-size, --resize, --crop, --channels and --skip-bad go with --unlabeled or --labeled "
                "DATA"
            )
        if source is not None and self.data is not None:
            raise UsageError(
                "--data says where a run's own data is now; it excludes --unlabeled and "
                "--labeled. Give one of them"
            )
        self._pixels()
        Reading(**self.reading())  # which checks them
        require_device_name(self.device)
        for name in filter(None, self.model_names):
            require_model_name(name)
        for name in filter(None, (source, self.data)):
            require_source(name, here=True)

    def reading(self) -> dict[str, int | None]:
        """How a folder's images are read: keywords of ``open_source``."""
        return {
            "channels": int(self.channels) if self.channels else None,
            "image_size": self.image_size,
            "resize": self.resize,
            "crop": self.crop,
        }

    def open(self, source: str, *, labeled: bool) -> tuple[Examples, str, str | None]:
        """The examples of ``source``, the name of their part, and a note where a part was chosen unasked.

        A folder's images are decoded by ``Examples.subset``.
        """
        from gm_probe.data.datasets import open_source

        opened = open_source(
            source,
            labeled=labeled,
            root=self.data_root,
            download=self.download,
            skip_bad=self.skip_bad,
            decode=False,
            **self.reading(),
        )
        if labeled and any(part.y is None for part in (opened.pool, opened.test or opened.pool)):
            raise DataError(
                f"{opened.pool.source} has no labels. Add 'y' (N,) to it, or pass it as --unlabeled"
            )
        if opened.test is None:
            if self.part == "test":
                raise UsageError(f"{opened.pool.source} has no train/ and test/ parts; leave --part out")
            return opened.pool, "all", None
        if self.part == "train":
            return opened.pool, "train", None
        note = f"{source} has a train and a test part; the test part is used (see --part)"
        return opened.test, "test", note if self.part is None else None

    def leave(self) -> Leave:
        """Where a run's own data may be looked for."""
        from gm_probe.training.leave import Leave

        return Leave(self.data_root, self.download, self.data)

    def loading(self) -> dict[str, Any]:
        """How to load a checkpoint: the keywords of ``open_checkpoint``. Sets threads and allocator of this process."""
        import torch

        from gm_probe.models.door import Outputs
        from gm_probe.runtime.devices import keep_freed_memory, pick_device

        keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        size = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return size | {
            "normalization": self._normalization(),
            "num_classes": self.num_classes,
            "outputs": Outputs(self.model_output, self.outputs_are),
            "dtype": self._dtype(),
            "device": pick_device(self.device),
        }

    def of_each(self, checkpoints: Sequence[Path]) -> dict[Path, dict[str, Any]]:
        """How to load each checkpoint beside ``loading``: the options that may differ from one to the next.

        Raises:
            UsageError: one is given neither once nor as often as there are checkpoints.
        """
        found: dict[Path, dict[str, Any]] = {path: {} for path in checkpoints}
        for option, name, values in (
            ("--model", "model_name", self.model_names),
            ("--key", "key", self.keys),
            ("--strip", "strip", self.strips),
        ):
            if len(values) not in {0, 1, len(checkpoints)}:
                raise UsageError(
                    f"{option} is given {len(values)} times for {len(checkpoints)} checkpoint(s); give it once, or "
                    "once for each in their order"
                )
            for index, path in enumerate(checkpoints):
                if values and values[index % len(values)]:  # an empty one stands for none
                    found[path][name] = values[index % len(values)]
        return found

    def _dtype(self) -> torch.dtype:
        import torch

        return {"float32": torch.float32, "float64": torch.float64}[self.dtype]

    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each channel; empty = pixels as they are, None = as recorded."""
        if self.no_normalize:
            if self.mean or self.std:
                raise UsageError("--no-normalize and --mean/--std exclude each other; give one")
            return (), ()
        if self.mean is None and self.std is None:
            return None
        if self.mean is None or self.std is None:
            raise UsageError("--mean and --std go together; give both")
        return floats("--mean", self.mean), floats("--std", self.std)

    def _normalization(self) -> Normalization | None:
        from gm_probe.data.batches import Normalization

        pixels = self._pixels()
        return None if pixels is None else Normalization(*pixels)
