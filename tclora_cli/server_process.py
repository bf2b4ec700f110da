"""The process of the temporary Prefect server: ``python -m tclora_cli.server_process``.

It talks to `tclora_cli.server` by lines of JSON on standard output: first ``{"port": N}`` with the
port of 127.0.0.1 it holds, or ``{"port": null}`` where the user's own settings name a server. It
serves once it is sent a line, and ends as soon as standard input is closed, however its parent
ended.
"""

import json
import os
import socket
import sys
import threading

from tclora.imports import lasting

_GRACE = 2  # for open connections at the end (s)


def main() -> None:
    """Announce a port, import the server, wait for the word, serve."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no event
    told = threading.Event()
    threading.Thread(target=_watch, args=(told,), daemon=True).start()
    with lasting():
        from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED

    needed = not PREFECT_API_URL.value() and PREFECT_SERVER_EPHEMERAL_ENABLED.value()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        print(json.dumps({"port": sock.getsockname()[1] if needed else None}), file=events)
        events.close()
        if needed:
            _serve(sock, told)


def _watch(told: threading.Event) -> None:
    """Pass the parent's word on, then end this process with it."""
    if sys.stdin.readline():
        told.set()
        sys.stdin.read()
    os._exit(0)


def _serve(sock: socket.socket, told: threading.Event) -> None:
    with lasting():
        import uvicorn
        from prefect.server.api.server import create_app

    told.wait()
    config = uvicorn.Config(
        create_app,
        factory=True,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=_GRACE,
    )
    uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    main()
