"""An adapter attached for a while, its components gated."""

import torch

from tclora.model.attach import attached
from tests.tune.small_model import make_model, make_model_adapters


def test_gates_and_factors_follow_the_model_to_its_device():
    adapter = make_model_adapters()[0]
    gates = {module: torch.ones(len(f.A)).double() for module, f in adapter.modules.items()}
    model = make_model().to("meta")
    with attached(model, adapter, gates):
        logits = model(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta")).logits
    assert (logits.device.type, logits.dtype) == ("meta", torch.float32)
