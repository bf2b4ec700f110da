"""The verifiers of reasoning-gym: ``reasoning-gym:NAME`` asks the dataset NAME's own."""

import json
from functools import cache
from typing import Any

from tclora.evaluate.scorers.registry import Expected, register


def _check(expected: Expected) -> None:
    _dataset(expected.argument)
    json.loads(expected.metadata or "{}")


@register("reasoning-gym", check=_check)
def reasoning_gym(generated: str, expected: Expected) -> float:
    """Ask the verifier of a reasoning-gym dataset: ``reasoning-gym:chain_sum``."""
    entry = {
        "question": "",
        "answer": expected.answer,
        "metadata": json.loads(expected.metadata or "{}"),
    }
    verifier = _dataset(expected.argument)
    # Partial credit is for learning by reinforcement; here an answer is right or it is not.
    return float(verifier.score_answer(generated.strip(), entry) >= 1)


@cache
def _dataset(name: str) -> Any:  # noqa: ANN401
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)
