"""What the command `serve` does."""

from __future__ import annotations

import ipaddress
import os
from typing import Any

from lowbitq.commands import USAGE, CommandError, Options, _load, complain
from lowbitq.serving_requests import MISSING

TOKEN = "LOWBITQ_TOKEN"


def serve(options: Options) -> tuple[dict[str, Any], str]:
    """Serve a model until interrupted."""
    token = options.token or os.environ.get(TOKEN) or None
    if not is_local(options.host) and token is None:
        said = f"--host {options.host} can be reached by others; give --token or set {TOKEN}"
        raise CommandError(USAGE, said)
    try:
        import uvicorn

        from lowbitq.serving import Limits, app
    except ModuleNotFoundError as error:
        raise ImportError(MISSING) from error
    limits = Limits(seconds=options.seconds, waiting=options.waiting)
    served = app(_load(options.model), name=options.name, token=token, limits=limits)
    complain(f"http://{options.host}:{options.port}/v1 serves {options.name}; Ctrl-C ends it")
    uvicorn.run(served, host=options.host, port=options.port, log_level="warning")
    return {"served": options.name}, "stopped"


def is_local(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
