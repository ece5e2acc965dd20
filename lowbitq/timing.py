"""Timing calls in turns, so that a change of the machine's speed affects all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from lowbitq import _core

SHORTEST = 2e-4  # minimum seconds per sample: a thousand readings of the clock


Key = TypeVar("Key")


class Timing(NamedTuple):
    """Seconds of one call: minimum and median of all samples."""

    least: float
    median: float


def take_turns(
    calls: Mapping[Key, Callable[[], object]], *, repetitions: int = 20, rest: float = 0.0
) -> dict[Key, Timing]:
    """Time calls in turns, `repetitions` times, after one warm-up round.

    With one thread, this measures the thread's processor time, which other programs hardly affect;
    with more, wall time.

    Parameters
    ----------
    calls : mapping to callable
        Each is called often enough to make a sample longer than the clock's error.
    repetitions : int, default=20
        Samples of each call.
    rest : float, default=0
        Seconds to sleep before each sample, for libraries whose threads keep spinning after a call.

    Returns
    -------
    dict
        The `Timing` of each call, by its key in `calls`.

    Raises
    ------
    ValueError
        If `repetitions` is not positive.

    Examples
    --------
    >>> found = take_turns({"short": lambda: sum(range(9)), "long": lambda: sum(range(9999))})
    >>> found["short"].least < found["long"].least
    True
    """
    if repetitions < 1:
        raise ValueError(f"repetitions is {repetitions}, expected at least 1")
    clock = time.thread_time if _core.config()["threads"] == 1 else time.perf_counter
    loops = {}
    for name, call in calls.items():
        call()
        begin = clock()
        call()
        loops[name] = max(1, math.ceil(SHORTEST / max(clock() - begin, 1e-9)))
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            if rest:
                time.sleep(rest)
            begin = clock()
            for _ in range(loops[name]):
                call()
            samples[name].append((clock() - begin) / loops[name])
    return {name: Timing(min(s), float(np.median(s))) for name, s in samples.items()}
