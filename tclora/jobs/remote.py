"""A job on the machine of a worker: inputs fetched, the function run, outputs pushed."""

import logging
import shutil
from pathlib import Path

from tclora.errors import JobError
from tclora.jobs.call import Event, EventCallback
from tclora.jobs.devices import exclusive
from tclora.jobs.parcel import Delivery, Parcel, packed_result
from tclora.jobs.records import JobRecords, Telling
from tclora.jobs.run import LocalExecutor, job_name
from tclora.model.place import cache_dir, fetched_model
from tclora.registry import VARIABLE, plugin_modules
from tclora.store.cache import Cache
from tclora.store.trees import Tree

logger = logging.getLogger(__name__)


def local_executor(parcel: Parcel) -> LocalExecutor:
    """Return what runs a job here: beside as many others, with as many GPUs, as it says."""
    return LocalExecutor(parcel.beside, parcel.timeout, parcel.beside, gpus=parcel.gpus)


def perform(
    records: JobRecords,
    parcel: Parcel,
    attempt: str,
    on_event: EventCallback,
    executor: LocalExecutor,
) -> None:
    """Do a job here, unless it is done, and leave what it has made in the store.

    Parameters
    ----------
    records : JobRecords
        Of the job.
    parcel : Parcel
        The job.
    attempt : str
        Which attempt this is.
    on_event : callable
        Called with every progress event; the attempt tells of them in the store too.
    executor : LocalExecutor
        Runs it; see `local_executor`.

    Raises
    ------
    JobError
        If the function raises a domain error, or its process dies or exceeds its time; what it has
        left in its scratch folder stays for another attempt on this machine.
    StoreError
        If an input cannot be fetched.

    Notes
    -----
    Works in ``jobs/KEY`` of the cache folder, one attempt at a time.
    """
    home = cache_dir()
    workspace = home / "jobs" / records.key
    with Telling(records, attempt) as telling, exclusive(workspace.with_suffix(".lock")):

        def tell(event: Event) -> None:
            telling.add(event)
            on_event(event)

        if records.delivery() is not None:
            return
        cache = Cache(home / "objects", records.store)
        places = _lay_out(parcel, workspace, cache)
        name = job_name(parcel.function.partition(":")[2], parcel.arguments)
        result = executor.run_call(parcel.unpacked(places), name, tell)
        changed = _push_changes(parcel, places, records)
        packed = packed_result(result, places)
        telling.end()  # whoever finds the delivery then finds all that was told
        records.deliver(Delivery(attempt=attempt, result=packed, changed=changed))
        shutil.rmtree(workspace)


def accept(delivery: Delivery, records: JobRecords, paths: dict[int, Path]) -> None:
    """Put what a job has made at the paths it was to be at.

    Parameters
    ----------
    delivery : Delivery
        From the worker.
    records : JobRecords
        Of the job.
    paths : dict of int to Path
        Slot → path here.

    Raises
    ------
    StoreError
        If the store lacks something, or the disk is too small.
    """
    cache = Cache(cache_dir() / "objects", records.store)
    for slot, tree in delivery.changed.items():
        cache.place(tree, paths[slot])


def check_function(function: str) -> None:
    """Refuse functions of other packages than this project and its plugins, before any import.

    Raises
    ------
    JobError
        Naming the packages whose functions are run.
    """
    package = function.partition(":")[0].partition(".")[0]
    known = {"tclora", *(module.partition(".")[0] for module in plugin_modules())}
    if package not in known:
        raise JobError(
            f"a job's function must be of {', '.join(sorted(known))}, got {function!r}; name its "
            f"package in {VARIABLE} of the worker"
        )


def _lay_out(parcel: Parcel, workspace: Path, cache: Cache) -> dict[int, Path]:
    """Fetch inputs and models; what a former attempt left elsewhere in the workspace stays."""
    places = {}
    workspace.mkdir(parents=True, exist_ok=True)
    for number, slot in enumerate(parcel.slots):
        places[number] = workspace / str(number) / slot.name
        places[number].parent.mkdir(parents=True, exist_ok=True)
        if slot.given:
            cache.place(slot.given, places[number])
    for digest, tree in parcel.models.items():
        copy = fetched_model(digest)
        with exclusive(copy.with_suffix(".lock")):
            if Tree.of(copy) != tree:
                logger.info("fetching a model of %.2f GB", tree.size / 1e9)
                cache.place(tree, copy)
            copy.touch()  # used now, for `tclora gc`
    return places


def _push_changes(parcel: Parcel, places: dict[int, Path], records: JobRecords) -> dict[int, Tree]:
    changed = {}
    for number, slot in enumerate(parcel.slots):
        if slot.scratch:
            continue
        tree = records.store.push(places[number])
        if tree and tree != slot.given:
            changed[number] = tree
    return changed
