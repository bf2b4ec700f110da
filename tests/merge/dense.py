"""Dense updates of one module, and what methods make of them."""

import torch
from torch.linalg import svd

from tclora.merge import merge
from tests.merge.examples import make_adapter

MODULE = "layers.0.q"


def dense(adapters):
    return torch.stack([a.modules[MODULE].delta() for a in adapters])  # (K, d_out, d_in)


def merged(adapters, method, **options):
    return merge(adapters, method, **options).adapter.modules[MODULE].delta()


def full_rank_adapters(K=2):
    """Adapters that fill the space, where span-restricted and published forms agree."""
    return [make_adapter(f"a{k}", rank=16, seed=k) for k in range(K)]


def truncated(delta, rank):
    U, S, Vh = svd(delta, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def check(found, expected, tolerance=1e-6):
    assert (found - expected).norm() < tolerance * expected.norm()


def trimmed(deltas, density):
    flat = deltas.flatten(1)
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).reshape(deltas.shape)


def ties(deltas, density):
    values = trimmed(deltas, density)
    signs = torch.where(values.sum(0) >= 0, 1, -1)
    agree = values.sign() == signs
    return (values * agree).sum(0) / agree.sum(0).clamp_min(1)
