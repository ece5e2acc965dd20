"""What survives when power or a process fails while a file is written."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from lowbitq.checkpoints import writing


def journal(monkeypatch) -> list[tuple[str, str]]:
    """Return a list that gets each path that is synced, and each that takes its final name."""
    events = []
    fsync, replace, rename, exchange = os.fsync, os.replace, Path.rename, writing._exchange

    def synced(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(one, other):
        replace(one, other)
        events.append(("name", str(one)))

    def renamed(one, other):
        result = rename(one, other)
        events.append(("name", str(one)))
        return result

    def exchanged(one, other):
        if done := exchange(one, other):
            events.append(("name", str(one)))
        return done

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(writing, "_exchange", exchanged)
    return events


def assert_on_disk(events: list[tuple[str, str]], path: Path) -> None:
    """All contents were synced before they took the name `path`, and the name after that."""
    kinds = [kind for kind, _ in events]
    assert kinds.count("name") == 1
    at = kinds.index("name")
    fresh = events[at][1]
    before = {name for _, name in events[:at]}
    contents = [file.name for file in path.iterdir()] if path.is_dir() else []
    assert before >= {fresh, *(f"{fresh}/{name}" for name in contents)}
    assert ("sync", str(path.parent)) in events[at:]


def killed_in(body) -> None:
    """Run a function, which kills its process, in another one."""
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
