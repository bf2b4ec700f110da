"""What a run names: whether methods, variants and benchmarks exist and have what they need."""

import importlib.util
from collections.abc import Sequence

from tclora.cluster.registry import clusterers
from tclora.config import Config
from tclora.errors import ConfigError
from tclora.evaluate.lm_eval import executes_code
from tclora.evaluate.lm_eval_tasks import check_lm_eval
from tclora.merge import methods
from tclora.registry import closest
from tclora.route.router import routers
from tclora.train.engines import engines


def method_problems(config: Config) -> list[str]:
    """Find unknown merge methods and settings that a method cannot work with."""
    known = [info.name for info in methods()]
    unknown = [name for name in config.merge.methods if name not in known]
    problems = [
        f"merge.methods: a method must be a registered name, got {name!r}; {closest(name, known)}"
        for name in unknown
    ]
    needing = {info.name for info in methods() if info.needs == "statistics"}
    uninformed = [name for name in config.merge.methods if name in needing]
    if uninformed and not config.merge.sample_rows:
        problems.append(
            f"merge.sample_rows must be above 0 for {', '.join(uninformed)}, which need "
            "activation statistics, got 0"
        )
    ranked = {info.name for info in methods() if info.needs}
    if config.factorise.target_recovery is not None and config.merge.primary not in ranked:
        problems.append(
            f"factorise.target_recovery needs a merge.primary whose rank is the CP rank, of "
            f"{sorted(ranked)}, got {config.merge.primary!r}"
        )
    return problems


def variant_problems(config: Config) -> list[str]:
    """Find routers, clusterers and engines that do not exist, or that the settings do not suit."""
    method, problems = config.cluster.method, []
    if method in clusterers:
        problems += clusterers[method].check(config.cluster)
    else:
        problems.append(f"cluster.method: {clusterers.unknown(method)}")
    if config.route.router not in routers:
        problems.append(f"route.router: {routers.unknown(config.route.router)}")
    if config.train.engine not in {"auto", *engines}:
        problems.append(f"train.engine: {engines.unknown(config.train.engine)}")
    return problems


def lm_eval_problems(config: Config) -> list[str]:
    """Find lm-eval tasks that cannot run here or may not."""
    if not config.evaluate.lm_eval:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        problems = ["evaluate.lm_eval needs lm-eval: pip install tclora[lm-eval]"]
    else:
        problems = _unknown_tasks(config.evaluate.lm_eval)
    executing = [task for task in config.evaluate.lm_eval if executes_code(task)]
    if executing and not config.evaluate.allow_code_execution:
        problems.append(
            f"evaluate.lm_eval: {', '.join(executing)} run code written by the model; "
            "set evaluate.allow_code_execution: true to let them"
        )
    return problems


def _unknown_tasks(names: Sequence[str]) -> list[str]:
    """Find the tasks that lm-eval does not know, or that cannot be measured."""
    problems = []
    for name in names:
        try:
            check_lm_eval([name])
        except ConfigError as error:
            problems.append(f"evaluate.lm_eval: {error}")
    return problems
