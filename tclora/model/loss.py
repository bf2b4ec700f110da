"""Response log-likelihoods of a causal LM, with logits only where a response token is predicted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tclora.model.kernels.cross_entropy import linear_cross_entropy
from tclora.model.tokens import IGNORED, Batch


def response_nll(model: PreTrainedModel | PeftModel, batch: Batch) -> Tensor:
    """Negative log-likelihood of the response tokens.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A causal LM whose forward accepts ``logits_to_keep`` and whose output embeddings are a
        module that its logits come from.
    batch : Batch
        Left-padded rows (T columns) with labels for the last S columns.

    Returns
    -------
    Tensor
        (rows, S) float32, nats; 0 where no response token stands.
    """
    labels = batch.labels.to(model.device)
    return _cross_entropy(_logits(model, batch, Tensor.contiguous), labels)  # (rows, S)


def supervised_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return what `response_nll` does, with logits at the supervised positions alone.

    Where short and long responses share a batch, the columns of the longest are mostly no
    response's, and a product with the whole vocabulary is what a position costs most.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM whose forward accepts ``logits_to_keep`` and whose output embeddings are a
        module that its logits come from.
    batch : Batch
        Left-padded rows (T columns) with labels for the last S columns.

    Returns
    -------
    Tensor
        (rows, S) float32, nats; 0 where no response token stands.
    """
    labels = batch.labels.to(model.device)
    kept = labels != IGNORED
    # (rows, S, d) -> (1, supervised, d)
    logits = _logits(model, batch, lambda hidden: hidden[kept].unsqueeze(0))
    losses = _cross_entropy(logits, labels[kept][None])[0]  # (supervised,)
    return losses.new_zeros(labels.shape).masked_scatter(kept, losses)


def chunked_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return what `supervised_nll` does, without all of its logits at once.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM whose output layer is frozen and of which `plain_head` is true.
    batch : Batch
        Left-padded rows (T columns) with labels for the last S columns.

    Returns
    -------
    Tensor
        (rows, S) float32, nats; 0 where no response token stands.
    """
    device = model.device
    labels = batch.labels.to(device)
    kept = labels != IGNORED
    hidden = model.get_decoder()(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        use_cache=False,
    ).last_hidden_state[:, -labels.shape[1] :]  # (rows, S, d)
    head = model.get_output_embeddings()
    losses = linear_cross_entropy(hidden[kept], head.weight, head.bias, labels[kept])
    return losses.new_zeros(labels.shape).masked_scatter(kept, losses)


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> bool:
    """Return whether logits are a linear layer's outputs for the decoder's last hidden states.

    They are not where a model scales or caps one of them. `model` is one in evaluation mode.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
    ids = torch.tensor([[5, 9, 7, 8]], device=model.device)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    except (TypeError, AttributeError, RuntimeError, ValueError):  # of another form
        return False
    finally:
        handle.remove()
    return len(seen) == 2 and torch.equal(seen[0], hidden) and torch.equal(seen[1], logits)


def _logits(
    model: PreTrainedModel | PeftModel, batch: Batch, of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the logits of what `of` makes of the last S hidden states, (rows, S, d)."""
    device = model.device
    with logits_of(model, of):
        logits: Tensor = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            position_ids=batch.position_ids.to(device),
            logits_to_keep=batch.labels.shape[1],
            use_cache=False,
        ).logits
    return logits


@contextmanager
def logits_of(model: PreTrainedModel | PeftModel, of: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Compute the logits of a function of the hidden states while the context lasts.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Its output embeddings must be a module that its logits come from.
    of : callable
        From the hidden states that logits are wanted of, (rows, S, d), to those they are computed
        of. With ``logits_to_keep`` they are a slice with gaps in memory; a product with one copies
        the vocabulary's matrix for every row, so that nothing should be multiplied that is not
        contiguous.
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (of(inputs[0]),)
    )
    try:
        yield
    finally:
        handle.remove()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (rows, S) float32 losses of (rows, S, vocabulary) logits; one kernel for both."""
    return nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
