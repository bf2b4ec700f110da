"""Training one LoRA adapter: loss on responses only, resumable, the same bytes for the same seed.

PEFT places the adapter; the loop is ours because it needs what trainers do not give: logits only at
supervised positions, steps split to a token budget, low-precision adapters with fp32 master weights
on CPU, and checkpoints in safe formats.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tclora.config import AdapterConfig
from tclora.model.loss import response_nll
from tclora.model.tokens import Batch, TokenRow, batches
from tclora.train.budget import TokenBudget
from tclora.train.course import (
    Checkpoint,
    Course,
    Destination,
    StepCallback,
    StepLoss,
    TrainingResult,
    hold_out,
)
from tclora.train.lora import attach_lora


def train_adapter(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    config: AdapterConfig,
    target: Path,
    *,
    base_model: str,
    seed: int = 0,
    init_seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: StepCallback | None = None,
) -> TrainingResult:
    """Train a LoRA adapter on token rows and write it as a stock PEFT directory.

    Parameters
    ----------
    model : PreTrainedModel
        The base; adapter layers are injected into it.
    rows : sequence of TokenRow
        At least one.
    config : AdapterConfig
        Rank, learning rate, batch and so on.
    target : Path
        Directory of the finished adapter.
    base_model : str
        What the adapter's configuration names as its base.
    seed, init_seed : int
        Seeds of the row order and dropout, and of A_0.
    checkpoint : Checkpoint, optional
        Where and how often to write checkpoints; also after the last step. If there is one,
        training resumes there and ends with the same adapter; the caller makes sure that it belongs
        to the same rows, configuration and seeds, and removes it.
    on_step : callable, optional
        Called after each step with its record; after a resume, with the earlier ones too.

    Returns
    -------
    TrainingResult

    Raises
    ------
    ModelError
        If the target modules match nothing in the model.
        Or if one row alone exceeds the device's memory.
    NonFiniteLossError
        If the loss becomes NaN or infinite.
    """
    peft_model = attach_lora(model, config, init_seed)
    weights = {name: w for name, w in peft_model.named_parameters() if w.requires_grad}
    destination = Destination(target, base_model, checkpoint, on_step or (lambda _: None))
    budget = TokenBudget(config.tokens_per_forward)
    rows, watched = hold_out(rows, config.validation_fraction, seed)
    course = Course(
        weights,
        len(rows),
        config,
        seed=seed,
        destination=destination,
        validate=partial(validation_nll, peft_model, watched, budget.tokens) if watched else None,
    )
    if config.gradient_checkpointing:
        peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    peft_model.train()
    start = len(course.history)
    for step, order in enumerate(course.orders(start), start):
        chosen = [rows[i] for i in order]
        torch.manual_seed(seed * 1_000_003 + step)  # dropout, the same after a resume
        compute = partial(_gradients, peft_model, chosen)
        course.advance(budget.within(compute, course.stand, max(map(len, chosen))))
    return course.finish()


def validation_nll(
    model: PeftModel | PreTrainedModel,
    rows: Sequence[TokenRow],
    token_budget: int,
    around: Callable[[Batch], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> float:
    """Return the mean loss on rows held out, nats per response token; training mode is restored.

    `around` is entered for each batch, by models that need to be told whose rows it holds.
    """
    total = 0.0
    model.eval()
    with torch.no_grad():
        for batch in batches(rows, pad_id=0, token_budget=token_budget):
            with around(batch):
                total += float(response_nll(model, batch).sum())
    model.train()
    return total / sum(len(row.response) for row in rows)


def _gradients(model: PeftModel, rows: Sequence[TokenRow], token_budget: int) -> StepLoss:
    """Add up the gradients of a step."""
    tokens = sum(len(row.response) for row in rows)
    loss, computed = 0.0, 0
    # What pads is masked out, so that any token serves.
    for batch in batches(rows, pad_id=0, token_budget=token_budget):
        part = response_nll(model, batch).sum() / tokens
        part.backward()
        loss += part.item()
        computed += batch.input_ids.numel()
    read = sum(map(len, rows))
    return StepLoss(loss, tokens, read, 1 - read / computed)
