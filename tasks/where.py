"""Where the stages of a run work: the library's staging area, the executor, what is told of it."""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

from tasks.progress import JobProgress
from tclora.jobs.run import Executor
from tclora.library.layout import Layout

if TYPE_CHECKING:
    from tasks.shared import Shared
    from tasks.tracking import Run  # a job's worker knows stages, but no MLflow


class Where:
    """Says where and how, not what: no part of it counts in a stage's key, but for the folder.

    Parameters
    ----------
    layout : Layout
        The staging area.
    run : Run
        The MLflow run to log to.
    executor : Executor
        Where jobs run.
    progress : JobProgress
        Shows how far jobs are.
    checkpoint_steps : int
        Optimiser steps between the checkpoints of a training.
    shared : sequence of Shared, optional
        Where stages leave what they have made for other runs; see `tasks.shared`.
    """

    def __init__(
        self,
        layout: Layout,
        run: "Run",
        executor: Executor,
        progress: JobProgress,
        checkpoint_steps: int = 20,
        shared: Sequence["Shared"] = (),
    ) -> None:
        self.layout = layout
        self.run = run
        self.executor = executor
        self.progress = progress
        self.checkpoint_steps = checkpoint_steps
        self.shared = tuple(shared)

    def shared_by(self, jobs: int) -> "Where":
        """Return the same for one of so many jobs that run beside each other."""
        shared = copy(self)
        shared.executor = self.executor.shared_by(jobs)
        return shared
