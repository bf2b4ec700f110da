"""What a store holds of a job: its parcel, what its attempts tell while they work, its delivery.

::

    jobs/KEY/parcel.json                  written before the job is sent
    jobs/KEY/begun/ATTEMPT                by an attempt that must not be made twice
    jobs/KEY/told/ATTEMPT/000001.json     events, in parts; a part without events is a heartbeat
    jobs/KEY/delivery.json                written last, when all files are in the store

The key of a job names what it is: whoever asks for the same again finds what is under way or done.
"""

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tclora.errors import StoreError
from tclora.jobs.call import Event
from tclora.jobs.parcel import Delivery, Parcel
from tclora.jobs.repeating import Repeating
from tclora.store.objects import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobRecords:
    """The records of one job.

    Attributes
    ----------
    store : Store
        Where they are.
    key : str
        Of the job.
    """

    store: Store
    key: str

    def send(self, parcel: Parcel) -> None:
        """Leave a job for a worker."""
        self.store.write(self._name("parcel.json"), parcel.model_dump_json().encode())

    def parcel(self) -> Parcel:
        """Return the job.

        Raises
        ------
        StoreError
            If there is none: it was forgotten, or belongs to another store.
        """
        found = self.store.read(self._name("parcel.json"))
        if found is None:
            raise StoreError(
                f"store {self.store.url} must hold job {self.key[:12]}, but does not; start the "
                "run that wanted it again"
            )
        return Parcel.model_validate_json(found)

    def begin(self, attempt: str) -> bool:
        """Say that an attempt has begun; return whether it had not before."""
        name = self._name(f"begun/{attempt}")
        new = self.store.read(name) is None
        self.store.write(name, b"")
        return new

    def deliver(self, delivery: Delivery) -> None:
        """Say that a job is done; all its files are in the store."""
        self.store.write(self._name("delivery.json"), delivery.model_dump_json().encode())

    def delivery(self) -> Delivery | None:
        """Return what a job has made; None while it is not done."""
        found = self.store.read(self._name("delivery.json"))
        return None if found is None else Delivery.model_validate_json(found)

    def tell(self, attempt: str, part: int, events: list[Mapping[str, Any]]) -> None:
        """Leave events for whoever waits for the job."""
        self.store.write(self._told(attempt, part), json.dumps(events).encode())

    def told(self, attempt: str, part: int) -> list[Event] | None:
        """Return a part of what an attempt told; None if it is not there yet."""
        found = self.store.read(self._told(attempt, part))
        return None if found is None else list(json.loads(found))

    def is_sent(self) -> bool:
        """Return whether the job is in the store."""
        return self.store.read(self._name("parcel.json")) is not None

    def lost_after(self) -> float | None:
        """Return after what silence (s) its sender takes a worker for lost; None if it is gone."""
        found = self.store.read(self._name("parcel.json"))
        return None if found is None else Parcel.model_validate_json(found).lost_after

    def parts(self, attempt: str, known: int = 0) -> int:
        """Return how many parts an attempt has told, of which so many are known.

        Parts have no gaps: a few reads find the last of many.
        """
        step = 1
        while self._is_told(attempt, known + step - 1):
            known, step = known + step, 2 * step
        while step > 1:
            step //= 2
            if self._is_told(attempt, known + step - 1):
                known += step
        return known

    def _is_told(self, attempt: str, part: int) -> bool:
        return self.store.read(self._told(attempt, part)) is not None

    def digests(self) -> set[str]:
        """Return the digests of all objects that the records name."""
        parcel, delivery = self.store.read(self._name("parcel.json")), self.delivery()
        sent = Parcel.model_validate_json(parcel) if parcel else None
        trees = [*delivery.changed.values()] if delivery else []
        if sent:
            trees += [*sent.models.values(), *(slot.given for slot in sent.slots if slot.given)]
        return {blob.digest for tree in trees for blob in tree.below(Path()).values()}

    def forget(self) -> None:
        """Remove all records; objects stay, for other jobs that need them."""
        self.store.remove(self._name(""))

    def _told(self, attempt: str, part: int) -> str:
        return self._name(f"told/{attempt}/{part:06d}.json")

    def _name(self, name: str) -> str:
        return f"jobs/{self.key}/{name}".rstrip("/")


class Telling(Repeating):
    """Leaves events of an attempt in the store while it works, at most one record in a while.

    Parameters
    ----------
    records : JobRecords
        Of the job.
    attempt : str
        Which attempt.
    pause : float
        Time between two records (s); one without events says that the attempt is alive.
    """

    def __init__(self, records: JobRecords, attempt: str, pause: float = 5.0) -> None:
        super().__init__(self._tell, pause)
        self._records, self._attempt = records, attempt
        self._waiting: list[Mapping[str, Any]] = []
        self._part = records.parts(attempt)  # more than 0 where a flow run is executed again
        self._lock = threading.Lock()

    def add(self, event: Event) -> None:
        """Take an event."""
        with self._lock:
            self._waiting.append(dict(event))

    def _tell(self) -> None:
        with self._lock:
            events, self._waiting = self._waiting, []
        try:
            self._records.tell(self._attempt, self._part, events)
        except Exception as error:  # the job is worth more than its curve
            logger.warning("the store did not take %d events: %s", len(events), error)
            with self._lock:
                self._waiting[:0] = events
        else:
            self._part += 1
