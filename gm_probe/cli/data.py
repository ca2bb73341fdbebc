"""The options that say on what data and how a checkpoint is run; `measure` and `pairs` share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gm_probe.cli.output import note_reading, notes_console
from gm_probe.cli.param_types import floats
from gm_probe.cli.settings import pop_settings
from gm_probe.data.image_reading import ImageReading
from gm_probe.data.names import require_data_name
from gm_probe.errors import DataError, UsageError
from gm_probe.models.names import require_model_name
from gm_probe.runtime.names import require_device_name
from gm_probe.setting import setting, validate

if TYPE_CHECKING:
    import torch

    from gm_probe.data.examples import Examples
    from gm_probe.data.normalization import Normalization
    from gm_probe.models.door import Kind
    from gm_probe.training.permissions import Permissions

DATA, CHECKPOINT, MACHINE = "Data", "Checkpoint", "Machine and precision"


@lru_cache(maxsize=3)
def opened(data: DataOptions, source: str, labeled: bool) -> tuple[Examples, str, str | None]:
    """Open ``source`` as ``DataOptions.open`` does; a process reads it once."""
    return data.open(source, labeled=labeled)


def opened_aloud(data: DataOptions, source: str, labeled: bool, quiet: bool) -> tuple[Examples, str]:
    """Open ``source``, say on stderr what is to be known of it, and return the examples and their part's name."""
    examples, part, hint = opened(data, source, labeled)
    note_reading(notes_console(quiet), [*([hint] if hint else []), *examples.notes], examples.skipped)
    return examples, part


@dataclass(frozen=True, slots=True)
class DataOptions:
    """The data that checkpoints run on, and how they run: each field is an option (see ``setting``)."""

    part: str | None = setting(
        None,
        DATA,
        "Split to use when the data has train/ and test/.",
        unset="test",
        choices=("test", "train"),
    )
    data: str | None = setting(
        None,
        DATA,
        "Where the run's own data is now, if it has moved. The data itself must be unchanged.",
        metavar="WHERE",
    )
    model_names: tuple[str, ...] = setting(
        (),
        CHECKPOINT,
        "Name the network of a checkpoint that gmprobe did not write; see `gmprobe models`. Give it once for all "
        "checkpoints, or once for each.",
        flag="--model",
        metavar="NAME",
    )
    keys: tuple[str, ...] = setting(
        (),
        CHECKPOINT,
        "Use these weights of a file, such as state_dict_ema: a key, a dotted path of keys, or a prefix of names. "
        "Give it once for all checkpoints, or once for each.",
        flag="--key",
        metavar="NAME",
    )
    strips: tuple[str, ...] = setting(
        (),
        CHECKPOINT,
        "Use only tensors whose names begin with this prefix, and remove the prefix. Give it once for all "
        "checkpoints, or once for each.",
        flag="--strip",
        metavar="PREFIX",
    )
    max_examples: int | None = setting(
        None, DATA, "Use a seeded random subset of this many examples.", least=1
    )
    batch_size: int | None = setting(
        None,
        MACHINE,
        "Number of examples per pass; it affects memory and speed only.",
        unset="what fits --memory; on a CPU at most 250",
        least=1,
    )
    mean: str | None = setting(
        None,
        CHECKPOINT,
        "Mean of each channel that a checkpoint's inputs were normalised with, for pixels in [0, 1].",
        metavar="R,G,B",
    )
    std: str | None = setting(
        None, CHECKPOINT, "Standard deviation of each channel; goes with --mean.", metavar="R,G,B"
    )
    no_normalize: bool = setting(
        False, CHECKPOINT, "Pass pixels in [0, 1] to the network without normalisation."
    )
    image_size: int | None = setting(
        None,
        DATA,
        "Resize a folder's images to this many pixels per side, ignoring their aspect ratio.",
        least=1,
    )
    resize: int | None = setting(
        None,
        DATA,
        "Resize the shorter side of a folder's images to this many pixels, as torchvision does.",
        least=1,
    )
    crop: int | None = setting(
        None, DATA, "Then cut the central square with this many pixels per side.", least=1
    )
    channels: str | None = setting(
        None, DATA, "Read a folder's images as grey (1) or RGB (3).", choices=("1", "3")
    )
    skip_bad: bool = setting(
        False, DATA, "Leave out images that cannot be decoded; the result counts and lists them."
    )
    num_classes: int | None = setting(
        None, CHECKPOINT, "Number of classes of the network.", unset="the outputs of its head", least=2
    )
    model_output: str | None = setting(
        None,
        CHECKPOINT,
        "Index or name of the logits, for a model that returns several outputs.",
        flag="--output",
        metavar="NAME",
    )
    outputs_are: str | None = setting(
        None,
        CHECKPOINT,
        "State what the model returns. Without this, outputs that look like probabilities are refused.",
        choices=("logits", "probabilities", "log-probabilities"),
    )
    data_root: Path | None = setting(
        None, DATA, "Folder in which torchvision keeps its data sets.", metavar="DIR"
    )
    download: bool = setting(False, DATA, "Let torchvision download a missing data set.")
    dtype: str = setting(
        "float32", MACHINE, "Compute in this floating-point type.", choices=("float32", "float64")
    )
    device: str = setting(
        "auto", MACHINE, "Compute on this device: auto, cpu, cuda, cuda:1, or another that torch knows."
    )
    threads: int | None = setting(None, MACHINE, "Number of CPU threads.", least=1, most=1024)

    def __post_init__(self) -> None:
        validate(self)

    @classmethod
    def of(cls, options: dict[str, Any]) -> DataOptions:
        """Take them out of a command's ``options``."""
        return cls(**pop_settings(cls, options))

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
        ImageReading(**self.reading())  # its constructor checks them
        require_device_name(self.device)
        for name in filter(None, self.model_names):
            require_model_name(name)
        for name in filter(None, (source, self.data)):
            require_data_name(name, here=True)

    def reading(self) -> dict[str, int | None]:
        """Return how a folder's images are read: keywords of ``open_source``."""
        return {
            "channels": int(self.channels) if self.channels else None,
            "image_size": self.image_size,
            "resize": self.resize,
            "crop": self.crop,
        }

    def open(self, source: str, *, labeled: bool) -> tuple[Examples, str, str | None]:
        """Return the examples of ``source``, the name of their part, and a note where a part was chosen by default.

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

    def recorded(self, seed: int) -> dict[str, Any]:
        """Return what a result records of these options and of the machine."""
        from gm_probe.runtime.devices import pick_device
        from gm_probe.runtime.machine import environment

        return {
            "max_examples": self.max_examples,
            "seed": seed,
            **self.reading(),
            "dtype": self.dtype,
            "batchnorm": "eval (running statistics)",
            **environment(pick_device(self.device)),
        }

    def permissions(self) -> Permissions:
        """Return where a run's own data may be looked for."""
        from gm_probe.training.permissions import Permissions

        return Permissions(self.data_root, self.download, self.data)

    def prepare_process(self) -> None:
        """Set the threads and the allocator of this process."""
        import torch

        from gm_probe.runtime.machine import keep_freed_memory

        keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def loading(self) -> dict[str, Any]:
        """Return the keywords of ``open_checkpoint``."""
        from gm_probe.models.door import Outputs
        from gm_probe.runtime.devices import pick_device

        size = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return size | {
            "normalization": self._normalization(),
            "num_classes": self.num_classes,
            "outputs": Outputs(self.model_output, cast("Kind | None", self.outputs_are)),
            "dtype": self._dtype(),
            "device": pick_device(self.device),
        }

    def of_each(self, checkpoints: Sequence[Path]) -> dict[Path, dict[str, Any]]:
        """Return how to load each checkpoint: the options that may differ from one to the next.

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
                if values and values[index % len(values)]:  # an empty value stands for none
                    found[path][name] = values[index % len(values)]
        return found

    def _dtype(self) -> torch.dtype:
        import torch

        return {"float32": torch.float32, "float64": torch.float64}[self.dtype]

    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return mean and standard deviation per channel; empty leaves pixels as they are, None takes the record's."""
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
        from gm_probe.data.normalization import Normalization

        pixels = self._pixels()
        return None if pixels is None else Normalization(*pixels)
