"""Activation statistics: the Gram matrices of module inputs, per cluster.

Symbols: d_in the width of a module's input, G_k (d_in, d_in) the mean of x xᵀ over the tokens of
cluster k. One matrix takes 4 d_in min(t, d_in) bytes for t tokens, half of that on disk once
t ≥ d_in; modules that read the same input share it.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tclora.errors import AdapterError, LibraryError
from tclora.files import atomic_path, sort_metadata
from tclora.model.tokens import TokenRow, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = "tclora-activations-1"


@dataclass(frozen=True)
class ActivationStatistics:
    """Gram matrices of module inputs for some clusters.

    Attributes
    ----------
    groups : Mapping[str, str]
        Module path → the module whose matrix it shares, because both read the same input.
    grams : Mapping[str, Mapping[str, Tensor]]
        Cluster → group → G of shape (d_in, d_in), or, where fewer tokens t than d_in were seen, its
        root F of shape (t, d_in) with G = FᵀF; dicts, or lazy views on files.
    tokens : Mapping[str, int]
        Cluster → tokens seen.
    """

    groups: Mapping[str, str]
    grams: Mapping[str, Mapping[str, Tensor]]
    tokens: Mapping[str, int]

    def of(self, module: str, clusters: Sequence[str]) -> Tensor:
        """Return a module's matrices for the named clusters, shape (K, d_in, d_in), float64.

        Raises
        ------
        AdapterError
            If a cluster or the module was not seen.
        """
        missing = [cluster for cluster in clusters if cluster not in self.grams]
        if missing or module not in self.groups:
            what = f"clusters {', '.join(missing)}" if missing else f"module {module}"
            raise AdapterError(
                f"activation statistics must cover {what}, got clusters {', '.join(self.grams)} "
                f"and {len(self.groups)} modules; collect them again"
            )
        group = self.groups[module]
        return torch.stack([_dense(self.grams[cluster][group]) for cluster in clusters])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file of upper triangles, atomically."""
        tensors = {
            f"{cluster}/{group}": _packed(gram)
            for cluster, grams in self.grams.items()
            for group, gram in grams.items()
        }
        header = {
            "format": _FORMAT,
            "groups": json.dumps(dict(self.groups)),
            "tokens": json.dumps(dict(self.tokens)),
        }
        with atomic_path(Path(path)) as fresh:
            save_file(tensors, fresh, metadata=header)
            sort_metadata(fresh)

    @classmethod
    def load(cls, *paths: str | Path) -> "ActivationStatistics":
        """Open what `save` wrote, several files as one; matrices are read when asked for.

        Raises
        ------
        LibraryError
            If a file is missing, damaged, of another format, or of other modules than the first.
        """
        groups: dict[str, str] = {}
        grams: dict[str, Mapping[str, Tensor]] = {}
        tokens: dict[str, int] = {}
        for path in paths:
            header = _header(path)
            found = json.loads(header["groups"])
            if groups and found != groups:
                raise LibraryError(f"{path}: must cover the same modules as {paths[0]}")
            groups = found
            for cluster, count in json.loads(header["tokens"]).items():
                grams[cluster] = _FileGrams(path, cluster, sorted(set(groups.values())))
                tokens[cluster] = count
        return cls(groups, grams, tokens)


class _FileGrams(Mapping[str, Tensor]):
    """One cluster's matrices, read from a file when asked for; no page of it stays resident."""

    def __init__(self, path: str | Path, cluster: str, groups: Sequence[str]) -> None:
        self._path = path
        self._cluster = cluster
        self._groups = groups

    def __getitem__(self, group: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            return _unpacked(file.get_tensor(f"{self._cluster}/{group}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


def _packed(gram: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, shape (d (d + 1) / 2,), or a root."""
    if gram.shape[0] != gram.shape[1]:
        return gram.contiguous()
    return gram[torch.ones_like(gram, dtype=torch.bool).triu()]


def _unpacked(triangle: Tensor) -> Tensor:
    """Return the symmetric matrix (d, d) of an upper triangle, or a root as it is."""
    if triangle.ndim == 2:
        return triangle
    d = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    gram = triangle.new_zeros(d, d)
    gram[torch.ones_like(gram, dtype=torch.bool).triu()] = triangle
    return gram + gram.triu(1).mT


def _header(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise LibraryError(f"{path}: cannot be read as activation statistics: {error}") from error
    if header.get("format") != _FORMAT:
        raise LibraryError(
            f"{path}: format must be {_FORMAT}, got {header.get('format')!r}; collect them again"
        )
    return header


def collect(
    model: "PreTrainedModel",
    rows: Sequence[TokenRow],
    cluster: str,
    modules: Sequence[str],
    *,
    pad_id: int,
    token_budget: int = 1024,
) -> ActivationStatistics:
    """Measure one cluster's inputs in one streamed forward pass of the base model.

    Parameters
    ----------
    model : PreTrainedModel
        The base model, without adapters.
    rows : sequence of TokenRow
        A few of the cluster's examples; padding does not count.
    cluster : str
        Name of the cluster's adapter.
    modules : sequence of str
        Paths of the linear modules to watch, such as the modules of an adapter.
    pad_id : int
        Padding token.
    token_budget : int
        Padded tokens per forward pass.

    Returns
    -------
    ActivationStatistics
        Of this one cluster, in single precision; save each and `load` them together.

    Raises
    ------
    ValueError
        If there is no row, or the model lacks a module.
    """
    if not rows:
        raise ValueError(f"rows of {cluster} must be at least one, got none")
    recorder = _Recorder()
    handles = [
        _module(model, name).register_forward_pre_hook(recorder.hook(name)) for name in modules
    ]
    try:
        for batch in batches(rows, pad_id=pad_id, token_budget=token_budget):
            recorder.mask = batch.attention_mask.to(model.device).bool()
            with torch.inference_mode():
                model(
                    input_ids=batch.input_ids.to(model.device),
                    attention_mask=batch.attention_mask.to(model.device),
                    position_ids=batch.position_ids.to(model.device),
                    logits_to_keep=1,
                    use_cache=False,
                )
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(row) for row in rows)
    grams = {group: recorder.mean(group, tokens).cpu() for group in sorted(recorder.inputs)}
    return ActivationStatistics(
        dict(sorted(recorder.groups.items())), {cluster: grams}, {cluster: tokens}
    )


def _dense(gram: Tensor) -> Tensor:
    """Return G in double precision from itself or from its root, which is never square."""
    return gram.double() if gram.shape[0] == gram.shape[1] else (gram.mT @ gram).double()


def _module(model: "PreTrainedModel", name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"modules must exist in the base model, got {name!r}") from error


class _Recorder:
    """Sums x xᵀ over real tokens; consecutive modules that get the same tensor share the sum."""

    def __init__(self) -> None:
        self.mask = torch.zeros(0, dtype=torch.bool)  # (rows, T), True where a token stands
        self.groups: dict[str, str] = {}
        self.inputs: dict[str, Tensor] = {}  # X (t, d_in) while t < d_in, then Xᵀ X
        self._last: Tensor | None = None
        self._leader = ""

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a forward pre-hook for a module."""

        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is not self._last:
                self._last, self._leader = inputs[0], name
                self._add(name, inputs[0][self.mask].float())
            self.groups[name] = self._leader

        return record

    def _add(self, group: str, x: Tensor) -> None:
        """Add the inputs x (tokens, d_in) to a group's sum."""
        seen = self.inputs.get(group, x.new_zeros(0, x.shape[1]))
        if seen.shape[0] == x.shape[1]:
            seen.addmm_(x.mT, x)
            return
        seen = torch.cat([seen, x])
        self.inputs[group] = seen if seen.shape[0] < x.shape[1] else seen.mT @ seen

    def mean(self, group: str, tokens: int) -> Tensor:
        """Return G over that many tokens, or its root."""
        seen = self.inputs[group]
        return seen / (tokens if seen.shape[0] == seen.shape[1] else tokens**0.5)
