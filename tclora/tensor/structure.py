"""What a library's adapters have in common and where they collide, as the report shows it.

Symbols: K adapters, R the CP rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from tclora.adapter import Adapter
from tclora.adapter.union import module_factors
from tclora.tensor.als import CPSolution
from tclora.tensor.compress import compress
from tclora.tensor.diagnostics import component_diagnostics, core_consistency
from tclora.tensor.factorise import factorise
from tclora.tensor.interference import MEASURES, Interference, interference
from tclora.tensor.library import LibraryFactors
from tclora.tensor.sidebyside import side_by_side

# Effort of the models of rank K whose core consistency is measured where R > K.
_STARTS, _SWEEPS = 1, 60


@dataclass(frozen=True)
class LibraryDiagnostics:
    """The tables of a library's structure.

    Attributes
    ----------
    components : DataFrame
        One row per module and component; see `component_diagnostics`.
    consistency : DataFrame
        One row per module: module, core_rank, core_consistency (percent, at most 100; missing
        where the module is zero).
    pairs : DataFrame
        One row per two adapters: first, second and the measures of `interference`.
    """

    components: pd.DataFrame
    consistency: pd.DataFrame
    pairs: pd.DataFrame

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the names under which they are stored."""
        return {
            "components": self.components,
            "consistency": self.consistency,
            "pairs": self.pairs,
        }


def library_diagnostics(
    adapters: Sequence[Adapter],
    factors: LibraryFactors,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> LibraryDiagnostics:
    """Measure how shared the components are, how unique, and how adapters get in each other's way.

    Parameters
    ----------
    adapters : sequence of K Adapter
        Those that were factorised, in the same order.
    factors : LibraryFactors
        Their joint factors.
    progress : callable, optional
        Called with (modules done, modules in all) while interference is measured.

    Returns
    -------
    LibraryDiagnostics

    Raises
    ------
    ValueError
        If the factors are of other adapters.
    AdapterError
        If shapes disagree.

    Notes
    -----
    Core consistency is defined for R ≤ K. Above that it is measured on models of rank K, which are
    fitted for it: whether as many components as there are clusters can be told apart.
    """
    names = tuple(adapter.name for adapter in adapters)
    if names != factors.names:
        raise ValueError(
            f"factors must be of the adapters {', '.join(names)}, got those of "
            f"{', '.join(factors.names)}; factorise these adapters"
        )
    model = factors
    if factors.rank > len(names):
        model = factorise(adapters, len(names), n_starts=_STARTS, n_iter=_SWEEPS)
    measured = side_by_side(partial(_consistency, adapters, model), model.modules)
    return LibraryDiagnostics(
        components=component_diagnostics(factors),
        consistency=pd.DataFrame(measured, columns=["module", "core_rank", "core_consistency"]),
        pairs=_pairs(interference(adapters, progress)),
    )


def _consistency(
    adapters: Sequence[Adapter], model: LibraryFactors, module: str
) -> tuple[str, int, float]:
    cp = model.modules[module]
    if not cp.C.any():
        return module, cp.rank, float("nan")
    factors = module_factors(adapters, module)
    core = compress([f.B for f in factors], [f.A for f in factors])
    U, V = core.left.mT @ cp.U.to(core.left), core.right.mT @ cp.V.to(core.right)  # (m, R), (n, R)
    C = cp.C.to(core.left)
    solution = CPSolution(U[None], V[None], C[None], error=C.new_zeros(1))
    return module, cp.rank, float(core_consistency(core.B[None], core.A[None], solution))


def _pairs(measured: Interference) -> pd.DataFrame:
    """List every two adapters once."""
    names = measured.cosine.index.to_numpy()
    first, second = np.triu_indices(len(names), k=1)
    values = {m: getattr(measured, m).to_numpy()[first, second] for m in MEASURES}
    return pd.DataFrame({"first": names[first], "second": names[second], **values})
