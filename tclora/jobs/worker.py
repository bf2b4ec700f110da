"""The process of one job: ``python -m tclora.jobs.worker FILE`` runs the call of a JSON file.

It prints one JSON line per event, samples of what it uses among them, and ends with the result or
the error. It dies with its caller, whose end of standard input it watches, so that a killed run
leaves nothing behind that could write.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from threadpoolctl import threadpool_limits

from tclora.errors import TcloraError
from tclora.imports import lasting
from tclora.jobs.call import Call, Event
from tclora.jobs.devices import THREADS
from tclora.jobs.usage import SAMPLE, Sampling
from tclora.registry import load_plugins


def main(path: str) -> None:
    """Run the call described by a JSON file."""
    _die_with_caller()
    stream, lock = _own_output(), threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with lock:
            stream.write(json.dumps(message) + "\n")
            stream.flush()

    def on_event(event: Event) -> None:
        send({"event": dict(event)})

    try:
        load_plugins()
        call = Call.model_validate_json(Path(path).read_text(encoding="utf-8"))
        with lasting():
            call.load()
        _share_cores()
        with Sampling(lambda sample: on_event({SAMPLE: sample}), family=True):
            result = call.run(on_event)
        send({"result": result})
    except (TcloraError, OSError) as error:
        send({"error": f"{type(error).__name__}: {error}"})


def _own_output() -> TextIO:
    """Return standard output for messages alone; what libraries print goes to standard error."""
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return stream


def _share_cores() -> None:
    """Let libraries compute with as many threads as the environment says.

    Those that were imported before this process was forked have read another number there.
    """
    threads = os.environ.get(THREADS[0], "")
    if threads.isdecimal():  # a user's own, of a job with a GPU, may be a list of numbers
        threadpool_limits(int(threads))
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(int(threads))


def _die_with_caller() -> None:
    """End this process as soon as the caller closes its end of standard input."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
