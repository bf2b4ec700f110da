"""Models of known shapes with random weights on a GPU, and the time of training steps on them."""

import gc
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tclora.model.tokens import TokenRow

SHAPES = {
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "tie_word_embeddings": True},
    "1B": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
           "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "tie_word_embeddings": True},
    "7B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip
WARM_UP = 2  # steps whose time is left out
Rows = list[list[TokenRow]]


def draw_model(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """Draw a model on the GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    shape = LlamaConfig(**SHAPES[name], attn_implementation=attention)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(shape)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval()


class Clock:
    """Times at which steps ended (s)."""

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}

    def see(self, record: dict[str, float]) -> None:
        """Note the record of a step; of several adapters' the last counts."""
        torch.cuda.synchronize()
        self.ends[int(record["step"])] = time.perf_counter()

    @property
    def per_step(self) -> float:
        """Seconds of a step."""
        steps = sorted(self.ends)[WARM_UP - 1 :]
        return (self.ends[steps[-1]] - self.ends[steps[0]]) / (len(steps) - 1)


def clean() -> None:
    """Free what the last model held."""
    gc.collect()
    torch.cuda.empty_cache()
