"""What the executor of jobs elsewhere asks of those that make the attempts, and is told."""

from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from tclora.errors import ConfigError
from tclora.jobs.call import EventCallback
from tclora.jobs.records import JobRecords


class Fate(StrEnum):
    """How an attempt has ended."""

    DONE = "done"
    LOST = "lost"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True)
class Ending:
    """The end of an attempt, and what was said of it."""

    fate: Fate
    message: str = ""


@dataclass(frozen=True)
class Sign:
    """What is known of an attempt that goes on.

    Attributes
    ----------
    news : hashable
        Differs from what it was if anything has happened.
    patience : float
        How often `lost_after` it may go without news; without end while it waits for a worker.
    """

    news: Hashable = None
    patience: float = float("inf")


class Attempt(Protocol):
    """One attempt at a job.

    Attributes
    ----------
    name : str
        Under which it tells of itself in the job's records.
    """

    @property
    def name(self) -> str:
        """Under which it tells of itself."""

    def look(self, heard: int) -> Ending | Sign:
        """Say how it stands, of which so many parts were heard."""

    def cancel(self) -> None:
        """End it."""

    def give_up(self, message: str) -> None:
        """Say that its worker is lost."""


class Fleet(Protocol):
    """Where attempts are made.

    Attributes
    ----------
    name : str
        What messages call it.
    """

    @property
    def name(self) -> str:
        """What messages call it."""

    def attempt(self, job: "SentJob") -> AbstractContextManager[Attempt]:
        """Start an attempt at a job, or find the one that is under way."""


class SentJob:
    """A job that is waited for, and how much of what its attempts tell was heard."""

    def __init__(
        self, name: str, records: JobRecords, on_event: EventCallback, gpus: int = 1
    ) -> None:
        self.name = name
        self.gpus = gpus  # that it has, where there are any
        self.records = records
        self._on_event = on_event
        self._parts: dict[str, int] = {}

    def heard(self, attempt: str) -> int:
        """Return how many parts an attempt has told."""
        return self._parts.get(attempt, 0)

    def listen(self, attempt: str) -> None:
        """Pass on what an attempt has told since the last time."""
        while (events := self.records.told(attempt, self.heard(attempt))) is not None:
            self._parts[attempt] = self.heard(attempt) + 1
            for event in events:
                self._on_event(event)


def gpus_asked(asked: int | str, largest: int, most: int, where: str) -> int:
    """Return whether jobs of a cluster ask for their GPUs, 1 or 0.

    Parameters
    ----------
    asked : int or "auto"
        `execution.gpus_per_job`; "auto": if there are any.
    largest : int
        GPUs of the largest machine of the cluster.
    most : int
        GPUs of the largest job.
    where : str
        What such a machine is called.

    Raises
    ------
    ConfigError
        If the largest job can run nowhere, and no autoscaler is waited for.
    """
    if asked != "auto":
        return int(asked)
    if 0 < largest < most:
        raise ConfigError(
            f"train.data_parallel must be at most the GPUs of {where}, got {most}, the largest "
            f"has {largest}; lower it, or set execution.gpus_per_job=1 to wait for a larger one"
        )
    return min(1, largest)
