"""What is measured: a base model with adapters, or with a routed library, opened once for all rows.

A subject measures canonical rows; where it is one model for all prompts, or knows from a prompt how
to be computed, lm-eval can be given it too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import pandas as pd
from peft import PeftModel

from tclora.config import LmEvalConfig, MeasureConfig
from tclora.errors import ConfigError
from tclora.evaluate.context import RowContext, plain
from tclora.evaluate.lm_eval import LmEvalResult, run_lm_eval
from tclora.evaluate.measure import evaluate_frame
from tclora.jobs.call import EventCallback
from tclora.model.base import LoadedBase
from tclora.route import Gating, read_library
from tclora.route.routing import Routing

ALL = "all"  # the key of an adapter that answers for every row
_KEPT = 16  # adapters held in memory
Route = Callable[[pd.DataFrame], Routing]


class Subject(Protocol):
    """Something to measure."""

    def measure(
        self, rows: pd.DataFrame, config: MeasureConfig, on_event: EventCallback = ...
    ) -> pd.DataFrame:
        """Measure rows; see `tclora.evaluate.measure.evaluate_frame`.

        The result has the rows' order and index, without those that no adapter answers for.
        """

    def run_lm_eval(
        self, config: LmEvalConfig, token_budget: int, few_shot: int | None = None
    ) -> LmEvalResult:
        """Run lm-eval's tasks; ConfigError where the subject is no model lm-eval could be given."""


class Adapted:
    """A base model with adapters, one for all rows or one per cluster, or with none.

    Parameters
    ----------
    loaded : LoadedBase
        The base model, without adapters.
    adapters : mapping
        PEFT directories: one for `ALL` rows, or one per cluster's number, or none.
    """

    def __init__(self, loaded: LoadedBase, adapters: Mapping[str, Path]) -> None:
        self._loaded = loaded
        self._adapters = adapters
        self._model: Any = loaded.model
        self._held: list[str] = []

    def measure(
        self,
        rows: pd.DataFrame,
        config: MeasureConfig,
        on_event: EventCallback = lambda _: None,
    ) -> pd.DataFrame:
        """Measure rows, each by its adapter."""
        numbered, parts, done = rows.reset_index(drop=True), [], 0
        for key, group in self._groups(numbered):
            part = _measured(self._loaded._replace(model=self._active(key)), group, config)
            parts.append(part.set_axis(group.index))
            done += len(group)
            on_event({"rows": done, "of": len(rows)})
        measured = pd.concat(parts).sort_index()
        return measured.set_axis(rows.index[measured.index])

    def run_lm_eval(
        self, config: LmEvalConfig, token_budget: int, few_shot: int | None = None
    ) -> LmEvalResult:
        """Run lm-eval's tasks."""
        if not set(self._adapters) <= {ALL}:
            raise ConfigError(
                "lm-eval's tasks need one model for all prompts, not an adapter per cluster; "
                "leave the method out for them"
            )
        loaded = self._loaded._replace(model=self._active(ALL))
        return _run_lm_eval(loaded, config, token_budget, few_shot)

    def close(self) -> None:
        """Take the adapters off the base model."""
        if isinstance(self._model, PeftModel):
            self._model.unload()

    def _groups(self, rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield the key of an adapter and the rows it answers for."""
        if not self._adapters or ALL in self._adapters:
            yield ALL, rows
            return
        for cluster, group in rows.groupby("cluster", sort=True):
            if str(cluster) in self._adapters:
                yield str(cluster), group

    def _active(self, key: str) -> Any:  # noqa: ANN401
        """Return the model with one adapter active, as stock PEFT loads it, or as it is."""
        path = self._adapters.get(key)
        if path is None:
            return self._model
        if not self._held:
            self._model = PeftModel.from_pretrained(
                self._model, path, key, autocast_adapter_dtype=False
            )
            self._held.append(key)
        if key not in self._held:
            self._model.load_adapter(path, key, autocast_adapter_dtype=False)
            self._held.append(key)
        self._model.set_adapter(key)
        if len(self._held) > _KEPT:
            self._model.delete_adapter(self._held.pop(0))
        return self._model.eval()


class Routed:
    """A base model with a routed library, each prompt by its own route.

    Parameters
    ----------
    loaded : LoadedBase
        The base model, without adapters.
    folder : Path
        Directory of the routed library.
    route : callable
        Rows with a column prompt → their routing.
    """

    def __init__(self, loaded: LoadedBase, folder: Path, route: Route) -> None:
        self._model = PeftModel.from_pretrained(
            loaded.model, folder, autocast_adapter_dtype=False
        ).eval()
        self._loaded = loaded._replace(model=cast("Any", self._model))
        self._gating = Gating(self._model, read_library(folder).gated)
        self._route = route

    def measure(
        self,
        rows: pd.DataFrame,
        config: MeasureConfig,
        on_event: EventCallback = lambda _: None,
    ) -> pd.DataFrame:
        """Measure rows, each by its own route."""
        measured = _measured(self._loaded, rows, config, self._context(rows))
        on_event({"rows": len(rows), "of": len(rows)})
        return measured.set_axis(rows.index)

    def run_lm_eval(
        self, config: LmEvalConfig, token_budget: int, few_shot: int | None = None
    ) -> LmEvalResult:
        """Run lm-eval's tasks, each context by its own route."""

        def routes(prompts: Sequence[str]) -> RowContext:
            return self._context(pd.DataFrame({"prompt": list(prompts)}))

        return _run_lm_eval(self._loaded, config, token_budget, few_shot, routes=routes)

    def close(self) -> None:
        """Take the library off the base model."""
        self._model.unload()

    def _context(self, rows: pd.DataFrame) -> RowContext:
        routing = self._route(rows)
        return lambda chosen: routing.take(chosen).context(self._gating)


@contextmanager
def opened(subject: Adapted | Routed) -> Iterator[Subject]:
    """Give a subject and take it off its base model afterwards."""
    try:
        yield subject
    finally:
        subject.close()


def _run_lm_eval(
    loaded: LoadedBase,
    config: LmEvalConfig,
    token_budget: int,
    few_shot: int | None,
    **options: Any,  # noqa: ANN401
) -> LmEvalResult:
    return run_lm_eval(
        loaded.model,
        loaded.tokenizer,
        config.lm_eval,
        limit=config.lm_eval_limit,
        few_shot=few_shot,
        token_budget=token_budget,
        allow_code_execution=config.allow_code_execution,
        **options,
    )


def _measured(
    loaded: LoadedBase, rows: pd.DataFrame, config: MeasureConfig, context: RowContext = plain
) -> pd.DataFrame:
    return evaluate_frame(
        loaded.model,
        loaded.tokenizer,
        rows,
        template=loaded.base.template,
        max_tokens=loaded.base.max_tokens,
        token_budget=config.token_budget,
        max_new_tokens=config.max_new_tokens if config.generate else None,
        context=context,
    )
