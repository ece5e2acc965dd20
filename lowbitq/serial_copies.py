"""Serial copies: blocks, or their halves, that run several times in a row.

    x -> x + f(x) -> (x + f(x)) + f(x + f(x))                      repeat
    x -> x + f(x) / 2 -> (x + f(x) / 2) + f(x + f(x) / 2) / 2      half_step

A block of the network is one explicit Euler step of unit length; two half steps are the same step,
taken more finely. Either changes what a float model computes, and costs the time of the blocks that
are added; their weights are stored once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lowbitq.models.decoder import Block, Model
from lowbitq.models.tokens import check_count

MODES = ("repeat", "half_step")
PARTS = ("block", "attention", "mlp")


def repeat_blocks(
    model: Model,
    blocks: int | Iterable[int],
    *,
    times: int = 2,
    mode: str = "repeat",
    part: str = "block",
) -> Model:
    """Return a model in which some blocks run several times, one after the other.

    Arrays are shared. Each run has keys and values of its own in a cache. Quantize a model before
    its blocks are repeated: `compress` takes every block for one of its own.

    Parameters
    ----------
    model : Model or QuantizedModel
        Left unchanged.
    blocks : int or iterable of int
        Indices of adjacent blocks, which run as a group: 3, 4, 3, 4.
    times : int, default=2
        How often the group runs.
    mode : {"repeat", "half_step"}, default="repeat"
        ``"half_step"``: each run adds 1 / `times` of what it adds otherwise.
    part : {"block", "attention", "mlp"}, default="block"
        What runs several times. The other half runs once: after the last run of attention, or
        before the first run of the MLP; it needs a group of one block.

    Returns
    -------
    Model
        A QuantizedModel if `model` is one.

    Raises
    ------
    ValueError
        If an option is none of these, or the blocks are not adjacent blocks of the model.

    Examples
    --------
    >>> deeper = repeat_blocks(model, range(10, 17))  # doctest: +SKIP
    >>> finer = repeat_blocks(model, 4, mode="half_step", part="mlp")  # doctest: +SKIP
    """
    group = [blocks] if isinstance(blocks, int) else list(blocks)
    check_count("times", times, 1)
    for name, value, choices in (("mode", mode, MODES), ("part", part, PARTS)):
        if value not in choices:
            raise ValueError(
                f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}"
            )
    count = len(model.blocks)
    if (
        not group
        or group != list(range(group[0], group[-1] + 1))
        or not (group[0] >= 0 and group[-1] < count)
    ):
        raise ValueError(f"blocks is {group}, expected adjacent indices from 0 to {count - 1}")
    if part != "block" and len(group) > 1:
        raise ValueError(f"part is {part!r} of {len(group)} blocks, expected one block")
    share = 1 / times if mode == "half_step" else 1.0
    run = [_scaled(model.blocks[index], part, share) for index in group]
    if part == "block":
        runs = run * times
    elif part == "attention":
        runs = [replace(run[0], mlp_scale=0.0)] * (times - 1) + run
    else:
        runs = run + [replace(run[0], attention_scale=0.0)] * (times - 1)
    result = model.copy()
    result.blocks[group[0] : group[-1] + 1] = [replace(one) for one in runs]
    return result


def _scaled(block: Block, part: str, share: float) -> Block:
    attention, mlp = (share if part in ("block", half) else 1.0 for half in ("attention", "mlp"))
    return replace(
        block,
        attention_scale=attention * block.attention_scale,
        mlp_scale=mlp * block.mlp_scale,
    )
