"""One adapter per cluster, and one on all rows."""

from collections.abc import Mapping

from prefect import get_run_logger

from flows.context import Context, Prepared, Trained
from flows.parallel import collect, parallel_flow
from tasks.training import train as train_stage
from tclora.config import AdapterConfig
from tclora.library.names import JOINT
from tclora.model.locate import choose_dtype, default_device
from tclora.preflight.rates import measured_rates
from tclora.preflight.sizes import base_size
from tclora.preflight.training import TrainingPlan, Workload, plan_training, training_slots
from tclora.preflight.training_cost import Lengths
from tclora.train.engines import engines


def _slots(context: Context) -> int:
    config = context.config
    return training_slots(config.resources.jobs, context.where.executor.slots, config.train)


@parallel_flow("train-library", _slots)
def train(context: Context, prepared: Prepared) -> Trained:
    """Train the joint adapter and one per cluster, as the engine divides them among jobs."""
    cfg = context.config
    joint = {JOINT: prepared.joint_rows} if prepared.joint_rows else {}
    rows = {**joint, **prepared.rows}
    apart = cfg.train.init == "independent"
    seeds = {name: cfg.of_training + number * apart for number, name in enumerate(sorted(rows))}
    sizes = {name: int(part.info["rows"]) for name, part in rows.items()}
    planned = _plan(context, prepared, sizes) if cfg.execution.workers_here else None
    engine = planned.engine if planned else cfg.train.engine
    slots = _slots(context)
    groups = engines[engine].divide(sizes, slots)
    where = context.where.shared_by(min(len(groups), slots))
    futures = {
        (job := "+".join(names)): train_stage.submit(
            job,
            {name: rows[name] for name in names},
            {name: seeds[name] for name in names},
            engine,
            cfg.train.only(AdapterConfig),
            context.base,
            cfg.of_training,
            where,
        )
        for names in groups
    }
    done = [part for group in collect("train", futures, context).values() for part in group.items()]
    adapters = dict(sorted(done, key=lambda item: list(rows).index(item[0])))
    joint_adapter = adapters.pop(JOINT, None)
    return Trained(adapters, joint_adapter, planned.adapters if planned else {})


def _plan(context: Context, prepared: Prepared, sizes: Mapping[str, int]) -> TrainingPlan:
    """Plan the jobs for this machine; an engine `auto` is chosen for it."""
    train, tokens = context.config.train, prepared.examples.metrics
    prompt, response = tokens["prompt_tokens_mean"], tokens["response_tokens_mean"]
    dtype = choose_dtype(train.dtype, default_device())
    work = Workload(
        sizes,
        base_size(context.base.location, train),
        train.only(AdapterConfig),
        Lengths(prompt + response, response),
        slots=_slots(context),
        itemsize=dtype.itemsize,
    )
    planned = plan_training(train.engine, work, measured_rates(dtype, seconds=0.1))
    if planned.reason:
        get_run_logger().info("%s", planned.reason)
    return planned
