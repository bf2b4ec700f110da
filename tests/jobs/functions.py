"""Functions for jobs of the tests; another process imports them by name."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tclora.errors import NonFiniteLossError
from tclora.model.place import ModelPlace


class Point(BaseModel):
    x: int
    y: float


@dataclass(frozen=True)
class Description:
    total: Mapping[str, float]
    length: int
    path: Path
    pid: int | None = None


def describe(
    *, name: str, points: dict[str, Point], file: Path, on_event: Any = lambda _: None
) -> Description:
    for step in range(2):
        on_event({"step": step})
    total = {key: point.x + point.y for key, point in points.items()}
    return Description(total, len(file.read_text()) + len(name), file)


def own_pid() -> int:
    return os.getpid()


def parent_pid() -> int:
    return os.getppid()


def folder() -> Path:
    return Path.cwd()


def chatty(*, text: str) -> int:
    print(text, flush=True)  # noqa: T201
    return 3


def variable(*, name: str) -> str:
    return os.environ[name]


def fail(*, name: str) -> None:
    raise NonFiniteLossError("loss became nan at step 0")


def divide(*, by: int) -> float:
    return 1 / by


def endless(*, on_event: Any = lambda _: None) -> None:
    on_event({"pid": os.getpid()})
    time.sleep(600)


class Files(BaseModel):
    rows: Path
    target: Path
    checkpoint: Path


@dataclass(frozen=True)
class Copied:
    target: Path
    bytes: int


def copy_rows(*, files: Files, log: Path, on_event: Any = lambda _: None) -> Copied:
    on_event({"step": 1})
    text = (files.rows / "a.txt").read_text()
    (files.target / "sub").mkdir(parents=True)
    (files.target / "sub" / "a.txt").write_text(text)
    files.checkpoint.mkdir()
    (files.checkpoint / "state").write_text("under way")
    log.write_text("done")
    return Copied(files.target, len(text))


def append(*, file: Path, text: str) -> None:
    former = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    file.write_text(former + text)


def twice(*, checkpoint: Path, target: Path) -> None:
    if not checkpoint.exists():
        checkpoint.write_text("half of it")
        raise NonFiniteLossError("first attempt")
    target.write_text(f"{checkpoint.read_text()}, the rest")


def read_model(*, model: ModelPlace) -> tuple[str, str]:
    return model.location, (Path(model.here) / "config.json").read_text()


def slow(*, target: Path, seconds: float, on_event: Any = lambda _: None) -> int:
    on_event({"pid": os.getpid()})
    time.sleep(seconds)
    target.write_text("late")
    return os.getpid()


def hang_once(*, checkpoint: Path, target: Path, on_event: Any = lambda _: None) -> str:
    on_event({"pid": os.getpid(), "again": checkpoint.exists()})
    if not checkpoint.exists():
        checkpoint.write_text("half of it")
        time.sleep(600)
    target.write_text(f"{checkpoint.read_text()}, the rest")
    return target.read_text()
