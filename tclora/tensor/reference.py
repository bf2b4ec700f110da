"""TensorLy's ``parafac`` on the same cores, as the reference our solver is held against.

Symbols: M modules in the batch, K adapters, m × n the core, r the LoRA rank, R the CP rank.

References
----------
Kossaifi, Panagakis, Anandkumar, Pantic (2019), "TensorLy: Tensor Learning in Python", JMLR 20.
"""

import torch
from torch import Tensor

from tclora.tensor.als import CPSolution, Stack, measured
from tclora.tensor.cp import best_of, ordered, stack_norm
from tclora.tensor.starts import gaussian, unfoldings


def cp_parafac(
    B: Tensor,
    A: Tensor,
    rank: int,
    *,
    n_starts: int = 4,
    n_iter: int = 100,
    tol: float = 1e-5,
    seed: int = 0,
) -> CPSolution:
    """Fit CP models as `cp_als` does, by TensorLy, module by module.

    Parameters
    ----------
    B : Tensor, shape (M, K, m, r)
        Output factors of the cores.
    A : Tensor, shape (M, K, r, n)
        Input factors of the cores.
    rank : int
        CP rank R.
    n_starts : int
        Starts per module, each run to its end: the leading vectors of the unfoldings, as with
        TensorLy's ``init="svd"``, then Gaussian matrices.
    n_iter : int
        Sweeps at most of each start.
    tol : float
        A start stops when its relative error changes by less than `tol` in one sweep.
    seed : int
        Seed of the random starts.

    Returns
    -------
    CPSolution
        In the conventions of `cp_als`, its error measured in the same way.

    Raises
    ------
    ValueError
        If there is nothing to start from.
    torch.linalg.LinAlgError
        If a normal equation becomes singular, which TensorLy does not guard against.

    Notes
    -----
    Each core is multiplied out, K m n numbers, and one sweep costs O(K m n R): for comparison, not
    for large models.
    """
    if n_starts < 1:
        raise ValueError(f"n_starts must be at least 1, got {n_starts}")
    scale = stack_norm(B, A)
    unit = B / torch.where(scale > 0, scale, 1)[:, None, None, None]
    generator = torch.Generator().manual_seed(seed)
    starts = [unfoldings(unit, A, rank, generator)]
    starts += [gaussian(unit, A, rank, generator) for _ in range(1, n_starts)]
    solved = []
    for i in range(len(A)):
        stack = Stack(unit[i : i + 1], A[i : i + 1])
        solved += best_of([_fit(stack, U[i], V[i], n_iter, tol) for U, V in starts], 1)
    U, V, C, error = (torch.cat([getattr(s, p) for s in solved]) for p in ("U", "V", "C", "error"))
    error = torch.where(scale > 0, error, 0.0)
    return ordered(CPSolution(U, V, C * scale[:, None, None], error))


def _fit(stack: Stack, U: Tensor, V: Tensor, n_iter: int, tol: float) -> CPSolution:
    """Run ``parafac``, which solves for C first, on one core from U (m, R) and V (n, R)."""
    import tensorly
    from tensorly.decomposition import parafac

    core = (stack.B @ stack.A)[0]
    C = core.new_zeros(len(core), U.shape[1])
    if core.any():  # TensorLy would divide a core of zeros by its norm
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            model = parafac(core, U.shape[1], init=(None, [C, U, V]), n_iter_max=n_iter, tol=tol)
        C, U, V = model.factors  # its weights are one
    return measured(stack, U[None], V[None], C[None])
