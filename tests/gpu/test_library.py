"""Gates on a GPU give what they give on a CPU."""

import pytest
import torch
from peft import PeftModel

from tclora.adapter import write_adapter
from tclora.merge import merge
from tclora.route import Gating, fit_gates
from tests.route.conftest import draw_adapters

IDS = torch.arange(40).reshape(4, 10) % 50 + 4
WEIGHTS = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.2, 0.5, 0.3], [0, 1, 0]])


@pytest.mark.parametrize("per_token", [False, True])
def test_rows_of_one_batch_are_gated_each_by_its_own_mixture(tiny_model, tmp_path, per_token):
    adapters = draw_adapters(tiny_model)
    gated = fit_gates(adapters, merge(adapters, "tc-lora-mean", rank=9).adapter)
    write_adapter(gated.adapter, tmp_path / "static")
    model = PeftModel.from_pretrained(
        tiny_model, tmp_path / "static", autocast_adapter_dtype=False
    ).eval()
    gating = Gating(model, gated)
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        context = gating.applied_per_token() if per_token else gating.applied(WEIGHTS)
        with torch.no_grad(), context:
            found.append(model(input_ids=IDS.to(device)).logits.cpu())
    assert (found[1] - found[0]).norm() <= 1e-4 * found[0].norm()
