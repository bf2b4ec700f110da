"""Where the stages of a run work: the library's staging area, the executor, what is told of it."""

from tasks.progress import JobProgress
from tasks.tracking import Run
from tclora.jobs.run import Executor
from tclora.library.layout import Layout


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
    """

    def __init__(self, layout: Layout, run: Run, executor: Executor, progress: JobProgress) -> None:
        self.layout = layout
        self.run = run
        self.executor = executor
        self.progress = progress

    def shared_by(self, jobs: int) -> "Where":
        """Return the same for one of so many jobs that run beside each other."""
        return Where(self.layout, self.run, self.executor.shared_by(jobs), self.progress)
