"""One adapter per cluster, and one on all rows."""

from collections.abc import Mapping

from prefect import get_run_logger

from flows.context import Context, Prepared, Trained
from flows.parallel import collect, parallel_flow
from tasks.training import train as train_stage
from tclora.config import AdapterConfig
from tclora.library.names import JOINT
from tclora.model.locate import choose_dtype, default_device
from tclora.preflight.sizes import base_size
from tclora.preflight.training import Lengths, plan_training
from tclora.train.engines import engines


@parallel_flow("train-library")
def train(context: Context, prepared: Prepared) -> Trained:
    """Train the joint adapter and one per cluster, as the engine divides them among jobs."""
    cfg = context.config
    joint = {JOINT: prepared.joint_rows} if prepared.joint_rows else {}
    rows = {**joint, **prepared.rows}
    apart = cfg.train.init == "independent"
    seeds = {name: cfg.of_training + number * apart for number, name in enumerate(sorted(rows))}
    sizes = {name: int(part.info["rows"]) for name, part in rows.items()}
    engine = _engine(context, prepared, sizes)
    groups = engines[engine].divide(sizes, context.where.executor.slots)
    where = context.where.shared_by(len(groups))
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
    return Trained(joint=adapters.pop(JOINT, None), adapters=adapters)


def _engine(context: Context, prepared: Prepared, sizes: Mapping[str, int]) -> str:
    """Return the configured engine, or what `auto` is for these adapters on this machine."""
    train = context.config.train
    if train.engine != "auto":
        return train.engine
    tokens = prepared.examples.metrics
    planned = plan_training(
        "auto",
        sizes,
        base_size(context.base.location, train),
        train.only(AdapterConfig),
        Lengths(tokens["prompt_tokens_mean"] + tokens["response_tokens_mean"],
                tokens["response_tokens_mean"]),
        slots=context.where.executor.slots,
        itemsize=choose_dtype(train.dtype, default_device()).itemsize,
    )  # fmt: skip
    get_run_logger().info("%s", planned.reason)
    return planned.engine
