"""One adapter per cluster, and one on all rows."""

from flows.context import Context, Prepared, Trained
from flows.parallel import collect, parallel_flow
from tasks.training import train as train_stage
from tclora.config import AdapterConfig
from tclora.library.names import JOINT
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
    groups = engines[cfg.train.engine].divide(sizes, context.where.executor.slots)
    where = context.where.shared_by(len(groups))
    futures = {
        (job := "+".join(names)): train_stage.submit(
            job,
            {name: rows[name] for name in names},
            {name: seeds[name] for name in names},
            cfg.train.engine,
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
