"""Check that every number of a model is finite."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lowbitq.linears import Copy, Linear
from lowbitq.models.decoder import AnyLinear, Model
from lowbitq.models.quantized import RESIDUAL_ROTATION
from lowbitq.models.slots import EMBEDDING, HEAD, NORMS, OUTER, SLOTS, name_in_block
from lowbitq.rotations import Rotation


def check_finite(model: Model) -> None:
    """Raise ValueError if a model has a NaN or an infinity.

    Parameters
    ----------
    model : Model
        For quantized layers, scales and offsets are checked.

    Raises
    ------
    ValueError
        Names the first such tensor from the embedding to the head, by its Hugging Face name, and
        the index in it.

    Examples
    --------
    >>> model.final_norm[7] = np.nan  # doctest: +SKIP
    >>> check_finite(model)  # doctest: +SKIP
    Traceback (most recent call last):
    ValueError: model.norm.weight has a NaN or an infinity at [7]
    """
    for name, array in _arrays(model):
        finite = np.isfinite(array)
        if not finite.all():
            place = np.unravel_index(finite.argmin(), finite.shape)
            raise ValueError(
                f"{name} has a NaN or an infinity at [{', '.join(str(int(i)) for i in place)}]"
            )


def _arrays(model: Model) -> Iterator[tuple[str, NDArray[np.float32]]]:
    yield from _layer_arrays(EMBEDDING, model.embedding)
    yield from _rotation_arrays(RESIDUAL_ROTATION, model.residual_rotation)
    for index, block in enumerate(model.blocks):
        for norm in NORMS:
            if (gain := getattr(block, norm.name)) is not None:
                yield f"{name_in_block(index, norm)}.weight", gain
        for slot in SLOTS:
            yield from _layer_arrays(name_in_block(index, slot), block.linears[slot.name])
    yield f"{OUTER['final_norm'].hf}.weight", model.final_norm
    if model.head is not None:
        yield from _layer_arrays(HEAD, model.head)


def _layer_arrays(name: str, linear: AnyLinear) -> Iterator[tuple[str, NDArray[np.float32]]]:
    if isinstance(linear, Linear):
        yield from _rotation_arrays(f"{name}.rotation", linear.rotation)
        yield f"{name}.weight", linear.weight
    else:
        for i, copy in enumerate(linear.copies):
            yield from _copy_arrays(f"{name}.copies.{i}", copy)
        for letter, array in zip("UV", linear.adapter or (), strict=False):
            yield f"{name}.adapter.{letter}", array
    if linear.bias is not None:
        yield f"{name}.bias", linear.bias


def _copy_arrays(name: str, copy: Copy) -> Iterator[tuple[str, NDArray[np.float32]]]:
    yield from _rotation_arrays(f"{name}.rotation", copy.rotation)
    yield from _rotation_arrays(f"{name}.output_rotation", copy.output_rotation)
    yield f"{name}.scale", copy.tensor.scale
    yield f"{name}.offset", copy.tensor.offset
    if copy.weight is not None:
        yield f"{name}.weight", copy.weight


def _rotation_arrays(
    name: str, rotation: Rotation | None
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    if rotation is not None:
        for part, array in rotation.to_arrays().items():
            yield f"{name}.{part}", array
