"""How much memory this process holds: what a batch is fitted into."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(call: Callable[[], object]) -> int:
    """Run `call` and return the most bytes that the process held in RAM meanwhile.

    Without Linux's ``/proc/self/clear_refs`` it is the most since the process began, which is no
    less.

    Examples
    --------
    >>> peak_of(lambda: bytes(1 << 24)) > 1 << 24
    True
    """
    with suppress(OSError):
        _RESET.write_text("5")  # VmHWM starts again; man 5 proc
    call()
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text()):
            return int(found[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
