"""Hidden states of the base model where it predicts a row's response.

Symbols: S columns with labels, d width of the hidden states.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

from tclora.cluster.features.request import FeatureRequest, Features, unit_rows
from tclora.jobs.call import EventCallback
from tclora.model.tokens import IGNORED, Batch, batches


def hidden_states(request: FeatureRequest, on_event: EventCallback) -> Features:
    """Return each row's mean last hidden state over the positions that predict its response.

    Returns
    -------
    ndarray of float32, shape (N, d)
        Less the mean of all rows, which is most of every hidden state, and of unit norm.
    """
    loaded = request.base.load()
    rows = loaded.encode(request.frame())
    states = np.zeros((len(rows), loaded.model.config.hidden_size), dtype=np.float32)
    budget, done = request.adapter.tokens_at_once(), 0
    for batch in batches(rows, pad_id=loaded.pad_id, token_budget=budget):
        states[list(batch.rows)] = mean_states(loaded.model, batch)
        done += len(batch.rows)
        on_event({"done": done, "of": len(rows)})
    return unit_rows(states - states.mean(axis=0))


@torch.inference_mode()
def mean_states(model: PreTrainedModel, batch: Batch) -> Features:
    """Return the mean hidden state of each row of a batch, shape (rows, d)."""
    device = model.device
    states = model.base_model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        use_cache=False,
    ).last_hidden_state[:, -batch.labels.shape[1] :]  # (rows, S, d)
    weights = (batch.labels != IGNORED).to(device).float()  # (rows, S)
    summed = torch.einsum("nsd,ns->nd", states.float(), weights)
    return np.asarray((summed / weights.sum(1, keepdim=True)).cpu().numpy(), dtype=np.float32)
