"""The stage that trains adapters, in a job of its own."""

from contextlib import ExitStack

from prefect import get_run_logger

from tasks.artifact import Artifact, Artifacts
from tasks.keys import current_key, stage
from tasks.live_runs import live_run
from tasks.where import Where
from tclora.config import AdapterConfig
from tclora.files import write_json
from tclora.jobs.call import Event
from tclora.jobs.usage import Sample
from tclora.model.base import Base
from tclora.train.course import total_steps
from tclora.train.engines import AdapterRequest, train_adapters
from tclora.train.records import TrainingResult

PARENT = "mlflow_parent"  # the run that trained an adapter, in its artifact's info


@stage("train", "train-{name}")
def train(
    name: str,
    rows: Artifacts,
    init_seeds: dict[str, int],
    engine: str,
    config: AdapterConfig,
    base: Base,
    seed: int,
    where: Where,
) -> Artifacts:
    """Train the adapters of one job; progress goes to the log and to nested MLflow runs.

    `rows` are those of each adapter, as `divide` wrote them; `name` is the job's.
    """
    layout, key = where.layout, current_key()
    requests = [
        AdapterRequest(
            name=adapter,
            rows=part.paths[1],
            target=layout.adapter(adapter),
            # Named by all that determines it, so a resume never mixes two configurations.
            checkpoint=layout.checkpoint(f"{adapter}-{key[:16]}"),
            seed=seed,
            init_seed=init_seeds[adapter],
        )
        for adapter, part in rows.items()
    ]
    total = {adapter: total_steps(part.info["rows"], config) for adapter, part in rows.items()}
    with ExitStack() as stack:
        tags = {"tclora.kind": "train"}
        live = {a: stack.enter_context(live_run(where.run, a, tags)) for a in rows}

        def on_event(event: Event) -> None:
            record = dict(event)
            adapter = record.pop("name")
            live[adapter].add(record)
            note = f"loss {record['loss']:.3f}, {record['tokens_per_s']:.0f} tokens/s"
            where.progress.update(adapter, int(record["step"]) + 1, total[adapter], note)

        def on_sample(_: str, sample: Sample) -> None:
            for logger in live.values():
                logger.add_sample(sample)

        executor = where.executor.with_gpus(config.data_parallel).watched_by(on_sample)
        results = executor.run_isolated(
            train_adapters,
            engine=engine,
            base=base,
            requests=requests,
            config=config,
            checkpoint_steps=where.checkpoint_steps,
            on_event=on_event,
        )
    return {a: _trained(a, results[a], rows[a].info["rows"], where) for a in rows}


def _trained(adapter: str, result: TrainingResult, rows: int, where: Where) -> Artifact:
    layout = where.layout
    write_json(layout.training(adapter), [dict(record) for record in result.history])
    get_run_logger().info("%s: loss %.3f after %d steps", adapter, result.final_loss, result.steps)
    figures = {
        "steps": result.steps,
        "supervised_tokens": result.supervised_tokens,
        "final_loss": result.final_loss,
        "seconds": result.seconds,
    }
    if result.validation_nll is not None:
        figures["validation_nll"] = result.validation_nll
    return Artifact.of(
        layout.root,
        layout.adapter(adapter),
        layout.training(adapter),
        metrics={f"train/{name}": float(value) for name, value in figures.items()},
        info={**figures, "rows": rows, PARENT: where.run.run_id},
    )
