"""Training one LoRA adapter: loss on responses only, resumable, the same bytes for the same seed.

PEFT places the adapter; the loop is ours because it needs what trainers do not give: logits only at
supervised positions, steps split to a token budget, low-precision adapters with fp32 master weights
on CPU, and checkpoints in safe formats.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tclora.config import AdapterConfig
from tclora.model.loss import response_nll
from tclora.model.tokens import TokenRow, batches
from tclora.train.course import Checkpoint, Course, Destination, StepCallback, TrainingResult
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
    NonFiniteLossError
        If the loss becomes NaN or infinite.
    """
    peft_model = attach_lora(model, config, init_seed)
    weights = {name: w for name, w in peft_model.named_parameters() if w.requires_grad}
    destination = Destination(target, base_model, checkpoint, on_step or (lambda _: None))
    course = Course(weights, len(rows), config, seed=seed, destination=destination)
    if config.gradient_checkpointing:
        peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    peft_model.train()
    start = len(course.history)
    for step, order in enumerate(course.orders(start), start):
        torch.manual_seed(seed * 1_000_003 + step)  # dropout, the same after a resume
        course.advance(*_gradients(peft_model, [rows[i] for i in order], config.tokens_per_forward))
    return course.finish()


def _gradients(model: PeftModel, rows: Sequence[TokenRow], token_budget: int) -> tuple[float, int]:
    """Add up the gradients of a step; return its mean loss and number of supervised tokens."""
    tokens = sum(len(row.response) for row in rows)
    loss = 0.0
    # What pads is masked out, so that any token serves.
    for batch in batches(rows, pad_id=0, token_budget=token_budget):
        part = response_nll(model, batch).sum() / tokens
        part.backward()
        loss += part.item()
    return loss, tokens
