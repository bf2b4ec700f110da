"""A tiny language model for merges that are measured by its loss."""

import warnings

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.model.loss import response_nll
from tclora.model.tokens import TokenRow, batches
from tests.merge.examples import make_adapter

MODULES = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.mlp.down_proj": (16, 24),
    "model.layers.1.mlp.up_proj": (24, 16),
}
ROWS = [TokenRow((3, 4, 5), (8, 9, 2)), TokenRow((9, 7), (10, 2)), TokenRow((5, 5, 6), (6, 2))]


def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip


def make_model_adapters():
    raw = [make_adapter(n, modules=MODULES, seed=k) for k, n in enumerate(("law", "prose"))]
    return [
        Adapter(a.name, {m: LoraFactors(0.2 * f.B, f.A) for m, f in a.modules.items()}) for a in raw
    ]


def loss_of(model, adapter, folder, rows=ROWS):
    """Response NLL per token of rows, as stock PEFT measures a saved adapter."""
    write_adapter(adapter, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(model, folder).eval()
    total = tokens = 0
    with torch.inference_mode():
        for batch in batches(rows, pad_id=0):
            total += float(response_nll(tuned, batch).sum())
            tokens += batch.supervised
    tuned.unload()
    return total / tokens
