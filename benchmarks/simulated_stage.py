"""The stage that sends a job which sleeps; apart from the job, which needs no Prefect."""

from simulated import work  # a script's neighbour

from tasks.artifact import Artifact
from tasks.keys import stage
from tasks.where import Where


@stage("simulate", "simulate-{name}")
def simulate(name: str, seconds: float, megabytes: int, where: Where) -> Artifact:
    """Run one job elsewhere."""
    target = where.layout.root / name
    done = where.executor.run_isolated(
        work, name=name, seconds=seconds, megabytes=megabytes, target=target
    )
    info = {"begin": done.begin, "end": done.end}
    return Artifact.of(where.layout.root, target, info=info)
