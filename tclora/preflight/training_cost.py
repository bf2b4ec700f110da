"""What a training job costs: its time and memory, from counts and measured rates.

Time of a job of S optimiser steps over N tokens, a share s of them supervised, in rows of T:

    N (4 P + 6 Q + 4 V d s + 14 T d L) / products
    + 2.4 (N (L (41 d + 10 f) + 3 Q / r) + 25 Q S) / elements
    + 0.014 L max(N / F, steps of the job)

The first line is what matrix products need: forward pass and gradients of activations of the
linear layers, all three products of the adapters, the output layer where a response token is
predicted, and attention. The second counts passes over activations (as `tclora.model.kernels` makes
them, forward and backward) and over an adapter's weights in its optimiser; the third the calls of
operators, per layer and forward pass. The factors 2.4 and 0.014 were fitted on trainings of SmolLM2
and of two smaller Llamas in fp32 and bf16 on two cores with AMX; ``benchmarks/training_cost.py``
holds the whole against measured trainings. It was not measured on a GPU.

Memory is the weights, every adapter that is held at once with gradients and optimiser state, the
activations of one forward pass, and its logits.

Symbols: P weights of the linear layers, Q of an adapter, r its rank, L layers, d width, f inner
width, V vocabulary, F tokens per forward pass.

References
----------
.. [1] Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022
   (34 d bytes per token and layer at 16 bits).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tclora.config import AdapterConfig
from tclora.jobs.devices import visible_gpus
from tclora.model.quantised import NF4_BYTES
from tclora.preflight.rates import Rates
from tclora.preflight.sizes import BaseSize

ACTIVATION_BYTES = 17  # per token, layer, hidden unit and byte of the weights' type
_LOGITS = 2048  # positions whose logits are held at once
_MODULES = 7  # of a layer, that adapters update
_ADAPTER_BYTES = 16  # per weight beside its copy in the model: master, gradient, two moments
_PASSES = 2.4  # of a real pass over activations, in passes as `Rates.elements` measures them
_CALLS = 14e-3  # of operators, per layer and forward pass with its backward pass (s)


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a row, and of its response."""

    row: float
    response: float


def training_seconds(
    base: BaseSize,
    config: AdapterConfig,
    lengths: Lengths,
    tokens: float,
    steps: Sequence[int],
    rates: Rates,
) -> float:
    """Return the seconds of a job's loop over so many tokens, by the formula of this module.

    `steps` are those of each of its adapters.
    """
    d, L = base.width, base.layers
    supervised = base.vocabulary * d * lengths.response / lengths.row
    passes = 1.5 if config.gradient_checkpointing else 1.0
    job_steps = max(end for _, end in _stays(config, steps))
    products = 4 * base.linear * passes + 6 * base.trained + 4 * supervised
    products += 14 * lengths.row * d * L
    elements = L * (41 * d + 10 * base.inner) * passes + 3 * base.trained / config.r
    return (
        tokens * products / rates.products
        + _PASSES * (tokens * elements + 25 * base.trained * sum(steps)) / rates.elements
        + _CALLS * L * max(tokens / forward_tokens(config), job_steps)
    )


def job_memory(
    base: BaseSize,
    config: AdapterConfig,
    lengths: Lengths,
    adapters: int,
    itemsize: int,
    tokens: int,
) -> float:
    """Return the bytes of a training job, beside what Python and its libraries take.

    `adapters` are those that it holds at once, `tokens` those of a forward pass.
    """
    layers = 1 if config.gradient_checkpointing else base.layers
    activations = ACTIVATION_BYTES * itemsize * tokens * base.width * layers
    if config.gradient_checkpointing:
        activations += itemsize * tokens * base.width * base.layers
    own = adapters * base.trained * (_ADAPTER_BYTES + 2 * itemsize)  # weights and gradients there
    mixed = adapters if visible_gpus() else 1  # whose A x is computed for every token
    activations += itemsize * tokens * mixed * config.r * _MODULES * layers
    supervised = min(tokens * lengths.response / lengths.row, _LOGITS)
    logits = supervised * base.vocabulary * (itemsize + 4)
    weights = float(base.parameters * itemsize)
    if config.quantisation:
        weights -= base.linear * (itemsize - NF4_BYTES)
    return weights + own + activations + logits


def forward_tokens(config: AdapterConfig) -> int:
    """Return the tokens of a forward pass here."""
    return config.tokens_at_once(gpu=bool(visible_gpus()))


def spans(durations: Sequence[float], lanes: int) -> list[tuple[float, float]]:
    """Return begin and end of each if they start in their order where a lane is free."""
    free, found = [0.0] * lanes, []
    for duration in durations:
        lane = min(range(lanes), key=free.__getitem__)
        begin, free[lane] = free[lane], free[lane] + duration
        found.append((begin, free[lane]))
    return found


def shares_of_loop(config: AdapterConfig, steps: Sequence[int]) -> list[float]:
    """Return for which part of a job's loop each of its adapters takes part in it (0 to 1).

    A step takes as long as there are adapters in it.
    """
    stays = _stays(config, steps)
    return [
        sum(max(0.0, min(end, other[1]) - max(begin, other[0])) for other in stays) / sum(steps)
        for begin, end in stays
    ]


def _stays(config: AdapterConfig, steps: Sequence[int]) -> list[tuple[float, float]]:
    """Return from which to which step of a job each of its adapters is held."""
    order = sorted(range(len(steps)), key=lambda k: -steps[k])
    found = spans([steps[k] for k in order], config.held_at_once(len(steps)))
    return [stay for _, stay in sorted(zip(order, found, strict=True))]
