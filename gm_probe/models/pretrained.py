"""Start training from given weights: the trunk must fit, a head for other classes starts afresh."""

import math
from dataclasses import replace

from torch import Tensor, nn

from gm_probe.files.state_dicts import below
from gm_probe.models.checkpoints import Checkpoint, is_simclr
from gm_probe.models.contrastive import Contrastive, last_linear
from gm_probe.models.fitting import load_weights
from gm_probe.models.weight_names import locate

POSITIONS = "pos_embed"
"""A Vision Transformer's position embedding, (1, tokens, width)."""


def load_pretrained(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Copy the checkpoint's weights into ``model`` and return the names that keep their initial values.

    Those are the head's (the last linear layer's), all or none, where the file has no head or one for another
    number of classes. Of a SimCLR model a classifier takes the encoder. Position embeddings of a Vision Transformer
    for images of another size are resampled (bicubic, as timm does). Everything else must be there with its shape.

    Raises:
        CheckpointError: it is not; the message names the tensors.
    """
    own = model.state_dict()
    if is_simclr(checkpoint) and not isinstance(model, Contrastive):
        checkpoint = replace(checkpoint, state=below(checkpoint.state, "encoder."))
    place = locate(model, checkpoint.state)
    state = {**place.state, **{name: checkpoint.state[name] for name in place.extra}}
    head = [name for name in own if name.rpartition(".")[0] == last_linear(model)]
    fresh = tuple(head) if any(_other_classes(own[name], state.get(name)) for name in head) else ()
    state |= {name: own[name] for name in fresh}
    if POSITIONS in own and POSITIONS in state:
        state[POSITIONS] = _resampled(model, state[POSITIONS])
    load_weights(model, replace(checkpoint, state=state))
    return fresh


def others_there(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return where the file holds the same weights again with other values, such as an average of them."""
    copies = locate(model, checkpoint.state).copies
    return (*checkpoint.alternatives, *(prefix.rstrip(".") for prefix in copies))


def _other_classes(own: Tensor, given: Tensor | None) -> bool:
    """Return whether the head's tensor is absent, or differs in the number of classes alone."""
    return given is None or (len(given) != len(own) and given.shape[1:] == own.shape[1:])


def _resampled(model: nn.Module, positions: Tensor) -> Tensor:
    """Return positions resampled to the model's grid of patches; unchanged where the file's form no square."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if grid is None or positions.dim() != 3 or math.isqrt(n := positions.shape[1] - prefix) ** 2 != n:
        return positions
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=prefix)
