"""What Prefect and MLflow add to a run: the same work with and without them, one behind the other.

The plain run calls the same flows and stages with Prefect's decorators taken off and without
MLflow: no server, no task runs, no cache keys, no results, no tracking; its jobs are processes as
ever. The time that it needs to import both all the same is taken off. The full run is ``tclora
run`` with a new output folder, and so a new MLflow store; Prefect's database is there already.
Usage: ``python benchmarks/overhead.py [--rounds N] [--set KEY=VALUE ...]``.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pandas as pd

_ARTIFACTS = (
    "create_progress_artifact", "update_progress_artifact", "create_link_artifact",
    "create_table_artifact",
)  # fmt: skip
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
# A third of the demo's rows, half of its clusters, and no search for the fallback gate.
SMALLER = (
    "data.demo_train_rows=24", "data.demo_test_rows=2", "cluster.k=3", "route.calibration_rows=0",
    "factorise.ranks=[16]", "resources.jobs=2",
)  # fmt: skip


def plain(output: Path, settings: list[str]) -> None:
    """Run the pipeline without Prefect and MLflow; print the time that importing them took (s)."""
    begin = time.perf_counter()
    import mlflow  # noqa: F401
    import prefect  # noqa: F401

    imports = time.perf_counter() - begin
    from flows.pipeline import run
    from tclora.config import load_config

    config = load_config(str(CONFIG), [*settings, f"output={output}"])
    with ThreadPoolExecutor(config.resources.jobs) as pool:
        _take_off(pool)
        run(config, "publish")
    print(json.dumps({"imports": imports}))


def _take_off(pool: ThreadPoolExecutor) -> None:
    """Let flows and tasks be their functions, and MLflow's part nothing."""
    from prefect import Flow, Task

    import flows.publish
    import tasks.prepare
    import tasks.tracking
    import tasks.training

    def call(made: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return made.fn(*args, **kwargs)

    def submit(made: Any, *args: Any, **kwargs: Any) -> "Future[Any]":  # noqa: ANN401
        return pool.submit(made.fn, *args, **kwargs)

    def collect(stage: str, futures: dict[str, "Future[Any]"], context: object) -> dict[str, Any]:
        return {name: future.result() for name, future in futures.items()}

    stand_ins: dict[str, Any] = {"collect": collect, "get_run_logger": logging.getLogger}
    stand_ins |= {name: MagicMock() for name in _ARTIFACTS}
    Flow.__call__ = Task.__call__ = call
    Task.submit = submit
    for module in [m for n, m in sys.modules.items() if n.partition(".")[0] in {"tasks", "flows"}]:
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                setattr(module, name, stand_in)
    tasks.training.current_key = tasks.prepare.current_key = lambda: "0" * 64
    tasks.tracking.open_run = lambda *_: tasks.tracking.Run(uri="", experiment_id="", run_id="")
    tasks.tracking.Run.client = property(lambda _: MagicMock())  # what is told of it is lost
    tasks.tracking.close_run = flows.publish.log_library = flows.publish.link = _nothing
    tasks.training.live_run = _unheard


def _nothing(*args: object) -> None:
    """Do nothing."""


@contextmanager
def _unheard(*args: object) -> Iterator[MagicMock]:
    yield MagicMock()


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Run a command; return its time (s) and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - begin, done.stdout


def measure(rounds: int, settings: list[str]) -> Iterator[dict[str, float]]:
    """Yield the times of a plain and of a full run, round by round."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        environment = {"PREFECT_HOME": str(place / "prefect"), "CUDA_VISIBLE_DEVICES": ""}
        given = [part for setting in settings for part in ("--set", setting)]
        full = [sys.executable, "-m", "tclora_cli", "run", str(CONFIG), *given, "--set"]
        timed([*full, f"output={place}/first", "--until", "prepare"], environment)
        for number in range(rounds):
            bare = [sys.executable, __file__, "--plain", str(place / f"plain{number}")]
            alone, told = timed([*bare, *given], environment)
            imports = json.loads(told.splitlines()[-1])["imports"]
            whole, _ = timed([*full, f"output={place}/full{number}"], environment)
            yield {
                "plain (s)": alone,
                "of it imports of both (s)": imports,
                "tclora run (s)": whole,
                "added (s)": whole - alone + imports,
                "added (%)": 100 * (whole - alone + imports) / (alone - imports),
            }


def main() -> None:
    """Measure and report, or be the plain run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", dest="settings", metavar="KEY=VALUE")
    given = parser.parse_args()
    settings = given.settings if given.settings is not None else list(SMALLER)
    if given.plain:
        plain(given.plain, settings)
        return
    from tables import report  # a script's neighbour

    report(
        "overhead",
        "What Prefect and MLflow add to a run",
        pd.DataFrame(measure(given.rounds, settings)),
        f"configs/demo.yaml with {', '.join(settings) or 'nothing changed'}, on {os.cpu_count()} "
        "cores. Plain: the same flows and stages, Prefect's decorators taken off and nothing "
        "logged to MLflow. Added: the difference; imports of both do not count to the plain run.",
    )


if __name__ == "__main__":
    main()
