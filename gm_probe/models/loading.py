"""From a checkpoint and a model's name to a model in memory, and from data to what that model takes."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gm_probe.data.datasets import NUMPY_SUFFIXES, TORCH_SUFFIXES
from gm_probe.data.examples import Examples
from gm_probe.data.normalization import Normalization
from gm_probe.errors import CheckpointError, DataError, UsageError, first_three
from gm_probe.models import huggingface
from gm_probe.models.checkpoints import Checkpoint
from gm_probe.models.fitting import Fit, fitting, load_weights
from gm_probe.models.zoo import ModelSpec, build_model, check_configured, is_user_code
from gm_probe.runtime.randomness import generators_kept


def load_model(checkpoint: Checkpoint, name: str | None = None, **options: Any) -> nn.Module:
    """Build the checkpoint's model and load its weights, as ``fitted_model`` does."""
    return fitted_model(checkpoint, name, **options)[0]


def fitted_model(
    checkpoint: Checkpoint,
    name: str | None = None,
    *,
    input_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    temperature: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, Fit]:
    """Build the checkpoint's model, load its weights, and return it with how they fit.

    Args:
        name: as ``--model`` takes it; None uses what the checkpoint recorded. Code that a checkpoint names is
            never run: anybody's own callable must be named here.
        input_shape: of one example, for built-in models without a record.
        num_classes: None infers it from the record, or from the rows of the last weight matrix.
        temperature: of a SimCLR model (``ModelSpec``); None = the recorded one.
        dtype: of the model, before it takes the weights; None = as it is built.

    Raises:
        UsageError: no name is known, the recorded one is a user's own code, or the weights leave open how the network
            is configured.
        CheckpointError: the weights do not fit.
    """
    recorded = checkpoint.model
    followed = name is None
    if name is None:
        name = _recorded_name(checkpoint)
    elif recorded is not None and recorded.name.partition(",")[0] == name:
        name = recorded.name  # the recorded name has its builder's keywords
    elif recorded is None:
        check_configured(name)
    if recorded is not None:
        input_shape = input_shape or recorded.input_shape
        num_classes = num_classes or recorded.num_classes
        temperature = temperature or recorded.temperature
    if name == huggingface.NAME:
        return _from_folder(checkpoint, dtype)
    decides_itself = is_user_code(name) and temperature is None
    if num_classes is None and not decides_itself:
        num_classes = _rows_of_last_matrix(checkpoint)
    spec = ModelSpec(name, input_shape or (3, 32, 32), num_classes or 0, temperature)
    if not spec.is_user_code:
        # checked before memory is taken: the record, or a head, may claim a network of any size
        try:
            with torch.device("meta"):
                fitting(build_model(spec), checkpoint)
        except UsageError as error:
            if not followed:
                raise
            raise CheckpointError(f"{checkpoint.path} records an impossible network: {error}") from error
    with generators_kept():  # the initial weights do not count, so the caller's generators are left alone
        model = build_model(spec).to(dtype)
    fit = load_weights(model, checkpoint)
    return model, fit


def _recorded_name(checkpoint: Checkpoint) -> str:
    recorded = checkpoint.model
    if recorded is None:
        if huggingface.is_folder(checkpoint.path):
            raise UsageError(f"{checkpoint.path} is a Hugging Face folder. Add --model {huggingface.NAME}")
        raise UsageError(
            f"{checkpoint.path} was not written by gmprobe. Name its network with --model (e.g. "
            "torchvision:resnet18, or your own package.module:callable)"
            + (
                ""
                if checkpoint.normalization
                else " and, for images, its normalisation with --mean and --std"
            )
        )
    if recorded.is_user_code:
        raise UsageError(
            f"{checkpoint.path} belongs to your own code {recorded.name!r}, which runs only when you name "
            f"it. Add --model {recorded.name}"
        )
    return recorded.name


def _from_folder(checkpoint: Checkpoint, dtype: torch.dtype | None) -> tuple[nn.Module, Fit]:
    """Build the network that config.json beside the weights describes."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if not huggingface.is_folder(folder):
        raise UsageError(
            f"--model {huggingface.NAME} needs {huggingface.CONFIG} beside the weights, but {folder} has "
            "none. Give the folder that save_pretrained wrote"
        )
    with generators_kept():
        model, left_out = huggingface.load(folder, checkpoint.state)
    model.to(dtype)
    fit = load_weights(model, replace(checkpoint, state=dict(model.state_dict())))
    return model, replace(fit, left_out=left_out)


def _rows_of_last_matrix(checkpoint: Checkpoint) -> int:
    rows = [len(value) for value in checkpoint.state.values() if value.dim() == 2]
    if not rows or not rows[-1]:
        raise CheckpointError(f"{checkpoint.path}: the number of classes is unknown. Give --num-classes")
    return rows[-1]


def choose_normalization(
    checkpoint: Checkpoint, examples: Examples, given: Normalization | None
) -> Normalization:
    """Return the normalisation given, or else the recorded one; it must fit the range of ``examples``.

    A foreign checkpoint needs one for images, whether they are uint8 or floats. Tables and signals of floats, and token
    ids, are taken as they are: they have no colour channels.

    Raises:
        UsageError: images for a foreign checkpoint, and none given; or it is not for pixels in [0, 1].
        DataError: the images are no pixels in [0, 1], as the normalisation wants them.
    """
    chosen = checkpoint.normalization if given is None else given
    if chosen is not None:
        chosen.require_range(examples, recorded=given is None)
        return chosen
    x = examples.x
    if x.dtype != torch.uint8 and not (x.dim() >= 4 and x.is_floating_point()):
        return Normalization()
    raise UsageError(
        f"{checkpoint.path} records no normalisation. Give the values of its training by --mean and --std "
        "(e.g. --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225, for pixels in [0, 1]), or --no-normalize"
    )


def check_fit(checkpoint: Checkpoint, examples: Examples) -> None:
    """Compare data with what the checkpoint recorded of its training data.

    Raises:
        DataError: another shape, another number of classes, or other class names.
    """
    recorded = checkpoint.model
    if recorded is None:
        return
    shape = tuple(examples.x.shape[1:])
    if shape != recorded.input_shape and math.prod(shape) != math.prod(recorded.input_shape):
        remedy = "save examples of that shape"
        of_array = examples.source.endswith(NUMPY_SUFFIXES + TORCH_SUFFIXES)
        if not of_array and len(shape) == len(recorded.input_shape) == 3:
            options = [f"--channels {recorded.input_shape[0]}"] if shape[0] != recorded.input_shape[0] else []
            if shape[1:] != recorded.input_shape[1:]:
                options.append(f"--image-size {recorded.input_shape[-1]}")
            remedy = f"read image folders with {' '.join(options)}"
        raise DataError(
            f"{examples.source} has examples of shape {shape} but {checkpoint.path} takes "
            f"{recorded.input_shape}; {remedy}"
        )
    check_classes(examples, checkpoint.classes, None, checkpoint.path)


def check_classes(
    examples: Examples, recorded: tuple[str, ...], num_classes: int | None, checkpoint: object
) -> None:
    """Compare the class names of ``examples``, if they have any, with a checkpoint's.

    An array file names no classes: its labels need only lie below the number of outputs.

    Args:
        recorded: names that the checkpoint was trained on; empty = unknown.
        num_classes: its number of outputs; None = not yet known.

    Raises:
        DataError: other names, or another number of classes.
    """
    names = examples.classes
    if names and recorded and names != recorded:
        raise DataError(
            f"{examples.source} has classes {first_three(names)} but {checkpoint} was trained on "
            f"{first_three(recorded)}{_first_odd(names, recorded)}; rename the folders, or use the data as --unlabeled"
        )
    if names and num_classes is not None and len(names) != num_classes:
        raise DataError(
            f"{examples.source} has {len(names)} classes but {checkpoint} has {num_classes} outputs. Give "
            "each class a folder, or use the data as --unlabeled"
        )


def _first_odd(names: tuple[str, ...], recorded: tuple[str, ...]) -> str:
    """Name a class that only one side has, or say that the order differs, where the classes shown are the same."""
    if first_three(names) != first_three(recorded):
        return ""
    odd = sorted(set(names) ^ set(recorded))
    return f" (they differ in {odd[0]})" if odd else " (their order differs)"
