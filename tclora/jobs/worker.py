"""The process of one job: ``python -m tclora.jobs.worker FILE`` runs the job of a JSON file.

It prints one JSON event per line and ends with a result event. It dies with its parent (it watches
standard input), so a killed run leaves nothing behind that could write.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from tclora.adapter import Adapter, read_adapter
from tclora.errors import TcloraError
from tclora.jobs.run import EvaluateJob, Job, RankJob, RefineJob, ScaleJob, StatisticsJob, TrainJob
from tclora.model.tokens import Batch, TokenRow, batches, encode_frame
from tclora.registry import load_plugins

_events = sys.stdout


def _keep_events_apart() -> None:
    """Leave standard output to events alone; what libraries print goes to standard error."""
    global _events
    _events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def _emit(event: Mapping[str, Any]) -> None:
    _events.write(json.dumps(event) + "\n")
    _events.flush()


def _die_with_parent() -> None:
    """End this process as soon as the parent closes its end of standard input."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train(job: TrainJob) -> dict[str, Any]:
    from tclora.train import train_adapter

    model, tokenizer = _base(job)
    result = train_adapter(
        model,
        _encoded(job, job.rows, tokenizer),
        job.train,
        job.target,
        base_model=job.base.location,
        seed=job.seed,
        init_seed=job.init_seed,
        checkpoint=job.checkpoint,
        on_step=_emit,
    )
    return asdict(result)


def _base(job: Job) -> tuple[Any, Any]:
    """Load the base model and its tokenizer."""
    from tclora.model.locate import choose_dtype, default_device, load_base_model, load_tokenizer

    device = default_device()
    model = load_base_model(job.base.location, choose_dtype(job.base.dtype, device), device)
    return model, load_tokenizer(job.base.location)


def _encoded(
    job: Job,
    rows: Path,
    tokenizer: Any,  # noqa: ANN401
    some: slice = slice(None),
) -> list[TokenRow]:
    """Return the rows of a file, or some of them, as tokens."""
    frame = pd.read_parquet(rows, columns=["prompt", "response"])[some]
    return encode_frame(
        tokenizer, frame, template=job.base.template, max_tokens=job.base.max_tokens
    )


def _statistics(job: StatisticsJob) -> dict[str, Any]:
    from tclora.activations import collect

    model, tokenizer = _base(job)
    tokens: dict[str, int] = {}
    for name, rows in job.rows.items():
        statistics = collect(
            model,
            _encoded(job, rows, tokenizer, slice(job.count)),
            name,
            job.modules,
            pad_id=tokenizer.pad_token_id,
            token_budget=job.token_budget,
        )
        statistics.save(job.target / f"{name}.safetensors")
        tokens |= statistics.tokens
    return {"tokens": tokens}


def _tune_scale(job: ScaleJob) -> dict[str, Any]:
    from tclora.files import write_json
    from tclora.tensor import LibraryFactors
    from tclora.tune.scale import tune_scale

    model, tokenizer = _base(job)
    found = tune_scale(
        model,
        _adapters(job),
        job.method,
        _together(_batches(job, tokenizer, slice(job.count))),
        job.scales,
        progress=lambda scale, loss: _emit({"scale": scale, "loss": loss}),
        factors=LibraryFactors.load(job.factors) if job.factors else None,
        statistics=_activations(job),
        rank=job.rank,
        seed=job.seed,
    )
    write_json(job.target, asdict(found))
    return asdict(found)


def _refine(job: RefineJob) -> dict[str, Any]:
    from tclora.adapter import write_adapter
    from tclora.tune.components import calibrate_components

    model, tokenizer = _base(job)
    found = calibrate_components(
        model,
        read_adapter(job.adapter),
        _together(_batches(job, tokenizer, slice(job.count))),
        n_steps=job.steps,
        progress=lambda step, loss: _emit({"step": step, "loss": loss}),
    )
    write_adapter(found.adapter, job.target)
    return {"losses": found.losses}


def _find_rank(job: RankJob) -> dict[str, Any]:
    from tclora.files import write_json
    from tclora.tune.rank import RoutedRecovery, find_rank

    model, tokenizer = _base(job)
    adapters = _adapters(job)
    recovery = RoutedRecovery(
        model,
        adapters,
        _batches(job, tokenizer, slice(-job.count, None)),
        method=job.method,
        statistics=_activations(job),
        n_starts=job.factorise.n_starts,
        n_iter=job.factorise.n_iter,
        seed=job.seed,
    )

    def measure(rank: int) -> float:
        found = recovery(rank)
        _emit({"rank": rank, "recovery": found})
        return found

    outcome = asdict(find_rank(measure, adapters, job.recovery))
    write_json(job.target, outcome)
    return outcome


def _adapters(job: ScaleJob | RankJob) -> list[Adapter]:
    """Read the clusters' adapters into memory: they are merged more than once."""
    opened = [read_adapter(path, name) for name, path in job.adapters.items()]
    return [Adapter(a.name, dict(a.modules), a.base_model) for a in opened]


def _activations(job: ScaleJob | RankJob) -> Any:  # noqa: ANN401
    from tclora.activations import ActivationStatistics

    return ActivationStatistics.load(*job.statistics) if job.statistics else None


def _together(batches_of: Mapping[str, list[Batch]]) -> list[Batch]:
    return [batch for part in batches_of.values() for batch in part]


def _batches(
    job: ScaleJob | RefineJob | RankJob,
    tokenizer: Any,  # noqa: ANN401
    some: slice,
) -> dict[str, list[Batch]]:
    """Return some rows of every cluster as batches."""
    return {
        name: list(
            batches(
                _encoded(job, rows, tokenizer, some),
                pad_id=tokenizer.pad_token_id,
                token_budget=job.token_budget,
            )
        )
        for name, rows in job.rows.items()
    }


def _evaluate(job: EvaluateJob) -> dict[str, Any]:
    from tclora.evaluate.measure import evaluate_frame
    from tclora.files import atomic_path

    model, tokenizer = _base(job)
    frame = pd.read_parquet(job.rows)
    context: Any = {}
    if job.routed and job.routing:
        model, context["context"] = _route(model, job.routed, job.routing)
    parts = []
    for key, rows in _adapter_groups(frame, job.adapters):
        model = _activate(model, key, job.adapters.get(key))
        measured = evaluate_frame(
            model,
            tokenizer,
            rows,
            template=job.base.template,
            max_tokens=job.base.max_tokens,
            token_budget=job.evaluate.token_budget,
            max_new_tokens=job.evaluate.max_new_tokens if job.evaluate.generate else None,
            **context,
        )
        labels = rows[["split", "task", "cluster", "prompt", "answer"]].reset_index(drop=True)
        parts.append(pd.concat([measured, labels], axis=1))
        _emit({"rows": sum(map(len, parts)), "of": len(frame)})
    items = pd.concat(parts, ignore_index=True).assign(method=job.name)
    with atomic_path(job.target) as fresh:
        items.to_parquet(fresh)
    if job.harness_target:
        harness = _run_harness(job, model, tokenizer).assign(method=job.name)
        with atomic_path(job.harness_target) as fresh:
            harness.to_parquet(fresh)
    return {"rows": len(items)}


def _route(model: Any, folder: Path, routing: Path) -> tuple[Any, Any]:  # noqa: ANN401
    """Return the model with a routed library's adapter, and the context that gates given rows."""
    from peft import PeftModel

    from tclora.route import Gating, read_library, routing_from_table

    library = read_library(folder)
    model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()
    gating = Gating(model, library.gated)
    routed = routing_from_table(pd.read_parquet(routing), library.gated.names)
    return model, lambda rows: routed.take(rows).context(gating)


def _run_harness(job: EvaluateJob, model: Any, tokenizer: Any) -> pd.DataFrame:  # noqa: ANN401
    from tclora.evaluate.lm_eval import run_harness

    return run_harness(
        model,
        tokenizer,
        job.evaluate.harness,
        limit=job.evaluate.harness_limit,
        allow_code_execution=job.evaluate.allow_code_execution,
    )


def _adapter_groups(
    frame: pd.DataFrame, adapters: Mapping[str, Path]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the key of an adapter and the rows it answers for."""
    if not adapters or "all" in adapters:
        yield "all", frame
        return
    for cluster, rows in frame.groupby("cluster", sort=True):
        if str(cluster) in adapters:
            yield str(cluster), rows


def _activate(model: Any, key: str, path: Path | None) -> Any:  # noqa: ANN401
    """Return the model with one adapter active, as stock PEFT loads it, or as it is."""
    from peft import PeftModel

    if path is None:
        return model
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, path, key, autocast_adapter_dtype=False).eval()
    previous = model.active_adapter
    model.load_adapter(path, key, autocast_adapter_dtype=False)
    model.set_adapter(key)
    model.delete_adapter(previous)
    return model.eval()


def main(path: str) -> None:
    """Run the job described by a JSON file; for ``python -m tclora.jobs.worker``."""
    _die_with_parent()
    _keep_events_apart()
    job: Any = TypeAdapter(Job).validate_json(Path(path).read_text())
    run: dict[str, Callable[[Any], dict[str, Any]]] = {
        "train": _train,
        "evaluate": _evaluate,
        "statistics": _statistics,
        "scale": _tune_scale,
        "refine": _refine,
        "rank": _find_rank,
    }
    try:
        load_plugins()
        result = run[job.kind](job)
    except (TcloraError, OSError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    _emit({"result": result})


if __name__ == "__main__":
    main(sys.argv[1])
