"""The merge engine: adapters in, one adapter out, one module at a time."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from tclora.activations.collect import ActivationStatistics
from tclora.activations.metric import InputMetrics
from tclora.adapter import Adapter, LoraFactors
from tclora.adapter.union import check_adapters, module_factors, module_names
from tclora.errors import AdapterError
from tclora.merge.registry import Method, check_options, get
from tclora.merge.stack import ModuleStack
from tclora.tensor.factorise import factorise
from tclora.tensor.library import CPFactors, LibraryFactors

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merge:
    """A merged adapter and what became of the updates.

    Attributes
    ----------
    adapter : Adapter
        The result, a plain LoRA.
    method : str
        Name of the method.
    rank : int
        Largest rank among its modules.
    truncation_loss : float
        Share of the merged update's energy that truncation removed (0–1), in the metric of the
        method.
    parameters : int
        Numbers stored: Σ (d_out + d_in) rank over modules.
    notes : tuple of str
        What a table of results should say beside it.
    """

    adapter: Adapter
    method: str
    rank: int
    truncation_loss: float
    parameters: int
    notes: tuple[str, ...] = ()


def merge(
    adapters: Sequence[Adapter],
    method: str,
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rank: int | None = None,
    factors: LibraryFactors | Callable[[], LibraryFactors] | None = None,
    statistics: ActivationStatistics | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,  # noqa: ANN401
) -> Merge:
    """Merge adapters into one by a registered method.

    Parameters
    ----------
    adapters : sequence of K Adapter
        None of them is changed.
    method : str
        Name of a registered method; see `methods`.
    weights : sequence of K float, or mapping from adapter name to float, optional
        Relative weights, not negative; equal by default.
    rank : int, optional
        Rank of the result, reached by the method's optimal truncation; the method's own by
        default. For methods on CP factors that are not given, also the CP rank, by default the
        largest LoRA rank.
    factors : LibraryFactors or callable, optional
        Joint CP factors of the adapters, for methods that need them, or what returns them when they
        are needed; computed if missing.
    statistics : ActivationStatistics, optional
        Activation statistics, for methods that need or can use them.
    seed : int
        Seed of anything random.
    force : bool
        Merge adapters of different base models too.
    progress : callable, optional
        Called with (modules done, modules in all).
    **options
        The method's own options.

    Returns
    -------
    Merge

    Raises
    ------
    ValueError
        If the method, one of its options, the weights or the rank is not valid.
    AdapterError
        If the adapters do not belong together, or a factor is not finite.
    """
    chosen = get(method)
    check_options(chosen.info, options)
    check_adapters(adapters)
    base_model = _base_model(adapters, force)
    share = _weights(chosen, adapters, weights)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if chosen.info.needs == "statistics" and statistics is None:
        raise ValueError(f"statistics must be given for {method}; collect them with `collect`")
    names = module_names(adapters)
    joint = _JointFactors(adapters, factors, rank, seed)
    metrics = InputMetrics(statistics, _names(adapters), share) if statistics else None
    modules: dict[str, LoraFactors] = {}
    energy = lost = 0.0
    for module in names:
        read = module_factors(adapters, module)
        stack = ModuleStack(
            module=module,
            names=_names(adapters),
            factors=[LoraFactors(f.B.double(), f.A.double()) for f in read],
            weights=share,
            joint=partial(joint.of, module),
            inputs=partial(metrics.of, module) if metrics else None,
            rank=rank,
            seed=seed + zlib.crc32(module.encode()),
        )
        merged = chosen.truncation(chosen.function(stack, **options), rank, stack)
        modules[module] = _stored(merged.factors, read)
        energy, lost = energy + merged.energy, lost + merged.lost
        if progress:
            progress(len(modules), len(names))
    return Merge(
        adapter=Adapter(method, modules, base_model),
        method=method,
        rank=max(f.rank for f in modules.values()),
        truncation_loss=lost / energy if energy else 0.0,
        parameters=sum(f.B.numel() + f.A.numel() for f in modules.values()),
        notes=_notes(chosen, options, joint.used),
    )


class _JointFactors:
    """The adapters' joint CP factors, rows in their order, computed when a method asks for them."""

    def __init__(
        self,
        adapters: Sequence[Adapter],
        given: LibraryFactors | Callable[[], LibraryFactors] | None,
        rank: int | None,
        seed: int,
    ) -> None:
        self.used: LibraryFactors | None = None
        self._adapters = adapters
        self._given = given
        self._rank = rank
        self._seed = seed

    def of(self, module: str) -> CPFactors:
        """Return the factors of one module."""
        if self.used is None:
            given = self._given() if callable(self._given) else self._given
            self.used = self._in_order(given) if given else self._computed()
        return self.used.modules[module]

    def _computed(self) -> LibraryFactors:
        largest = max(f.rank for a in self._adapters for f in a.modules.values())
        rank = largest if self._rank is None else self._rank
        return factorise(self._adapters, rank, seed=self._seed)

    def _in_order(self, given: LibraryFactors) -> LibraryFactors:
        names = _names(self._adapters)
        missing = sorted(set(names) - set(given.names))
        if missing or set(module_names(self._adapters)) != set(given.modules):
            what = f"adapters {', '.join(missing)}" if missing else "the adapters' modules"
            raise AdapterError(f"factors must cover {what}; factorise these adapters again")
        rows = [given.index(name) for name in names]
        modules = {module: cp._replace(C=cp.C[rows]) for module, cp in given.modules.items()}
        return replace(given, names=tuple(names), modules=modules)


def _notes(
    method: Method, options: Mapping[str, Any], factors: LibraryFactors | None
) -> tuple[str, ...]:
    """Say at which scale the method ran and how well the factors it used fit."""
    notes = []
    if "scale" in method.info.options:
        scale = options.get("scale", method.info.options["scale"])
        notes.append(f"scale {scale:g}{'' if 'scale' in options else ' (default)'}")
    if factors:
        share = factors.explained_variance
        notes.append(f"CP rank {factors.rank} explains {share:.1%} of the variance")
    return tuple(notes)


def _names(adapters: Sequence[Adapter]) -> list[str]:
    return [adapter.name for adapter in adapters]


def _base_model(adapters: Sequence[Adapter], force: bool) -> str | None:
    """Return the base model the adapters share, or the first one's if forced."""
    known = {a.base_model: a.name for a in adapters if a.base_model is not None}
    if len(known) > 1 and not force:
        found = ", ".join(f"{base} ({name})" for base, name in known.items())
        raise AdapterError(
            f"adapters must belong to one base model, got {found}; "
            "pass force=True if these are the same weights"
        )
    return next(iter(known), None)


def _weights(
    method: Method,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | Mapping[str, float] | None,
) -> Tensor:
    """Return the relative weights as a tensor (K,) of sum 1."""
    if weights is None:
        return torch.full((len(adapters),), 1 / len(adapters), dtype=torch.float64)
    if not method.info.weighted:
        raise ValueError(f"weights must not be given for {method.info.name}, which takes none")
    names = _names(adapters)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"weights must name every adapter ({names}), got {sorted(weights)}")
        weights = [weights[name] for name in names]
    given = torch.tensor(list(weights), dtype=torch.float64)
    if given.shape != (len(names),) or (given < 0).any() or not 0 < given.sum() < torch.inf:
        raise ValueError(
            f"weights must be {len(names)} numbers, none negative and not all zero, "
            f"got {given.tolist()}"
        )
    return given / given.sum()


def _stored(merged: LoraFactors, inputs: Sequence[LoraFactors]) -> LoraFactors:
    """Return factors in single precision or better, and of rank one where there are none."""
    types = [tensor.dtype for factors in inputs for tensor in factors]
    dtype = reduce(torch.promote_types, types, torch.float32)
    B, A = merged
    if merged.rank == 0:
        B, A = B.new_zeros(B.shape[0], 1), A.new_zeros(1, A.shape[1])
    return LoraFactors(B.to(dtype), A.to(dtype))
